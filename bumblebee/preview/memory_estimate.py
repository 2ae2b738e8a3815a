"""How much memory training takes on a device, computed: from the sizes of a model, not from a model.

    weights       s W                      s bytes each: 2 where the weights are bf16 or fp16 (stages 1 to 3), else 4
    gradients     4 T, or (4 + s) T at stage 1 in half precision, where both kinds are kept
    optimizer     b T + 4 T                b: 8 for Adam; on stages 1 to 3 also fp32 copies of the trained weights
    step          what DeepSpeed and the optimizer take in passing (``_IN_PASSING``)
    activations   what the backward pass needs of each token and layer (``activations``), and the head's chunk

W parameters, T of them trained. ZeRO (arXiv 1910.02054) cuts the optimizer over the ranks from stage 1 on, gradients from 2,
weights at 3. Sums are exact up to rounding for a GPU's allocator; a CPU's allocator leaves holes, which is a factor found by
measuring (``_HOLES``). Numbers in bytes, of one device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bumblebee.distributed.deepspeed.sharded_parameters import full_numel
from bumblebee.nn.linear_cross_entropy import ROWS
from bumblebee.nn.moe import Experts

# Bytes for each trained weight beyond what stays: (during the backward pass, during the optimizer's step), by stage. Found by
# measuring with AdamW on a CPU, models of 25 and 60 M against each other. Of several ranks each has its share of the second.
_IN_PASSING = {
    "fp32": ((0.8, 4.0), (0.9, 16.9), (7.7, 12.1), (3.6, 15.6)),
    "half": ((1.1, 4.0), (0.0, 8.0), (6.2, 9.0), (2.6, 14.0)),
}
_HOLES = {"cpu": 1.6, "cuda": 1.0}  # what the allocator holds for each byte of activations
_LIBRARIES = {"cpu": 100e6, "cuda": 20e6}  # what is loaded and made when training begins
BUCKET = 5e8  # numbers that DeepSpeed sends at a time, unless it is told otherwise


@dataclass(frozen=True)
class ModelSize:
    """What memory depends on.

    Args:
        parameters: of the whole model.
        trained: of these.
        largest_block: parameters that ZeRO-3 needs in one place at a time.
        matrices: parameters of linear layers and experts; autocast keeps a copy of them.
        dropped_out: numbers of each token that adapters drop some of, over all layers.
        config: with Hugging Face's names; None for a model whose activations are not known.
        checkpoint_every: of ``Decoder``.
    """

    parameters: int
    trained: int
    largest_block: int
    matrices: int
    dropped_out: int
    config: Any
    checkpoint_every: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> ModelSize:
        """Of a model, which may be on the meta device."""
        parameters = list(model.parameters())
        decoder: Any = getattr(model, "model", None)
        config: Any = getattr(model, "config", None)
        blocks = [sum(map(full_numel, layer.parameters())) for layer in getattr(decoder, "layers", ())]
        matrices = {id(p): full_numel(p) for m in model.modules() if isinstance(m, nn.Linear | Experts)
                    for name, p in m.named_parameters(recurse=False) if name != "bias"}  # fmt: skip
        return cls(
            sum(map(full_numel, parameters)),
            sum(full_numel(p) for p in parameters if p.requires_grad),
            max([*blocks, *map(full_numel, parameters)]),
            sum(matrices.values()),
            sum(map(_dropped_out, model.modules())),
            config if getattr(config, "num_hidden_layers", None) and getattr(config, "intermediate_size", None) else None,
            getattr(decoder, "checkpoint_every", 0),
        )


def _dropped_out(layer: Any) -> int:
    """The width of what LoRA's dropouts see in a layer of PEFT's; without dropout an adapter's input is kept anyway."""
    if not hasattr(layer, "lora_A"):
        return 0
    return sum(layer.in_features for dropout in layer.lora_dropout.values() if getattr(dropout, "p", 0.0))


@dataclass(frozen=True)
class Setup:
    """How it is trained.

    Args:
        precision: "fp32", "bf16" or "fp16".
        stage: of ZeRO.
        ranks: devices.
        device: "cpu" or "cuda".
        optimizer_bytes: what the optimizer keeps for each weight: 8 for Adam.
        offload_optimizer: its numbers are not on the device.
        offload_weights: weights are not on the device.
        bucket: numbers that DeepSpeed sends at a time.
    """

    precision: str
    stage: int
    ranks: int = 1
    device: str = "cpu"
    optimizer_bytes: float = 8.0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: float = BUCKET

    @property
    def half(self) -> bool:
        """Whether the weights are in half precision."""
        return self.precision != "fp32" and self.stage > 0


@dataclass(frozen=True)
class MicroBatch:
    """What goes through at a time.

    Args:
        rows: of a batch; two for a pair.
        length: places in a row.
        targets: tokens that the head looks at.
        kernel: of attention: "naive", "sdpa" or "flash".
    """

    rows: int
    length: int
    targets: int
    kernel: str = "sdpa"


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, where they are the most."""

    weights: float
    gradients: float
    optimizer: float
    beside: float  # other models
    activations: float  # and what the backward pass takes in passing
    step: float
    kept: bool  # the allocator keeps what activations took, as a CPU's does

    @property
    def lasting(self) -> float:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.beside

    @property
    def total(self) -> float:
        """The most at any time. The backward pass and the optimizer's step do not meet, but see ``kept``."""
        return self.lasting + (self.activations + self.step if self.kept else max(self.activations, self.step))


