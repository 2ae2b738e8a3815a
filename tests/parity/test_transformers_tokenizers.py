"""Our Tokenizer and transformers' AutoTokenizer give the same ids for the same folder.

Two differences are intended. Text that spells a special token is text for us; AutoTokenizer encodes the token unless it gets
``split_special_tokens=True``. And next to a Qwen2 config.json, transformers 5 normalizes to NFC whatever tokenizer.json says; a
tokenizer trained here does not, so that every text can be decoded.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer  # noqa: E402

from bumblebee import Bumblebee, Tokenizer  # noqa: E402
from bumblebee.inference.detokenizer import Detokenizer  # noqa: E402
from bumblebee.tokenizer.tokenizer import SPLIT_PATTERN  # noqa: E402

CORPUS = ["The bumblebee isn't afraid of 12 flowers.\n\n  It flies, from one to another;  à côté, 花から花へ 🐝!"] * 30
SPELLED = st.sampled_from(
    ["<|im_end|>", "<s>", "</s>", "<0x41>", "bumblebee", " isn't", "  ", "\n\n", "2024", "花", "🐝", "é", "e\u0301"]
)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TEXTS = st.lists(SPELLED | ANY, max_size=6).map("".join)
QWEN2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write(folder: Path, backend: tokenizers.Tokenizer, **settings_: str | bool) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_))
    return folder


def qwen2_like(folder: Path) -> Path:
    """NFC, Qwen2's pattern, byte-level BPE, no begin-of-text token."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN2_SPECIAL])
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}))
    return write(folder, backend, tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>")


# The beginning of a SentencePiece vocabulary: three control tokens and one token per byte.
FIRST = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def finish_llama(backend: tokenizers.Tokenizer) -> None:
    """What both Llama-like tokenizers have in common."""
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in FIRST[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])


def llama_like_bpe(folder: Path) -> Path:
    """As Llama 2: merges with \u2581 for a space, and byte fallback."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    ascii_only = [piece for piece in learned["vocab"] if piece.replace("\u2581", "").isascii()]
    vocabulary = {piece: index for index, piece in enumerate([*FIRST, *ascii_only])}
    merges = [(a, b) for a, b in learned["merges"] if {a, b, a + b} <= set(vocabulary)]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    finish_llama(backend)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    return write(folder, backend, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", legacy=False)


def llama_like_unigram(folder: Path) -> Path:
    """As a SentencePiece unigram model with byte fallback."""
    learner = tokenizers.Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=80, show_progress=False))
    pieces = [
        (piece, score)
        for piece, score in json.loads(learner.to_str())["model"]["vocab"]
        if piece.isascii() or piece == "\u2581"
    ]
    backend = tokenizers.Tokenizer(models.Unigram([*((piece, -20.0) for piece in FIRST), *pieces], 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    finish_llama(backend)
    return write(folder, backend, tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=[qwen2_like, llama_like_bpe, llama_like_unigram], ids=lambda build: build.__name__)
def folder(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def hf(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def as_text(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_ids_equal_autotokenizer(ours, hf):
    @settings(deadline=None)
    @given(TEXTS)
    def check(text):
        assert ours.encode(text) == as_text(hf, text)

    check()


def test_decoded_text_equals_autotokenizer(ours, hf):
    @settings(deadline=None)
    @given(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12), st.booleans())
    def check(ids, skip):
        expected = hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected

    check()


def test_prompt_prefix_and_special_ids_equal_autotokenizer(ours, hf):
    assert ours.prefix_ids + ours.encode("hello") == hf.encode("hello")
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        hf.bos_token_id, hf.eos_token_id, hf.pad_token_id
    )  # fmt: skip
    assert ours.vocab_size == len(hf)


def test_streamed_bytes_equal_the_text(ours):
    """Normalized to NFC for the Qwen2-like, and after one space for the Llama-like tokenizers, as in SentencePiece.

    A unigram model matches control tokens such as ``<s>`` and ``<0x41>`` in a text, and the library cannot disable it.
    """
    finds_control_pieces = isinstance(ours.backend.model, models.Unigram)

    @settings(deadline=None)
    @given(TEXTS)
    def check(text):
        assume(not (finds_control_pieces and "<" in text))
        detokenizer = Detokenizer(ours)
        streamed = "".join(map(detokenizer.add, ours.encode(text))) + detokenizer.finish()
        if ours.bos_token_id is None:
            assert streamed == unicodedata.normalize("NFC", text)
        else:
            assert streamed.removeprefix(" ") == text.replace("\u2581", " ").removeprefix(" ")

    check()


# -- tokenizers trained here ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["alone", "beside a qwen2 config.json", "beside a llama config.json"])
def trained(request, tiny, tmp_path_factory) -> Iterator[tuple[Tokenizer, object]]:
    """A tokenizer trained here, and AutoTokenizer on its folder."""
    folder = tmp_path_factory.mktemp("trained")
    if request.param != "alone":
        Bumblebee(tiny(attention_bias="qwen2" in request.param)).save_pretrained(folder)
    tokenizer = Tokenizer.train(CORPUS, 330)
    tokenizer.save_pretrained(folder)
    yield tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_autotokenizer_loads_trained_tokenizers(trained):
    ours, hf = trained

    @settings(deadline=None)
    @given(TEXTS.map(lambda text: unicodedata.normalize("NFC", text)))
    def check(text):
        assert as_text(hf, text) == ours.encode(text)

    check()
    assert (hf.eos_token_id, hf.pad_token_id, len(hf)) == (ours.eos_token_id, ours.pad_token_id, ours.vocab_size)


def test_spelled_special_token_differs_from_autotokenizer(trained):
    ours, hf = trained
    text = "a<|im_end|>b"
    assert hf.encode(text) == [*ours.encode("a"), ours.token_to_id("<|im_end|>"), *ours.encode("b")]
    assert ours.encode(text) == as_text(hf, text) != hf.encode(text)
