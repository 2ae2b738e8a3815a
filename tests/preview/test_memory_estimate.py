"""The memory estimate: its sums, and its activations against what autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bumblebee.config import BumblebeeConfig
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from bumblebee.models.load_context import meta_parameters
from bumblebee.preview.memory_estimate import (
    _FRAGMENTATION,
    BatchShape,
    ModelSize,
    SamplingShape,
    TrainingSetup,
    activation_bytes,
    estimate_memory,
    layer_bytes,
    sampling_bytes,
)
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.transforms import ActivationCheckpointing

BATCH = BatchShape(rows=4, length=1024, targets=4096, kernel="flash")


def meta_model(size: str = "7b", **changes: Any) -> Bumblebee:
    with meta_parameters():
        return Bumblebee(BumblebeeConfig.preset(size, **changes))


@pytest.fixture(scope="module")
def seven() -> ModelSize:
    return ModelSize.of(meta_model())


@pytest.mark.parametrize(
    ("precision", "stage", "ranks", "weights", "gradients", "optimizer"),
    [
        ("fp32", 0, 8, 4, 4, 8),
        ("bf16", 0, 8, 4, 4, 8),  # autocast
        ("fp32", 1, 8, 4, 4, 12 / 8),
        ("bf16", 1, 8, 2, 6, 12 / 8),  # DeepSpeed keeps gradients in both precisions
        ("bf16", 2, 8, 2, 4 / 8, 12 / 8),
        ("bf16", 3, 8, 2 / 8, 4 / 8, 12 / 8),
        ("bf16", 2, 1, 2, 4, 12),
    ],
)
def test_persistent_memory_in_bytes_per_weight(precision, stage, ranks, weights, gradients, optimizer, seven):
    memory = estimate_memory(seven, TrainingSetup(precision, stage, ranks, "cuda"), BATCH)
    each = [memory.weights, memory.gradients, memory.optimizer]
    assert [part / seven.parameters for part in each] == pytest.approx([weights, gradients, optimizer])


def test_lora_needs_gradients_and_optimizer_for_adapters_only(seven):
    model = meta_model()
    model.source = Path("base")
    LoRA(rank=16)(model)
    size = ModelSize.of(model)
    memory = estimate_memory(size, TrainingSetup("bf16", 2, 1, "cuda"), BATCH)
    assert size.parameters == seven.parameters + size.trained
    assert 0 < size.trained < 0.01 * size.parameters
    assert memory.optimizer == 12 * size.trained
    assert memory.weights == 2 * size.parameters
    assert memory.total < 0.32 * estimate_memory(seven, TrainingSetup("bf16", 2, 1, "cuda"), BATCH).total


def test_offload_removes_optimizer_and_weights_from_the_device(seven):
    setup = TrainingSetup("bf16", 3, 1, "cuda", offload_optimizer=True, offload_weights=True)
    memory = estimate_memory(seven, setup, BATCH)
    assert memory.optimizer == memory.weights == memory.gradients == 0
    assert (
        memory.total
        < 0.32 * estimate_memory(seven, replace(setup, offload_optimizer=False, offload_weights=False), BATCH).total
    )


def test_frozen_model_needs_memory_for_its_weights(seven):
    alone, both = (estimate_memory(seven, TrainingSetup("bf16", 2, 4, "cuda"), BATCH, beside) for beside in ([], [seven]))
    assert both.total - alone.total == pytest.approx(2 * seven.parameters)


def test_activation_checkpointing_keeps_block_inputs_and_one_block(seven):
    model = meta_model()
    ActivationCheckpointing()(model)
    setup = TrainingSetup("bf16", 2, 1, "cuda")
    every, none = activation_bytes(ModelSize.of(model), setup, BATCH), activation_bytes(seven, setup, BATCH)
    ActivationCheckpointing(every=2)(model)
    second = activation_bytes(ModelSize.of(model), setup, BATCH)
    assert every < 0.25 * none
    assert every < second < none


def test_sampling_needs_the_kv_cache_that_the_engine_allocates(tokenizer_folder):
    """And at stage 3 the whole weights, however many ranks there are."""
    model = meta_model("tiny", vocab_size=400, num_key_value_heads=2).to_empty(device="cpu")
    requests = [EngineRequest(str(i), [1] * 28, SamplingParams(max_new_tokens=128)) for i in range(100)]
    engine = Generator(model, Tokenizer.from_pretrained(tokenizer_folder)).engine_for(requests)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in engine.model_runner.kv_cache.layers)
    size, shape = ModelSize.of(model), SamplingShape(64, 156)
    logits = 3 * 4 * 64 * 400
    assert sampling_bytes(size, TrainingSetup("fp32", 2), shape) - logits == cache
    assert sampling_bytes(size, TrainingSetup("bf16", 2), shape) - logits == cache / 2
    sharded = [estimate_memory(size, TrainingSetup("fp32", stage, 8, "cuda"), BATCH, sampling=shape) for stage in (2, 3)]
    assert sharded[1].sampling - sharded[0].sampling == 4 * size.parameters
    by_layer = sampling_bytes(size, TrainingSetup("fp32", 3), SamplingShape(64, 156, layers=True))
    held_at_once = model.model.embed_tokens, model.model.norm, model.lm_head, model.blocks[0]
    held = sum(parameter.numel() for module in held_at_once for parameter in module.parameters())
    assert by_layer - logits - cache == 4 * held < 4 * size.parameters
    many = estimate_memory(size, TrainingSetup("fp32", 2), BATCH, sampling=SamplingShape(64, 1_000_000))
    assert many.total == many.persistent + many.sampling


def test_unknown_model_has_no_activation_estimate():
    assert activation_bytes(ModelSize.of(torch.nn.Linear(3, 3)), TrainingSetup("fp32", 0), BATCH) == 0


def autograd_bytes(layers: int, dtype: torch.dtype, autocast: bool, rows: int, length: int, kernel: str, **changes: Any) -> int:
    """Bytes that the forward pass of a small model keeps for the backward pass, without copies of weights."""
    config = BumblebeeConfig.preset("tiny", num_hidden_layers=layers, vocab_size=64, **changes)
    model = Bumblebee(config, attention=kernel).to(dtype)
    weights = {parameter.numel() for parameter in model.parameters() if parameter.dim() == 2}
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in storages and not (tensor.dim() == 2 and tensor.numel() in weights):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (rows, length))
    positions = torch.arange(length).expand(rows, length)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model(ids, position_ids=positions, labels=ids).sum()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("precision", "stage", "kernel"), [("fp32", 0, "sdpa"), ("bf16", 1, "sdpa"), ("bf16", 0, "sdpa"), ("fp32", 0, "naive")]
)
def test_layer_activations_match_autograd(precision, stage, kernel):
    setup, rows, length = TrainingSetup(precision, stage), 3, 70
    dtype = torch.bfloat16 if setup.half else torch.float32
    autocast = precision != "fp32" and not setup.half
    one, two = (autograd_bytes(layers, dtype, autocast, rows, length, kernel) for layers in (1, 2))
    computed = layer_bytes(BumblebeeConfig.preset("tiny"), setup, BatchShape(rows, length, rows * length, kernel))
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
def test_layer_activations_match_autograd_for_model_options(precision, changes):
    setup, rows, length = TrainingSetup(precision, 1), 3, 70
    dtype = torch.bfloat16 if setup.half else torch.float32
    one, two = (autograd_bytes(layers, dtype, False, rows, length, "sdpa", **changes) for layers in (1, 2))
    config = BumblebeeConfig.preset("tiny", **changes)
    computed = layer_bytes(config, setup, BatchShape(rows, length, rows * length, "sdpa"))
    assert (two - one) / (rows * length) == pytest.approx(computed, rel=0.05)


def test_activations_are_proportional_to_tokens(seven):
    setup = TrainingSetup("bf16", 2, 1, "cuda")
    assert _FRAGMENTATION["cuda"] == 1
    longer = activation_bytes(seven, setup, replace(BATCH, rows=8))
    assert 1.8 < longer / activation_bytes(seven, setup, BATCH) < 2.0  # the LM head's chunk is constant