def estimate(size: ModelSize, setup: Setup, batch: MicroBatch, beside: Iterable[ModelSize] = ()) -> Memory:
    """Bytes on each device.

    Args:
        size: of the model.
        setup: how it is trained.
        batch: the largest micro-batch.
        beside: frozen models beside it, as a reference.
    """
    share = 1 / setup.ranks
    each = 2 if setup.half else 4
    cut = [share if setup.stage >= stage else 1.0 for stage in (1, 2, 3)]
    in_backward, in_step = _IN_PASSING["half" if setup.precision != "fp32" else "fp32"][setup.stage]
    kept = 0 if setup.offload_optimizer else (setup.optimizer_bytes + (4 if setup.stage > 0 else 0)) * cut[0]
    gradients = 4 * cut[1] + (each if setup.half and setup.stage == 1 else 0)
    gathered = min(size.parameters, 2 * size.largest_block) * each if setup.stage == 3 else 0
    passing = min(in_backward * size.trained, in_backward * setup.bucket) + gathered
    if setup.device == "cuda" and setup.stage in (1, 2):  # on a CPU only what is written to of a bucket takes memory
        passing += each * setup.bucket
    return Memory(
        weights=0 if setup.offload_weights else each * size.parameters * cut[2],
        gradients=(0 if setup.offload_optimizer and setup.stage >= 2 else gradients) * size.trained,
        optimizer=kept * size.trained,
        beside=sum(each * other.parameters * cut[2] for other in beside),
        activations=activations(size, setup, batch) + passing + _LIBRARIES[setup.device],
        step=0 if setup.offload_optimizer else in_step * cut[0] * size.trained,
        kept=setup.device == "cpu",
    )


def activations(size: ModelSize, setup: Setup, batch: MicroBatch) -> float:
    """What the forward pass leaves for the backward pass; 0 for a model whose shape is not known."""
    if size.config is None:
        return 0.0
    c, tokens = size.config, batch.rows * batch.length
    layer = _of_a_layer(c, setup, batch)
    whole = c.num_hidden_layers * layer
    residual = c.hidden_size * (2 if setup.half else 4)
    if size.checkpoint_every:  # of these blocks only their input is kept, and one at a time is computed again
        skipped = -(-c.num_hidden_layers // size.checkpoint_every)
        whole = (c.num_hidden_layers - skipped) * layer + skipped * residual + layer
    s = 2 if setup.precision != "fp32" else 4
    adapters = size.dropped_out * (s + (1 if setup.device == "cuda" else s))  # what is left, and the mask
    autocast = 2 * size.matrices if setup.precision != "fp32" and setup.stage == 0 else 0
    return _HOLES[setup.device] * tokens * (whole + adapters + 4 * residual) + autocast + _of_the_head(c, setup, batch)


def _of_a_layer(c: Any, setup: Setup, batch: MicroBatch) -> float:
    """Bytes for each token: what autograd keeps in ``Block``, see ``bumblebee/nn``."""
    s = 2 if setup.precision != "fp32" else 4  # of matrix products
    r = 2 if setup.half else 4  # of the stream between blocks
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = c.num_attention_heads * head, c.num_key_value_heads * head
    outputs = 2 * r if s == r else 5 * s  # under autocast each of the five projections behind a norm makes a copy of its own
    norm = (4 if getattr(c, "norm", "rmsnorm") == "rmsnorm" else 0) + r
    norms = c.hidden_size * ((4 if getattr(c, "post_norms", False) else 2) * norm + outputs)
    if getattr(c, "qk_norm", False):
        norms += (queries + keys) * norm
    mask = 1 if setup.device == "cuda" else s  # of each number that may be dropped
    dropped = 2 * c.hidden_size * mask if getattr(c, "residual_dropout", 0.0) else 0
    attention = s * (2 * queries + 2 * keys) + 4 * c.num_attention_heads
    if batch.kernel == "sdpa":
        attention += s * batch.length  # the mask, as numbers
        attention += s * 2 * (queries - keys) if setup.device == "cuda" else 0  # heads repeated, see kernels.sdpa
    elif batch.kernel == "naive":
        attention += (4 + s) * c.num_attention_heads * batch.length + s * 2 * (queries - keys)
    if getattr(c, "attention_dropout", 0.0) and setup.device == "cpu":
        attention += 16 * c.num_attention_heads * batch.length  # torch's fused kernel for a CPU does not drop
    return norms + attention + dropped + s * _of_a_feed_forward_part(c)


def _of_a_feed_forward_part(c: Any) -> float:
    """Numbers for each token, the mean of all layers: four inner ones, two without a gate; each expert's input and output."""
    sparse = sum(map(c.is_sparse, range(c.num_hidden_layers))) / c.num_hidden_layers if getattr(c, "is_sparse", None) else 0
    if not sparse:
        return (4 if getattr(c, "mlp_gated", True) else 2) * c.intermediate_size
    inner = 4 * c.moe_intermediate_size
    of_experts = c.num_experts_per_tok * (inner + 2 * c.hidden_size) + c.n_shared_experts * inner
    return sparse * of_experts + (1 - sparse) * 4 * c.intermediate_size


def _of_the_head(c: Any, setup: Setup, batch: MicroBatch) -> float:
    """The chunk of logits, in training's precision and in fp32, and the gradients of weight and hidden states."""
    s = 2 if setup.precision != "fp32" else 4
    rows = min(ROWS, batch.targets)
    logits = rows * c.vocab_size * (s + (4 if setup.device == "cuda" else 0))
    return logits + (4 + s) * c.vocab_size * c.hidden_size + 2 * s * batch.targets * c.hidden_size
