"""Checks of a model against its data's tokenizer and length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bumblebee import Distillation, LanguageModeling
from bumblebee.model import Bumblebee
from bumblebee.tasks.tokenizer_checks import adopt_tokenizer, check_learnable, check_length
from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import SFT, Preferences, Prompts, UnpairedPreferences


@pytest.fixture
def folder(tiny, tokenizer_folder, tmp_path):
    """A model folder with its tokenizer."""
    torch.manual_seed(0)
    Bumblebee(tiny()).save_pretrained(tmp_path / "model")
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_tokenizer_with_added_tokens_is_accepted(folder):
    model, tokenizer = Bumblebee.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    adopt_tokenizer(model, tokenizer)
    model.config.vocab_size += 1
    tokenizer.backend.add_tokens(["<new>"])
    adopt_tokenizer(model, tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_another_tokenizer_than_the_models_is_refused(folder):
    other = Tokenizer.train(["zzz yyy xxx " * 9, "www vvv"], 270)
    with pytest.raises(
        ValueError, match=f"data.tokenizer differs from that of the model in {folder}.* use --data.tokenizer {folder}"
    ):
        adopt_tokenizer(Bumblebee.from_pretrained(folder), other)


def test_stop_ids_are_added_once(tiny, tokenizer_folder):
    model, tokenizer = Bumblebee(tiny()), Tokenizer.from_pretrained(tokenizer_folder)
    for _ in range(2):
        adopt_tokenizer(model, tokenizer, [7])
    assert model.config.eos_token_id == [tokenizer.eos_token_id, 7]


def test_only_learned_positions_limit_max_length(tiny):
    class Learned(Bumblebee):
        def build_positions(self):
            return torch.nn.Embedding(self.config.max_position_embeddings, self.config.hidden_size)

    data = SimpleNamespace(max_length=257)
    check_length(Bumblebee(tiny()), data)
    learned = Learned(tiny())
    with pytest.raises(ValueError, match="data.max_length is 257, but the model has 256 position embeddings"):
        check_length(learned, data)
    check_length(learned, SimpleNamespace(max_length=256))
    check_length(learned, SimpleNamespace())


@pytest.mark.parametrize("kind", [Preferences, UnpairedPreferences])
def test_language_models_do_not_learn_rejected_answers(kind, tiny, folder):
    file = "preference.jsonl" if kind is Preferences else "labelled.jsonl"
    data = kind([f"recipes/samples/{file}"], str(folder))
    for task in (LanguageModeling(Bumblebee(tiny())), Distillation(Bumblebee(tiny()), str(folder))):
        message = f"data: {type(task).__name__} would learn the bad answers of {kind.__name__}, too: use a task for preferences"
        with pytest.raises(ValueError, match=message):
            task.setup(data)


def test_language_models_need_answers(folder):
    prompts = Prompts("recipes/samples/prompts.jsonl", str(folder))
    with pytest.raises(ValueError, match="LanguageModeling learns from answers, and Prompts has prompts only"):
        check_learnable("LanguageModeling", prompts)
    check_learnable("Distillation", prompts, samples_answers=True)
    check_learnable("LanguageModeling", SFT("recipes/samples/sft.jsonl", str(folder)))
