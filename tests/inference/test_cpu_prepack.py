"""A prepacked model computes what the ordinary one computes, and is saved identically."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bumblebee import Bumblebee
from bumblebee.inference.placement.cpu_prepack import PrepackedLinear, PrepackedMatmul, can_prepack, prepack

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}


def make_model(tiny, dtype: torch.dtype = torch.float32, **changes) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(initializer_range=0.1, **changes)).to(dtype).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_are_unchanged(tiny, dtype, tied):
    if not can_prepack(dtype):
        pytest.skip(f"this CPU does not support prepacked weights in {dtype}")
    model = make_model(tiny, dtype, tie_word_embeddings=tied)
    for rows in (1, 2, 17, 100):
        ids = torch.randint(400, (1, rows), generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            expected = make_model(tiny, dtype, tie_word_embeddings=tied)(ids)
            if rows == 1:
                prepack(model)
            torch.testing.assert_close(model(ids), expected, rtol=0, atol=TOLERANCE[dtype])
    assert sum(isinstance(module, PrepackedLinear) for module in model.modules()) == 2 * 7 + 1
    assert sum(isinstance(module, PrepackedMatmul) for module in model.modules()) == 2 * 4 + 1


@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_and_saved_files_are_unchanged(tiny, tmp_path, tied):
    plain, model = make_model(tiny, tie_word_embeddings=tied), make_model(tiny, tie_word_embeddings=tied)
    prepack(model)
    assert model.num_parameters() == plain.num_parameters()
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "prepacked")
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert names == {file.name for file in (tmp_path / "prepacked").iterdir()}
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "prepacked" / name).read_bytes() for name in names)


def test_subclasses_and_other_dtypes_stay_unchanged():
    class CustomLinear(nn.Linear):
        pass

    model = nn.Sequential(CustomLinear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64))
    prepack(model)
    assert [type(module) for module in model] == [CustomLinear, PrepackedLinear, nn.Linear]


def test_layers_with_a_shared_matmul_return_their_own_outputs():
    """In any order, also after an in-place change of the input, or if only some of the layers are called."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 4), nn.Linear(8, 6)]
    matmul = PrepackedMatmul(layers)
    first, second = (PrepackedLinear(matmul, index) for index in (0, 1))
    x, y = torch.randn(2, 3, 8)
    with torch.no_grad():
        for prepacked, plain, batch in (
            (first, layers[0], x), (first, layers[0], y), (second, layers[1], y), (second, layers[1], x), (first, layers[0], x),
        ):  # fmt: skip
            torch.testing.assert_close(prepacked(batch), plain(batch), rtol=0, atol=1e-5)
        first(x)
        second(x)
        x += 1
        torch.testing.assert_close(first(x), layers[0](x), rtol=0, atol=1e-5)
        second(x)
    assert matmul._pending.input is None and not matmul._pending.outputs, "freed when every layer has its output"
