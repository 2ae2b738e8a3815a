"""Prompt chunks through torch's ``varlen_attn``, whose operator is given a plain implementation on the CPU here."""

from __future__ import annotations

import pytest
import torch
from helpers import attention_operators

from bumblebee import Bumblebee
from bumblebee.inference import model_runner
from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.kv_cache import PagedLayerCache
from bumblebee.inference.prefill_attention import PackedSpans
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.tokenizer.tokenizer import Tokenizer

PREFIX = list(range(40, 75))
PROMPTS = [PREFIX + [1, 2, 3], list(range(3, 20)), PREFIX + [7], [9]]
WINDOWS = {"full": {}, "window": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["packed prompts"], 300)


def run(model: Bumblebee, tokenizer: Tokenizer, step_tokens: int) -> list[tuple[list[int], list[float]]]:
    engine = GenerationEngine(model, tokenizer, config=EngineConfig(step_tokens=step_tokens, cache_tokens=512), block_size=8)
    params = SamplingParams(max_new_tokens=5, temperature=0.0, logprobs=0)
    outputs: dict[str, list] = {}
    for number, prompt in enumerate(PROMPTS):
        engine.submit(EngineRequest(str(number), prompt, params))
        for output in engine.step():  # later prompts join those in progress
            outputs.setdefault(output.id, []).extend(output.tokens)
    while engine.busy:
        for output in engine.step():
            outputs.setdefault(output.id, []).extend(output.tokens)
    groups = [outputs[str(number)] for number in range(len(PROMPTS))]
    return [([token.id for token in group], [token.logprob for token in group]) for group in groups]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6])
def test_varlen_on_a_gpu_aligns_chunks_to_the_end_of_their_sequence(window):
    torch.manual_seed(0)
    counts, lengths, block_size = [7, 1, 12], [40, 9, 12], 16
    keys, values = (torch.randn(8, block_size, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(sum(counts), 4, 64, device="cuda", dtype=torch.bfloat16)
    tables = [[3, 0, 6], [1], [5]]
    metadata = [
        AttentionMetadata.build(tables, lengths, counts, block_size, q.device, 0.0, pack=pack).windowed(window)
        for pack in (True, False)
    ]
    packed, spans = metadata[0].packed, metadata[1].spans
    masked = PagedLayerCache((8, block_size, 2, 64), torch.bfloat16, q.device)
    masked.keys, masked.values = keys, values
    expected = [masked._attend_span(q[span.offset : span.offset + span.num_queries], span) for span in spans]
    torch.testing.assert_close(packed.attend(q, keys, values, window), torch.cat(expected), rtol=0, atol=2e-2)


@pytest.mark.parametrize("step_tokens", [5, 64])
@pytest.mark.parametrize("layers", WINDOWS)
def test_packed_chunks_equal_masked_ones(tiny, tokenizer, layers, step_tokens, monkeypatch):
    attention_operators.register_varlen()
    torch.manual_seed(0)
    model = Bumblebee(tiny(num_hidden_layers=2, **WINDOWS[layers]))
    expected = run(model, tokenizer, step_tokens)
    calls: list[int] = []
    attend = PackedSpans.attend
    monkeypatch.setattr(model_runner, "can_pack", lambda *args: True)
    monkeypatch.setattr(
        PackedSpans, "attend", lambda self, *args: (calls.append(len(self.ends[0]) - 1), attend(self, *args))[1]
    )
    packed = run(model, tokenizer, step_tokens)
    assert max(calls) > 1  # several sequences in one call
    for (ids, log_probs), (expected_ids, expected_log_probs) in zip(packed, expected, strict=True):
        assert ids == expected_ids
        assert log_probs == pytest.approx(expected_log_probs, abs=1e-5)
