"""Memory of a training run on each device, computed from the size of the model.

    weights       s W                      s bytes per weight: 2 if the weights are in bf16 or fp16 (stages 1 to 3), else 4
    gradients     4 T, or (4 + s) T at stage 1 in half precision, which keeps both
    optimizer     b T + 4 T                b: 8 for Adam; stages 1 to 3 add fp32 copies of the trained weights
    step          temporary memory of DeepSpeed and the optimizer (``_TEMPORARY``)
    sampling      the KV cache of the completions that are sampled at a time, and at stage 3 the weights that it gathers
    activations   what autograd keeps for each token and layer (``activation_bytes``), and the logits chunk of the LM head

W parameters, T of them trained. ZeRO (arXiv 1910.02054) partitions the optimizer over ranks from stage 1, gradients from stage
2, weights at stage 3. The sums are exact for a GPU up to the rounding of its allocator; the allocator of a CPU fragments, which
is a measured factor (``_FRAGMENTATION``). All results are in bytes per device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from bumblebee.config import BumblebeeConfig, TransformerConfig, head_width
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel
from bumblebee.lora.switch import AdapterLayer, adapter_layers
from bumblebee.nn.block_forward import BlockForward
from bumblebee.nn.linear_cross_entropy import chunk_rows, softmax_logits
from bumblebee.nn.moe import Experts
from bumblebee.tasks.weight_gathering import cache_bytes

# Bytes per trained weight of temporary memory (during the backward pass, during the optimizer step), by stage. Measured with
# AdamW on a CPU, on models of 25 M and 60 M parameters. The second is partitioned over ranks.
_TEMPORARY = {
    "fp32": ((0.8, 4.0), (0.9, 16.9), (7.7, 12.1), (3.6, 15.6)),
    "half": ((1.1, 4.0), (0.0, 8.0), (6.2, 9.0), (2.6, 14.0)),
}
_FRAGMENTATION = {"cpu": 1.6, "cuda": 1.0}  # bytes held by the allocator per byte of activations
_LIBRARIES = {"cpu": 100e6, "cuda": 20e6}  # loaded and allocated when training begins
BUCKET_SIZE = 5e8  # numbers that DeepSpeed communicates at a time by default


@dataclass(frozen=True)
class ModelSize:
    """The properties of a model that memory depends on.

    Args:
        parameters: of the whole model.
        trained: parameters that are trained.
        largest_block: parameters that ZeRO-3 gathers at a time.
        largest_layer: parameters of the largest block, and of what is outside of the blocks, such as the embedding.
        matrices: parameters of linear layers and experts, of which autocast keeps a copy.
        adapter_dropout_width: total width of the inputs of LoRA dropouts, over all layers.
        config: with Hugging Face's names; None for a model whose activations are unknown.
        checkpointed: number of blocks whose activations are recomputed.
        keeps_attention: whether these keep the results of attention.
    """

    parameters: int
    trained: int
    largest_block: int
    largest_layer: int
    matrices: int
    adapter_dropout_width: int
    config: TransformerConfig | None
    checkpointed: int = 0
    keeps_attention: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> ModelSize:
        """Measure a model, which may be on the meta device."""
        parameters = list(model.parameters())
        decoder: object = getattr(model, "model", None)
        config: TransformerConfig | None = getattr(model, "config", None)
        layers: Iterable[nn.Module] = getattr(decoder, "layers", ())
        blocks = [sum(map(full_numel, layer.parameters())) for layer in dict.fromkeys(layers)]
        forwards = [layer.forward for layer in layers if isinstance(layer.forward, BlockForward)]
        matrices = {id(p): full_numel(p) for m in model.modules() if isinstance(m, nn.Linear | Experts)
                    for name, p in m.named_parameters(recurse=False) if name != "bias"}  # fmt: skip
        return cls(
            sum(map(full_numel, parameters)),
            sum(full_numel(p) for p in parameters if p.requires_grad),
            max([*blocks, *map(full_numel, parameters)]),
            sum(map(full_numel, parameters)) - sum(blocks) + max(blocks, default=0),
            sum(matrices.values()),
            sum(map(_adapter_dropout_width, adapter_layers(model))),
            config if getattr(config, "num_hidden_layers", None) and getattr(config, "intermediate_size", None) else None,
            sum(forward.recompute for forward in forwards),
            any(forward.keep_attention for forward in forwards),
        )


def _adapter_dropout_width(layer: AdapterLayer) -> int:
    """Width of the inputs of a PEFT layer's LoRA dropouts. Without dropout the adapter shares the layer's input."""
    return sum(layer.in_features for dropout in layer.lora_dropout.values() if getattr(dropout, "p", 0.0))


@dataclass(frozen=True)
class TrainingSetup:
    """The options of a run that memory depends on.

    Args:
        precision: "fp32", "bf16" or "fp16".
        stage: ZeRO stage.
        ranks: number of devices.
        device: "cpu" or "cuda".
        optimizer_bytes: optimizer state in bytes per weight; 8 for Adam.
        offload_optimizer: the optimizer state is not on the device.
        offload_weights: the weights are not on the device.
        bucket_size: numbers that DeepSpeed communicates at a time.
    """

    precision: str
    stage: int
    ranks: int = 1
    device: str = "cpu"
    optimizer_bytes: float = 8.0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket_size: float = BUCKET_SIZE

    @property
    def half(self) -> bool:
        """Whether the weights are in half precision."""
        return self.precision != "fp32" and self.stage > 0


@dataclass(frozen=True)
class BatchShape:
    """Shape of a micro-batch.

    Args:
        rows: of the batch; two for a preference pair.
        length: tokens in a row.
        targets: tokens with a label.
        kernel: attention kernel: "naive", "sdpa", "varlen", "flash" or "flash3".
        packed: a row may hold several documents, for which "sdpa" needs a mask.
        heads: LM heads whose logits are in memory at the same time; two in distillation.
    """

    rows: int
    length: int
    targets: int
    kernel: str = "sdpa"
    packed: bool = True
    heads: int = 1


@dataclass(frozen=True)
class SamplingShape:
    """The completions that reinforcement learning samples at a time.

    Args:
        sequences: number of completions.
        positions: of each, with its prompt.
        layers: whether stage 3 gathers weights layer by layer, and not all of them.
    """

    sequences: int
    positions: int
    layers: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a device, at their peak."""

    weights: float
    gradients: float
    optimizer: float
    frozen_models: float
    activations: float  # with the temporary memory of the backward pass
    step: float  # temporary memory of the optimizer step
    activations_stay: bool  # the allocator does not return the memory of activations, as on a CPU
    sampling: float = 0.0  # memory while completions are sampled

    @property
    def persistent(self) -> float:
        """Memory that is held all the time."""
        return self.weights + self.gradients + self.optimizer + self.frozen_models

    @property
    def total(self) -> float:
        """The peak: of sampling, of the backward pass or of the optimizer step; the last two add up if activations stay."""
        temporary = self.activations + self.step if self.activations_stay else max(self.activations, self.step)
        return self.persistent + max(temporary, self.sampling)


