"""The calculator of memory: its sums, and what autograd really keeps of a layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bumblebee.checkpoint.hf_folder import parameters_on_meta
from bumblebee.config import BumblebeeConfig
from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from bumblebee.preview.memory_estimate import _HOLES, MicroBatch, ModelSize, Setup, _of_a_layer, activations, estimate
from bumblebee.transforms import ActivationCheckpointing

BATCH = MicroBatch(rows=4, length=1024, targets=4096, kernel="flash")


def meta(size: str = "7b", **changes: Any) -> Bumblebee:
    with parameters_on_meta():
        return Bumblebee(BumblebeeConfig.preset(size, **changes))


@pytest.fixture(scope="module")
def seven() -> ModelSize:
    return ModelSize.of(meta())


@pytest.mark.parametrize(
    ("precision", "stage", "ranks", "weights", "gradients", "optimizer"),
    [
        ("fp32", 0, 8, 4, 4, 8),
        ("bf16", 0, 8, 4, 4, 8),  # autocast
        ("fp32", 1, 8, 4, 4, 12 / 8),
        ("bf16", 1, 8, 2, 6, 12 / 8),  # DeepSpeed keeps gradients of both kinds
        ("bf16", 2, 8, 2, 4 / 8, 12 / 8),
        ("bf16", 3, 8, 2 / 8, 4 / 8, 12 / 8),
        ("bf16", 2, 1, 2, 4, 12),
    ],
)
def test_what_lasts_is_counted_in_bytes_of_each_weight(precision, stage, ranks, weights, gradients, optimizer, seven):
    memory = estimate(seven, Setup(precision, stage, ranks, "cuda"), BATCH)
    each = [memory.weights, memory.gradients, memory.optimizer]
    assert [part / seven.parameters for part in each] == pytest.approx([weights, gradients, optimizer])


def test_adapters_take_gradients_and_optimizer_for_themselves_alone(seven):
    model = meta()
    model.source = Path("base")
    LoRA(rank=16)(model)
    size = ModelSize.of(model)
    memory = estimate(size, Setup("bf16", 2, 1, "cuda"), BATCH)
    assert size.parameters == seven.parameters + size.trained
    assert 0 < size.trained < 0.01 * size.parameters
    assert memory.optimizer == 12 * size.trained
    assert memory.weights == 2 * size.parameters
    assert memory.total < 0.3 * estimate(seven, Setup("bf16", 2, 1, "cuda"), BATCH).total


def test_offload_takes_the_optimizer_and_the_weights_off_the_device(seven):
    setup = Setup("bf16", 3, 1, "cuda", offload_optimizer=True, offload_weights=True)
    memory = estimate(seven, setup, BATCH)
    assert memory.optimizer == memory.weights == memory.gradients == 0
    assert memory.total < 0.3 * estimate(seven, replace(setup, offload_optimizer=False, offload_weights=False), BATCH).total


def test_a_frozen_model_beside_takes_its_weights(seven):
    alone, both = (estimate(seven, Setup("bf16", 2, 4, "cuda"), BATCH, beside) for beside in ([], [seven]))
    assert both.total - alone.total == pytest.approx(2 * seven.parameters)


def test_checkpointing_keeps_inputs_of_blocks_and_one_block(seven):
    model = meta()
    ActivationCheckpointing()(model)
    setup = Setup("bf16", 2, 1, "cuda")
    every, none = activations(ModelSize.of(model), setup, BATCH), activations(seven, setup, BATCH)
    ActivationCheckpointing(every=2)(model)
    second = activations(ModelSize.of(model), setup, BATCH)
    assert every < 0.25 * none
    assert every < second < none


def test_a_model_of_unknown_shape_has_no_activations_that_could_be_told():
    assert activations(ModelSize.of(torch.nn.Linear(3, 3)), Setup("fp32", 0), BATCH) == 0


def kept_by_autograd(
    layers: int, dtype: torch.dtype, autocast: bool, rows: int, length: int, kernel: str, **changes: Any
) -> int:
    """Bytes that the forward pass of a small model leaves for the backward pass, copies of weights left out."""
    config = BumblebeeConfig.preset("tiny", num_hidden_layers=layers, vocab_size=64, **changes)
    model = Bumblebee(config, attention=kernel).to(dtype)
    weights = {parameter.numel() for parameter in model.parameters() if parameter.dim() == 2}
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known and not (tensor.dim() == 2 and tensor.numel() in weights):
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(ids, position_ids=positions, labels=ids).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize(
    ("precision", "stage", "kernel"), [("fp32", 0, "sdpa"), ("bf16", 1, "sdpa"), ("bf16", 0, "sdpa"), ("fp32", 0, "naive")]
)
def test_a_layers_activations_are_what_autograd_keeps(precision, stage, kernel):
    setup, rows, length = Setup(precision, stage), 3, 70
    dtype = torch.bfloat16 if setup.half else torch.float32
    autocast = precision != "fp32" and not setup.half
    one, two = (kept_by_autograd(layers, dtype, autocast, rows, length, kernel) for layers in (1, 2))
    computed = _of_a_layer(BumblebeeConfig.preset("tiny"), setup, MicroBatch(rows, length, rows * length, kernel))
    assert (two - one) / (rows * length) == pytest.approx(computed, rel=0.03 if kernel == "sdpa" else 0.2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True}, {"post_norms": True}, {"norm": "layernorm"}, {"mlp_gated": False}, {"residual_dropout": 0.1},
        {"attention_dropout": 0.1}, {"sliding_window": 20}, {"partial_rotary_factor": 0.5, "rope_interleaved": True},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_the_model_keep_what_is_computed_too(precision, changes):
    setup, rows, length = Setup(precision, 1), 3, 70
    dtype = torch.bfloat16 if setup.half else torch.float32
    one, two = (kept_by_autograd(layers, dtype, False, rows, length, "sdpa", **changes) for layers in (1, 2))
    config = BumblebeeConfig.preset("tiny", **changes)
    computed = _of_a_layer(config, setup, MicroBatch(rows, length, rows * length, "sdpa"))
    assert (two - one) / (rows * length) == pytest.approx(computed, rel=0.05)


def test_activations_grow_with_layers_and_tokens_alone(seven):
    setup = Setup("bf16", 2, 1, "cuda")
    assert _HOLES["cuda"] == 1
    longer = activations(seven, setup, replace(BATCH, rows=8))
    assert 1.8 < longer / activations(seven, setup, BATCH) < 2.0  # the head's chunk stays
