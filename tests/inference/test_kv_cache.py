"""The key-value cache returns what was written, and a forward pass over it equals one over the whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Bumblebee
from bumblebee.inference.cache import KVCache, LayerCache

CPU = torch.device("cpu")
V, CAPACITY = 64, 12


@pytest.fixture(scope="module", params=["naive", "sdpa"])
def model(request, tiny) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(vocab_size=V, initializer_range=0.2), attention=request.param).eval()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, CAPACITY - 1), min_size=2, max_size=2), max_size=20))
def test_a_layer_holds_the_last_that_was_written_to_each_place(writes):
    """Two rows, which write one position at a time to places of their own."""
    layer = LayerCache((2, CAPACITY, 1, 1), torch.float32, CPU)
    kept = [[0.0] * CAPACITY for _ in range(2)]
    for number, places in enumerate(writes, start=1):
        used = max(places) + 1
        layer.place(torch.tensor(places)[:, None], used)
        keys, values = layer.update(torch.full((2, 1, 1, 1), float(number)), torch.full((2, 1, 1, 1), -float(number)))
        for row, place in enumerate(places):
            kept[row][place] = float(number)
        assert keys[..., 0, 0].tolist() == [row[:used] for row in kept]
        assert values[..., 0, 0].tolist() == [[-number for number in row[:used]] for row in kept]


def test_the_cache_has_the_shape_and_dtype_of_the_model(tiny):
    cache = KVCache(tiny(head_dim=16), batch=3, capacity=5, dtype=torch.bfloat16, device=CPU)
    assert len(cache.layers) == 2
    assert {tuple(layer.keys.shape) for layer in cache.layers} == {(3, 5, 2, 16)}
    assert {layer.values.dtype for layer in cache.layers} == {torch.bfloat16}


def test_logits_over_a_cache_equal_those_of_one_pass_however_the_text_is_cut(model):
    input_ids = torch.randint(V, (2, CAPACITY), generator=torch.Generator().manual_seed(0))

    @settings(deadline=None, max_examples=25)
    @given(st.sets(st.integers(1, CAPACITY - 1)))
    @torch.inference_mode()
    def check(cuts):
        cache = KVCache(model.config, 2, CAPACITY, torch.float32, CPU)
        logits = []
        for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), CAPACITY], strict=True):
            positions = torch.arange(start, end).expand(2, -1)
            logits.append(model(input_ids[:, start:end], positions, cache=cache.at(positions, end)))
        torch.testing.assert_close(torch.cat(logits, 1), model(input_ids), rtol=0, atol=1e-5)

    check()


def test_rows_of_different_lengths_do_not_see_their_padding_or_each_other(model):
    """Prompts of 3 and 7 tokens padded to 7, then three tokens more for each at its own place."""
    text = torch.randint(V, (2, CAPACITY), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([3, 7])
    padded = torch.where(torch.arange(7) < lengths[:, None], text[:, :7], 63)
    cache, positions = KVCache(model.config, 2, CAPACITY, torch.float32, CPU), torch.arange(7).expand(2, 7)
    with torch.inference_mode():
        model(padded, positions, cache=cache.at(positions, 7))
        for step in range(3):
            places = (lengths + step)[:, None]
            grown = model(text.gather(1, places), places, cache=cache.at(places, int(places.max()) + 1))
            for row in range(2):
                alone = model(text[row : row + 1, : int(places[row]) + 1])[0, -1]
                torch.testing.assert_close(grown[row, 0], alone, rtol=0, atol=1e-5)


def test_without_position_ids_a_prompt_begins_at_zero(model):
    input_ids = torch.randint(V, (1, 5))
    cache = KVCache(model.config, 1, 5, torch.float32, CPU)
    layers = cache.at(torch.arange(5)[None], 5)
    torch.testing.assert_close(model(input_ids, cache=layers), model(input_ids), rtol=0, atol=1e-5)