def estimate_memory(
    size: ModelSize,
    setup: TrainingSetup,
    batch: BatchShape,
    frozen_models: Iterable[ModelSize] = (),
    sampling: SamplingShape | None = None,
) -> MemoryEstimate:
    """Estimate the memory of each device.

    Args:
        size: of the trained model.
        setup: options of the run.
        batch: the largest micro-batch.
        frozen_models: frozen models, such as a reference.
        sampling: completions that are sampled at a time.
    """
    weight_bytes = 2 if setup.half else 4
    # Share of each device in optimizer state (stage 1), gradients (stage 2) and weights (stage 3).
    optimizer_share, gradient_share, weight_share = (1 / setup.ranks if setup.stage >= stage else 1.0 for stage in (1, 2, 3))
    in_backward, in_step = _TEMPORARY["half" if setup.precision != "fp32" else "fp32"][setup.stage]
    state = 0 if setup.offload_optimizer else (setup.optimizer_bytes + (4 if setup.stage > 0 else 0)) * optimizer_share
    gradients = 4 * gradient_share + (weight_bytes if setup.half and setup.stage == 1 else 0)
    gathered = min(size.parameters, 2 * size.largest_block) * weight_bytes if setup.stage == 3 else 0
    temporary = min(in_backward * size.trained, in_backward * setup.bucket_size) + gathered
    if setup.device == "cuda" and setup.stage in (1, 2):  # on a CPU only the written part of a bucket takes memory
        temporary += weight_bytes * setup.bucket_size
    return MemoryEstimate(
        weights=0 if setup.offload_weights else weight_bytes * size.parameters * weight_share,
        gradients=(0 if setup.offload_optimizer and setup.stage >= 2 else gradients) * size.trained,
        optimizer=state * size.trained,
        frozen_models=sum(weight_bytes * other.parameters * weight_share for other in frozen_models),
        activations=activation_bytes(size, setup, batch) + temporary + _LIBRARIES[setup.device],
        step=0 if setup.offload_optimizer else in_step * optimizer_share * size.trained,
        activations_stay=setup.device == "cpu",
        sampling=0.0 if sampling is None else _LIBRARIES[setup.device] + sampling_bytes(size, setup, sampling),
    )


def sampling_bytes(size: ModelSize, setup: TrainingSetup, shape: SamplingShape) -> float:
    """The KV cache in blocks, logits and probabilities of a decoding step, and the weights that stage 3 gathers."""
    dtype, gathered = torch.bfloat16 if setup.half else torch.float32, 0.0
    if setup.stage == 3:
        gathered = dtype.itemsize * (size.largest_layer if shape.layers else size.parameters)
    if size.config is None:
        return gathered
    return cache_bytes(size.config, shape.sequences, shape.positions, dtype) + gathered


