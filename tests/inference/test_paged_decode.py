"""The engine over the paged decode kernel, interpreted on the CPU: the same tokens as over gathered keys and values."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers.interpreted_triton import interpreted
from helpers.step_waits import ONE_READ, step_waits

from bumblebee import Bumblebee, SamplingParams, Tokenizer
from bumblebee.inference import decode_attention, model_runner
from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.request import EngineRequest

COMMON = list(range(20))
PROMPTS = [[5], [1, 2, 3], [*COMMON, 9], [*COMMON, 9, 7], [60, 3] * 9]


@pytest.fixture(scope="module")
def kernel():
    with interpreted("bumblebee.nn.paged_attention") as module:
        yield lambda *args: module.paged_decode_attention(*args, splits=2)


@pytest.fixture(scope="module")
def model(tiny) -> Bumblebee:
    torch.manual_seed(0)
    layers = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    return Bumblebee(tiny(vocab_size=64, initializer_range=0.3, max_position_embeddings=64, **layers)).eval()


def run(model, tokenizer_folder, watch=None) -> list[list[int]]:
    """A late request, so that prefill and decode share steps, one that is cancelled, and blocks that are used again."""
    engine = GenerationEngine(model, Tokenizer.from_pretrained(tokenizer_folder), [], EngineConfig(128, 4, 24))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(PROMPTS))}
    params = SamplingParams(temperature=0.0, max_new_tokens=6)
    late = [EngineRequest(str(number), prompt, params) for number, prompt in enumerate(PROMPTS)]
    for step in range(40):
        if step < 2 or late:
            engine.submit(late.pop(0)) if late else None
        if step == 4:
            engine.cancel("1")
        for output in watch(engine) if watch else engine.step():
            tokens[output.id] += [token.id for token in output.tokens]
    assert not engine.busy
    return list(tokens.values())


def test_engine_over_the_kernel_generates_the_same_tokens(kernel, model, tokenizer_folder, monkeypatch):
    expected = run(model, tokenizer_folder)
    assert [len(tokens) for tokens in expected] == [6, 3, 6, 6, 6]
    calls = []
    monkeypatch.setattr(model_runner, "select_decode_kernel", lambda *args: lambda *its: calls.append(1) or kernel(*its))
    assert run(model, tokenizer_folder) == expected and len(calls) == 20


def test_a_decode_step_over_the_kernel_waits_once(model, tokenizer_folder, monkeypatch):
    """On the kernel's arguments alone: what it returns does not matter."""
    monkeypatch.setattr(model_runner, "select_decode_kernel", lambda *args: lambda q, *its: torch.zeros_like(q))
    engine = GenerationEngine(model, Tokenizer.from_pretrained(tokenizer_folder))
    for number, prompt in enumerate(PROMPTS):
        engine.submit(EngineRequest(str(number), prompt, SamplingParams(temperature=0.0)))
    assert [step_waits(engine) for _ in range(3)] == [ONE_READ] * 3


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "missing", "reason"),
    [
        (torch.bfloat16, 128, (9, 0), False, None),
        (torch.float64, 128, (9, 0), False, "does not compute in float64"),
        (torch.bfloat16, 512, (9, 0), False, "takes up to 256"),
        (torch.bfloat16, 128, (7, 5), False, "compute capability 8.0"),
        (torch.bfloat16, 128, (9, 0), True, "Triton cannot be imported"),
    ],
)
def test_where_the_kernel_cannot_run_the_reason_is_logged(dtype, width, capability, missing, reason, monkeypatch, caplog):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if missing:
        monkeypatch.delitem(sys.modules, "bumblebee.nn.paged_attention", raising=False)
        monkeypatch.setitem(sys.modules, "triton", None)
    kernel = decode_attention.select_decode_kernel(torch.device("cuda"), dtype, width)
    assert (kernel is None) == (reason is not None) and (reason or "") in caplog.text
