"""A forward pass over the paged KV cache equals one over the whole text, for any chunks and any block table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Bumblebee
from bumblebee.inference import attention_metadata
from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.inference.kv_cache import KVCache, bytes_per_position

CPU = torch.device("cpu")
V, SIZE, NUM_BLOCKS = 64, 4, 12
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}


WINDOWS = {
    "all": {},
    "window": {"sliding_window": 3},
    "mixed": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(scope="module", params=[(dtype, window) for window in WINDOWS for dtype in TOLERANCE], ids=str)
def model(request, tiny) -> Bumblebee:
    torch.manual_seed(0)
    dtype, window = request.param
    return Bumblebee(tiny(vocab_size=V, initializer_range=0.2, **WINDOWS[window])).eval().to(dtype)


def cache_of(model: Bumblebee, filler: float = 0.0) -> KVCache:
    cache = KVCache(model.config, NUM_BLOCKS, SIZE, model.lm_head.weight.dtype, [CPU] * model.config.num_hidden_layers)
    for layer in cache.layers:
        layer.keys.fill_(filler)
        layer.values.fill_(filler)
    return cache


@st.composite
def chunked_texts(draw) -> tuple[list[list[int]], list[list[int]]]:
    """Up to three sequences: for each a random block table and the lengths of its chunks."""
    block_tables = draw(st.permutations(range(NUM_BLOCKS)))
    chunks = draw(st.lists(st.lists(st.sampled_from([1, 1, 1, 2, 3, 5]), min_size=1, max_size=5), min_size=1, max_size=3))
    chunks = [its[: next((n for n in range(len(its)) if sum(its[: n + 1]) > 4 * SIZE), len(its))] or [1] for its in chunks]
    return [list(block_tables[4 * row : 4 * row + 4]) for row in range(len(chunks))], chunks


@torch.inference_mode()
def over_the_cache(model: Bumblebee, texts: list[list[int]], block_tables, chunks, padding: float) -> list[torch.Tensor]:
    """The logits of each sequence, computed chunk by chunk: all first chunks in one step, then all second ones, and so on."""
    cache, logits = cache_of(model, filler=7.0), [[] for _ in texts]
    done = [0] * len(texts)
    for step in range(max(map(len, chunks))):
        rows = sorted((row for row in range(len(texts)) if step < len(chunks[row])), key=lambda row: chunks[row][step] > 1)
        counts = [chunks[row][step] for row in rows]
        ends = [done[row] + count for row, count in zip(rows, counts, strict=True)]
        layers = cache.prepare(AttentionMetadata.build([block_tables[row] for row in rows], ends, counts, SIZE, CPU, padding))
        ids = [index for row, end in zip(rows, ends, strict=True) for index in texts[row][done[row] : end]]
        position_ids = [position for row, end in zip(rows, ends, strict=True) for position in range(done[row], end)]
        out = model(torch.tensor([ids]), torch.tensor([position_ids]), cache=layers)[0].split(counts)
        for row, end, part in zip(rows, ends, out, strict=True):
            logits[row].append(part)
            done[row] = end
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("padding", [0, 1.5, math.inf], ids=["separate", "similar", "together"])
def test_chunked_logits_equal_one_full_pass(model, padding, monkeypatch):
    """Old content of the blocks, and other sequences of the same step, have no effect."""
    monkeypatch.setattr(attention_metadata, "MAX_GATHERED", 24)  # one, two or three sequences in a call

    @settings(max_examples=40)
    @given(chunked_texts(), st.integers(0, 99))
    def check(cut, seed):
        block_tables, chunks = cut
        generator = torch.Generator().manual_seed(seed)
        texts = [torch.randint(V, (sum(its),), generator=generator).tolist() for its in chunks]
        for text, logits in zip(texts, over_the_cache(model, texts, block_tables, chunks, padding), strict=True):
            expected = model(torch.tensor([text]))[0]
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE[logits.dtype])

    check()


@pytest.mark.parametrize("window", [None, 1000])
def test_decode_calls_gather_a_bounded_number_of_positions(window):
    """A long sequence would pad all others to its length: 64 x 32,768 positions."""
    lengths = [32_768, *([100] * 63)]
    tables = [[0] * -(-length // 16) for length in lengths]
    metadata = AttentionMetadata.build(tables, lengths, [1] * 64, 16, CPU, math.inf).windowed(window)
    shapes = [tuple(slots.shape) for slots, _ in metadata.decode]
    assert shapes == ([(8, 32_768), (56, 100)] if window is None else [(64, 1000)])
    assert [tuple(valid.shape) for _, valid in metadata.decode] == shapes


def test_padded_rows_read_nothing_of_others_not_even_nan(model):
    """NaN stays in another sequence's blocks, and in the unused rest of reused blocks."""
    cache = cache_of(model, filler=float("nan"))
    long, short = list(range(9)), [5]
    for block_tables, text in (([0, 1, 2], long), ([3], short)):
        layers = cache.prepare(
            AttentionMetadata.build([block_tables], [len(text) - 1 or 1], [len(text) - 1 or 1], SIZE, CPU, math.inf)
        )
        part = text[:-1] or text
        model(torch.tensor([part]), torch.arange(len(part))[None], cache=layers)
    layers = cache.prepare(AttentionMetadata.build([[0, 1, 2], [3]], [9, 2], [1, 1], SIZE, CPU, math.inf))
    out = model(torch.tensor([[8, 6]]), torch.tensor([[8, 1]]), cache=layers)[0]
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out[0], model(torch.tensor([long]))[0, -1], rtol=0, atol=tolerance)
    torch.testing.assert_close(out[1], model(torch.tensor([[5, 6]]))[0, -1], rtol=0, atol=tolerance)


def test_cache_shape_dtype_and_bytes(tiny):
    config = tiny(head_dim=16)
    cache = KVCache(config, num_blocks=3, block_size=5, dtype=torch.bfloat16, devices=[CPU] * config.num_hidden_layers)
    assert len(cache.layers) == 2
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(3, 5, 2, 16)}
    assert {layer.values.dtype for layer in cache.layers} == {torch.bfloat16}
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert total == 3 * 5 * bytes_per_position(config, torch.bfloat16)
