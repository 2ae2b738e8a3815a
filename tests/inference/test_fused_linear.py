"""A model with fused projections computes and saves what the ordinary one does, and holds its weights once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from bumblebee import Bumblebee
from bumblebee.inference.placement.fused_linear import FusedLinear, fuse_projections


def make_model(tiny, **changes) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(initializer_range=0.1, **changes)).eval()


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}


@pytest.mark.parametrize(("changes", "fused"), [({}, 10), ({"attention_bias": True, "mlp_bias": True}, 10), (MOE, 10)])
def test_fused_model_equals_the_plain_one_and_is_saved_alike(tiny, changes, fused):
    plain, model = make_model(tiny, **changes), make_model(tiny, **changes)
    old = weakref.ref(model.blocks[0].self_attn.q_proj.weight)
    fuse_projections(model)
    gc.collect()
    assert old() is None and model.num_parameters() == plain.num_parameters()
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == fused
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=1e-5)
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_layers_that_are_not_plain_and_tied_weights_stay_unfused(tiny):
    class CustomLinear(nn.Linear):
        pass

    model = make_model(tiny)
    first, second = model.blocks
    first.self_attn.v_proj.__class__ = CustomLinear  # as an adapter or a quantized layer would be
    second.self_attn.k_proj.weight = second.self_attn.v_proj.weight
    fuse_projections(model)
    assert all(isinstance(block.mlp.up_proj, FusedLinear) for block in model.blocks)
    assert not any(isinstance(module, FusedLinear) for block in model.blocks for module in block.self_attn.modules())
