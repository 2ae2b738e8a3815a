"""A tokenizer given as vocab.json and merges.txt is converted: ids equal those of transformers and of tokenizer.json."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer  # noqa: E402

from bumblebee import Tokenizer  # noqa: E402

CORPUS = ["The bumblebee isn't afraid of 12 flowers.\n\n  It flies, from one to another;  à côté, 花から花へ 🐝!"] * 30
WORDS = st.sampled_from(["bumblebee", " isn't", "  ", "\n\n", "2024", "花", "🐝", "é", "e\u0301", "<|endoftext|>", " It"])
TEXTS = st.lists(WORDS | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6).map("".join)
QWEN = {
    "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}  # fmt: skip
CLASSES = {
    "gpt2": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "opt": {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "add_bos_token": True,
    },
    "qwen2": QWEN,
}


def write(folder: Path, name: str) -> Path:
    """Vocabulary and merges, and the other files that folders of this class have."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = ["</s>"] if name == "opt" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    folder.mkdir()
    learner.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    if name == "gpt2":
        vocabulary["<|endoftext|>"] = len(vocabulary)
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    decoder = {}
    if name == "qwen2":
        added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
        decoder = {
            str(len(vocabulary) + index): {"content": token, "special": token[1] == "|", "normalized": False}
            for index, token in enumerate(added)
        }
    settings_ = CLASSES[name] | ({"added_tokens_decoder": decoder} if decoder else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_converted_tokenizer_gives_the_ids_of_transformers(tmp_path, name):
    folder = write(tmp_path / "old", name)
    ours, hf = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "new")
    saved = Tokenizer.from_pretrained(tmp_path / "new")

    @settings(max_examples=100)
    @given(TEXTS)
    def check(text):
        ids = hf.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids == saved.encode(text)
        assert ours.prompt_ids(text) == hf.encode(text, split_special_tokens=True)

    check()
    assert ours.eos_token_id == hf.eos_token_id
    assert ours.vocab_size == len(hf)
    assert sorted(ours.special_ids) == sorted(id for id, token in hf.added_tokens_decoder.items() if token.special)
    assert ours.prefix_ids == ([ours.token_to_id("</s>")] if name == "opt" else [])


def test_older_folders_name_added_tokens_in_other_files(tmp_path):
    folder = write(tmp_path / "old", "qwen2")
    expected = Tokenizer.from_pretrained(folder)
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {token["content"]: int(id) for id, token in raw["added_tokens_decoder"].items()}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    (folder / "special_tokens_map.json").write_text(json.dumps({**QWEN, "eos_token": {"content": "<|im_end|>"}}))
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    older = Tokenizer.from_pretrained(folder)
    assert older.backend.get_vocab() == expected.backend.get_vocab()
    assert (older.special_ids, older.eos_token_id) == (expected.special_ids, expected.eos_token_id)
    assert older.encode("e\u0301 12") == expected.encode("e\u0301 12") == expected.encode("\xe9 12")


def test_folder_with_the_two_files_only_is_read(tmp_path):
    folder = write(tmp_path / "old", "gpt2")
    (folder / "tokenizer_config.json").unlink()
    tok = Tokenizer.from_pretrained(folder)
    assert tok.decode(tok.encode("The bumblebee")) == "The bumblebee"
    assert tok.eos_token_id == tok.vocab_size - 1 == tok.token_to_id("<|endoftext|>")


def test_unusable_files_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "old", "qwen2")
    vocabulary = (folder / "vocab.json").read_text()
    for content, reason in (("[", "vocab.json and merges.txt: "), ('{"a": 0}', "vocab.json")):
        (folder / "vocab.json").write_text(content)
        with pytest.raises(ValueError, match=reason):
            Tokenizer.from_pretrained(folder)
    (folder / "vocab.json").write_text(vocabulary)
    settings_ = QWEN | {"added_tokens_decoder": {"999": {"content": "<far>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    with pytest.raises(ValueError, match="'<far>' has the id 999, but 330 is the next free one"):
        Tokenizer.from_pretrained(folder)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"only tokenizer\.model.*AutoTokenizer"):
        Tokenizer.from_pretrained(tmp_path / "llama")
