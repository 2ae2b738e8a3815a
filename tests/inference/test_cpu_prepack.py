"""A packed model computes what the plain one computes, and is still the same model when it is saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bumblebee import Bumblebee
from bumblebee.inference.cpu_prepack import PackedLinear, Product, can_pack, pack

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.06}


def built(tiny, dtype: torch.dtype = torch.float32, **changes) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(initializer_range=0.1, **changes)).to(dtype).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_packed_model_gives_the_same_logits(tiny, dtype, tied):
    if not can_pack(dtype):
        pytest.skip(f"this CPU multiplies no packed weights in {dtype}")
    model = built(tiny, dtype, tie_word_embeddings=tied)
    for rows in (1, 2, 17, 100):
        ids = torch.randint(400, (1, rows), generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            expected = built(tiny, dtype, tie_word_embeddings=tied)(ids)
            if rows == 1:
                pack(model)
            torch.testing.assert_close(model(ids), expected, rtol=0, atol=TOLERANCE[dtype])
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 7 + 1
    assert sum(isinstance(module, Product) for module in model.modules()) == 2 * 4 + 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_has_the_same_parameters_and_is_saved_as_the_plain_one(tiny, tmp_path, tied):
    plain, model = built(tiny, tie_word_embeddings=tied), built(tiny, tie_word_embeddings=tied)
    pack(model)
    assert model.num_parameters() == plain.num_parameters()
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    for folder, each in (("plain", plain), ("packed", model)):
        each.save_pretrained(tmp_path / folder)
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert names == {file.name for file in (tmp_path / "packed").iterdir()}
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes() for name in names)


def test_layers_of_other_kinds_stay_as_they_are():
    class Own(nn.Linear):
        """Somebody's own layer."""

    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64))
    pack(model)
    assert [type(module) for module in model] == [Own, PackedLinear, nn.Linear]


def test_layers_that_share_a_product_give_each_input_its_own_outputs():
    """In any order, also for an input that was changed in place, or that only some of them were asked for."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 4), nn.Linear(8, 6)]
    product = Product(layers)
    first, second = (PackedLinear(product, number) for number in (0, 1))
    x, y = torch.randn(2, 3, 8)
    with torch.no_grad():
        for packed, plain, given in (
            (first, layers[0], x), (first, layers[0], y), (second, layers[1], y), (second, layers[1], x), (first, layers[0], x),
        ):  # fmt: skip
            torch.testing.assert_close(packed(given), plain(given), rtol=0, atol=1e-5)
        first(x)
        second(x)
        x += 1
        torch.testing.assert_close(first(x), layers[0](x), rtol=0, atol=1e-5)
        second(x)
    assert product._computed.input is None and not product._computed.outputs, "nothing is held when all have been asked"
