"""Graphs of the decode step with a recording stand-in for CUDA: static buffers, buckets, padding, and moved caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bumblebee import Bumblebee, SamplingParams, Tokenizer
from bumblebee.inference import cuda_graphs, model_runner
from bumblebee.inference.cuda_graphs import can_capture
from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.request import EngineRequest

CPU = torch.device("cpu")


def plain_kernel(q, k, v, keys, values, tables, rows, lengths, window=None) -> Tensor:
    """The paged kernel's contract, written out."""
    out = torch.zeros_like(q)
    for index, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        if length:
            size, at = keys.shape[1], torch.arange(length)
            blocks, places = tables[row, at // size], at % size
            keys[blocks[-1], places[-1]], values[blocks[-1], places[-1]] = k[index], v[index]
            its = (x[blocks, places].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (keys, values))
            weights = torch.einsum("hd,shd->hs", q[index], (own := next(its))) / own.shape[-1] ** 0.5
            out[index] = torch.einsum("hs,shd->hd", weights.softmax(-1), next(its))
    return out


class Recorder:
    """Captures by keeping the computation; replays by repeating it on the same buffers."""

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []

    def __call__(self, compute):
        output = compute().clone()
        self.captured.append(len(output))

        def replay() -> None:
            self.replayed.append(len(output))
            output.copy_(compute())

        return replay, output


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(model_runner, "graph_capture", lambda device: recorder)
    monkeypatch.setattr(model_runner, "select_decode_kernel", lambda *args: plain_kernel)
    monkeypatch.setattr(cuda_graphs, "EAGER_STEPS", 1)
    return recorder


@pytest.fixture(scope="module")
def model(tiny) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(vocab_size=64, initializer_range=0.3, max_position_embeddings=64)).eval()


def engine_of(model, folder, **options) -> GenerationEngine:
    return GenerationEngine(model, Tokenizer.from_pretrained(folder), [], EngineConfig(cache_tokens=320, **options))


def run(engine: GenerationEngine, lengths=(4, 9, 9, 14, 14)) -> dict[str, list[int]]:
    for number, new in enumerate(lengths):
        params = SamplingParams(temperature=0.0, max_new_tokens=new)
        engine.submit(EngineRequest(str(number), list(range(number, number + 18)), params))
    tokens: dict[str, list[int]] = {}
    while engine.busy:
        for output in engine.step():
            tokens.setdefault(output.id, []).extend(token.id for token in output.tokens)
    return tokens


def test_graphs_generate_the_tokens_of_eager_steps(model, tokenizer_folder, recorder):
    """Five, four, then two sequences: buckets 6 (the most that run), 4 and 2; the first step of each runs eagerly."""
    expected = run(engine_of(model, tokenizer_folder, max_running=6, cuda_graphs=False))
    assert recorder.captured == []
    engine = engine_of(model, tokenizer_folder, max_running=6)
    assert engine.model_runner.graphs.buckets == [1, 2, 4, 6]
    assert run(engine) == expected
    assert recorder.captured == [6, 4, 2] and recorder.replayed == [6] * 2 + [4] * 4 + [2] * 4


def test_padding_reads_and_writes_no_block(model, tokenizer_folder, recorder):
    """A padded row has row 0 of the tables, which belongs to a live sequence, whose cache it leaves alone."""
    runner = engine_of(model, tokenizer_folder, max_running=4).model_runner
    for layer in runner.kv_cache.layers:
        layer.keys.fill_(7.0)
        layer.values.fill_(7.0)
    with torch.inference_mode():
        runner._decode(torch.tensor([[5, 0, 0], [0, -1, -1], [1, 0, 0]]))
    for layer in runner.kv_cache.layers:
        assert (layer.keys.flatten(0, 1) != 7).flatten(1).any(1).nonzero().tolist() == [[0]]  # the token's own slot


def test_a_graph_is_captured_anew_after_the_cache_moved(model, tokenizer_folder, recorder):
    engine = engine_of(model, tokenizer_folder, max_running=1)
    first = run(engine, [5])
    for layer in engine.model_runner.kv_cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert run(engine, [5]) == first and recorder.captured == [1, 1]


def test_a_failed_capture_falls_back_to_eager_steps(model, tokenizer_folder, recorder, monkeypatch, caplog):
    expected = run(engine_of(model, tokenizer_folder, cuda_graphs=False))

    def fail(compute):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(model_runner, "graph_capture", lambda device: fail)
    assert run(engine_of(model, tokenizer_folder)) == expected
    assert caplog.text.count("decoding runs without CUDA graphs: capture failed: operation not permitted") == 1


def test_models_whose_step_needs_the_host_run_eagerly(model, tiny):
    hooked = Bumblebee(tiny())
    hooked.blocks[0].register_forward_pre_hook(lambda *args: None)
    sparse = Bumblebee(tiny(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    assert can_capture(model, [CPU, CPU])
    assert not any(can_capture(other, [CPU]) for other in (hooked, sparse, nn.Linear(2, 2)))
    assert not can_capture(model, [CPU, torch.device("meta")])
