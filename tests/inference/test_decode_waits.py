"""An engine step waits for a GPU once, and writes only the entries of block tables that changed."""

from __future__ import annotations

import pytest
import torch
from helpers.step_waits import ONE_READ, step_waits

from bumblebee import Bumblebee, SamplingParams, Tokenizer
from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.request import EngineRequest


@pytest.fixture(scope="module")
def model(tiny) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(vocab_size=2560, initializer_range=0.3, max_position_embeddings=96)).eval()


PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.7, seed=1),
    "truncated": SamplingParams(temperature=1.3, top_p=0.5, top_k=20, seed=2),
    "penalised": SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={3: 1.0}, min_new_tokens=5),
    "scored": SamplingParams(logprobs=3, seed=3),
}


def test_an_engine_step_waits_for_the_gpu_once(model, tokenizer_folder):
    """In prefill with scored prompts, in decode of every way to sample, and in both at once."""
    engine = GenerationEngine(model, Tokenizer.from_pretrained(tokenizer_folder), [0], EngineConfig(step_tokens=60))
    for name, params in PARAMS.items():
        engine.submit(EngineRequest(name, [len(name), *range(19)], params, prompt_logprobs=2 if name == "scored" else None))
    assert [step_waits(engine) for _ in range(6)] == [ONE_READ] * 6
    assert engine.stats().new_tokens > 10


def test_rows_with_too_few_candidates_cost_a_second_read(model, tokenizer_folder):
    engine = GenerationEngine(model, Tokenizer.from_pretrained(tokenizer_folder))
    engine.submit(EngineRequest("flat", [1, 2], SamplingParams(temperature=50.0, top_p=0.9, seed=1)))
    assert step_waits(engine) == {"transfers.py read_back": 2}


def test_block_tables_write_only_what_changed(model, tokenizer_folder, monkeypatch):
    """Nothing in decode; a row is reused after its sequence has ended, and holds what its new sequence needs."""
    engine = GenerationEngine(model, Tokenizer.from_pretrained(tokenizer_folder), config=EngineConfig(max_running=2))
    tables, writes = engine.model_runner.block_tables, []
    address, collect = tables.tensor.data_ptr(), tables._collect

    def recording(row, table, at, blocks):
        before = len(at)
        collect(row, table, at, blocks)
        writes.append(len(at) - before)

    monkeypatch.setattr(tables, "_collect", recording)
    for number in range(3):
        engine.submit(EngineRequest(str(number), [number] * 20, SamplingParams(temperature=0.0, max_new_tokens=6 + number)))
    while engine.busy:
        engine.step()
        for sequence in engine.scheduler.running:
            row = tables._rows.get(sequence)
            assert row is None or tables.tensor[row, : len(sequence.block_table)].tolist() == sequence.block_table
    assert writes[:2] == [2, 2] and len(writes) == 3 and tables.tensor.data_ptr() == address
