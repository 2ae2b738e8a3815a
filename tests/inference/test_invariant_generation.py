"""Inside ``batch_invariant`` the engine's log-probabilities equal those of the training forward pass, bit for bit.

Whatever runs at the same time: chunks of prompts, shared prefixes, decode calls of one or many sequences, limits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.training_runs import VOCABULARY, small_model

from bumblebee import Bumblebee, SamplingParams, Tokenizer
from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.batch_invariant import batch_invariant

SLOW = pytest.mark.slow
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: list[Any] = [
    pytest.param({**GROUPED, "qk_norm": True, "sliding_window": 20}, torch.float32, id="window"),
    pytest.param({**GROUPED, **EXPERTS}, torch.float32, id="experts"),
    pytest.param({"tie_word_embeddings": True, "attention_bias": True}, torch.bfloat16, id="bf16", marks=SLOW),
]  # fmt: skip


@dataclass
class Text:
    """A prompt, its completion, and the log-probabilities of the tokens after the first, where they were computed."""

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float | None]


def sample(model: Bumblebee, tokenizer: Tokenizer, draw: random.Random) -> list[Text]:
    """Run some requests, always the same ones but for their order, in an engine with random limits."""
    config = EngineConfig(cache_tokens=2048, max_running=draw.choice([1, 3, 16]), step_tokens=draw.choice([7, 33, 512]))
    engine = GenerationEngine(model, tokenizer, (), config)
    engine.model_runner.max_padding = draw.choice([0.0, 1.3, 1e9])
    fixed = random.Random(0)
    common = [fixed.randrange(VOCABULARY) for _ in range(40)]
    prompts = [common[: (0, 16, 33, 40)[n % 4]] + fixed.choices(range(VOCABULARY), k=1 + 9 * n) for n in range(6)]
    for number in draw.sample(range(6), 6):
        params = SamplingParams(max_new_tokens=4 + number, seed=number, logprobs=0)
        engine.submit(EngineRequest(str(number), prompts[number], params, prompt_logprobs=0 if number % 2 else None))
    texts = [Text(prompt, [], [None] * (len(prompt) - 1)) for prompt in prompts]
    while engine.busy:
        for output in engine.step():
            text = texts[int(output.id)]
            if output.prompt_logprobs:
                text.log_probs = [token.logprob for token in output.prompt_logprobs[1:]]
            text.tokens += [token.id for token in output.tokens]
            text.log_probs += [token.logprob for token in output.tokens]
    return texts


@torch.no_grad()
def trained(model: Bumblebee, texts: list[Text], padding: int) -> list[list[float]]:
    """Log-probabilities of the tokens after the first, from one padded batch."""
    rows = [[*text.prompt, *text.tokens] for text in texts]
    shape = len(rows), max(map(len, rows)) - 1 + padding
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    for at, row in enumerate(rows):
        ids[at, : len(row) - 1], labels[at, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    out = -model(ids, position_ids=torch.arange(shape[1]).expand(shape), labels=labels)
    return [out[at, : len(row) - 1].tolist() for at, row in enumerate(rows)]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize(("changes", "dtype"), MODELS)
def test_sampled_log_probabilities_equal_trained_ones(changes, dtype, seed, tokenizer_folder):
    model = small_model(initializer_range=0.3, **changes).to(dtype).eval()
    draw, tokenizer = random.Random(seed), Tokenizer.from_pretrained(tokenizer_folder)
    with batch_invariant():
        texts = sample(model, tokenizer, draw)
        assert {len(text.tokens) for text in texts} == set(range(4, 10))
        groups = (texts[:1], texts[1:]) if seed % 2 else (texts[:4], texts[4:])
        log_probs = [each for group in groups for each in trained(model, group, draw.randrange(3))]
        for text, expected in zip(texts, log_probs, strict=True):
            assert text.log_probs[-len(text.tokens) :] == expected[-len(text.tokens) :]
            assert all(own in (None, other) for own, other in zip(text.log_probs, expected, strict=True))
        if seed == 0:  # tokens do not depend on the batch either
            assert [text.tokens for text in sample(model, tokenizer, random.Random(5))] == [text.tokens for text in texts]


def test_models_that_are_loaded_inside_can_run(tokenizer_folder, tmp_path):
    """Outside, weights are prepacked, which is refused."""
    small_model(vocab_size=400).save_pretrained(tmp_path)
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path)
    params = SamplingParams(max_new_tokens=3, temperature=0.0, logprobs=0)
    prepacked = Generator.from_pretrained(tmp_path, device="cpu", dtype="float32")
    with batch_invariant():
        completions = Generator.from_pretrained(tmp_path, device="cpu", dtype="float32").generate(["a", "a b c"], params)
        assert all(token.logprob is not None for each in completions for token in each.tokens)
        with pytest.raises(ValueError, match="^batch_invariant: does not support _linear_pointwise"):
            prepacked.generate(["a"], params)