def activation_bytes(size: ModelSize, setup: TrainingSetup, batch: BatchShape) -> float:
    """What the forward pass keeps for the backward pass; 0 for a model of unknown shape."""
    if size.config is None:
        return 0.0
    c, tokens = size.config, batch.rows * batch.length
    layer = layer_bytes(c, setup, batch)
    all_layers = c.num_hidden_layers * layer
    residual = c.hidden_size * (2 if setup.half else 4)
    s = 2 if setup.precision != "fp32" else 4
    if size.checkpointed:  # these keep their input, and what attention returned; one at a time is recomputed
        attended = (_query_width(c) * s + 4 * c.num_attention_heads) * (size.keeps_attention and batch.kernel != "naive")
        all_layers = (c.num_hidden_layers - size.checkpointed) * layer + size.checkpointed * (residual + attended) + layer
    adapters = size.adapter_dropout_width * (s + (1 if setup.device == "cuda" else s))  # output and mask of the dropout
    autocast = 2 * size.matrices if setup.precision != "fp32" and setup.stage == 0 else 0
    per_token = all_layers + adapters + 4 * residual
    return _FRAGMENTATION[setup.device] * tokens * per_token + autocast + _lm_head_bytes(c, setup, batch)


def layer_bytes(c: TransformerConfig, setup: TrainingSetup, batch: BatchShape) -> float:
    """Bytes per token that autograd keeps in a ``Block``, see ``bumblebee/nn``."""
    s = 2 if setup.precision != "fp32" else 4  # of matrix products
    r = 2 if setup.half else 4  # of the residual stream
    queries = _query_width(c)
    keys = queries // c.num_attention_heads * c.num_key_value_heads
    outputs = 2 * r if s == r else 5 * s  # under autocast each of the five projections after a norm copies its input
    norm = (4 if getattr(c, "norm", "rmsnorm") == "rmsnorm" else 0) + r
    norms = c.hidden_size * ((4 if getattr(c, "post_norms", False) else 2) * norm + outputs)
    if getattr(c, "qk_norm", False):
        norms += (queries + keys) * norm
    dropout_mask = 1 if setup.device == "cuda" else s  # per number
    dropout = 2 * c.hidden_size * dropout_mask if getattr(c, "residual_dropout", 0.0) else 0
    attention = s * (2 * queries + 2 * keys) + 4 * c.num_attention_heads
    if batch.kernel == "sdpa" and (batch.packed or getattr(c, "sliding_window", None)):
        attention += s * batch.length  # the mask, as numbers
        attention += s * 2 * (queries - keys) if setup.device == "cuda" else 0  # repeated heads, see attention_kernels.sdpa
    elif batch.kernel == "naive":
        attention += (4 + s) * c.num_attention_heads * batch.length + s * 2 * (queries - keys)
    if getattr(c, "attention_dropout", 0.0) and setup.device == "cpu":
        attention += 16 * c.num_attention_heads * batch.length  # PyTorch's fused kernel for CPUs has no dropout
    return norms + attention + dropout + s * _mlp_numbers(c)


def _query_width(c: TransformerConfig) -> int:
    """Width of all query heads together."""
    return c.num_attention_heads * head_width(c)


def _mlp_numbers(c: TransformerConfig) -> float:
    """Numbers per token of an MLP, averaged over layers: four of the inner width, two without a gate.

    Experts of a mixture add their input and output.
    """
    if not isinstance(c, BumblebeeConfig) or not c.num_experts:
        return (4 if getattr(c, "mlp_gated", True) else 2) * c.intermediate_size
    assert c.moe_intermediate_size is not None
    sparse = sum(map(c.is_sparse, range(c.num_hidden_layers))) / c.num_hidden_layers
    inner = 4 * c.moe_intermediate_size
    experts = c.num_experts_per_tok * (inner + 2 * c.hidden_size) + c.n_shared_experts * inner
    return sparse * experts + (1 - sparse) * 4 * c.intermediate_size


def _lm_head_bytes(c: TransformerConfig, setup: TrainingSetup, batch: BatchShape) -> float:
    """The chunk of logits in the training precision and in fp32, and the gradients of weight and hidden states."""
    if getattr(c, "score_head", False):
        return 0.0  # a reward model has one score for each text
    s = 2 if setup.precision != "fp32" else 4
    rows = min(chunk_rows(setup.device), batch.targets)
    in_fp32 = 4 * min(rows * c.vocab_size, softmax_logits("cuda")) if setup.device == "cuda" else 0
    logits = batch.heads * rows * c.vocab_size * s + in_fp32
    return logits + (4 + s) * c.vocab_size * c.hidden_size + 2 * s * batch.targets * c.hidden_size
