"""Batch-invariant forward passes: the result of a token depends on the tokens before it, and on nothing else in the batch.

Matrix libraries choose the order of a sum by the shapes of the whole product, so that the last bits of a token's logits depend
on how many other tokens are computed with it. ``batch_invariant`` is a context in which they do not: whether tokens are
computed one by one from a KV cache or in padded rows of any number, log-probabilities are equal bit for bit. The idea is that
of https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/; here for CPUs, in fp32 and bf16.

- Linear layers are computed in blocks of ``ROWS`` rows, the last one padded, and have at least ``COLUMNS`` outputs, below
  which MKL takes other paths. All products then have the same shape but for the layer's own sizes.
- Attention reads keys in chunks of ``KEYS`` positions from the first on. Scores, weights and sums of a chunk are products of
  fixed shapes, and chunks are added in order. Masked keys and padding add exact zeros.
- Activations whose vectorized and scalar code differ, so that the last elements of a tensor are rounded differently, are
  composed of operations that do not. Norms, softmax and rotary embeddings reduce each row by itself and stay as they are.

These are properties of the libraries below torch and are checked by tests, not guaranteed by their documentation. The backward
pass uses the usual operators. Other matrix products, such as those of models of transformers, are refused.

Shapes: R rows, I inputs, O outputs; B sequences, T queries, S keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

ROWS = 32  # of a linear layer's product: fewer would waste less on small batches, and be slower on large ones
COLUMNS = 16  # of any product, at least
QUERIES = 16  # rows of an attention product
KEYS = 64  # of an attention chunk
SCORES = 2**22  # attention scores in memory at a time

_usual_functions = torch._C.DisableTorchFunction  # a context in which no mode is active
P = ParamSpec("P")
Result = TypeVar("Result")
_depth = 0  # of contexts; a plain number, which torch.compile can read


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Compute forward passes batch-invariantly inside this context, on the CPU. Backward passes may run outside of it.

    Args:
        enabled: False changes nothing.
    """
    global _depth
    if not enabled:
        yield
        return
    _depth += 1
    try:
        with _Mode():
            yield
    finally:
        _depth -= 1


def is_batch_invariant() -> bool:
    """Whether the context is active."""
    return _depth > 0


def keeping_mode(function: Callable[P, Result]) -> Callable[P, Result]:
    """A function that is batch-invariant whenever it is called, if the context is active now; for recomputed activations."""
    if not is_batch_invariant():
        return function

    @wraps(function)
    def invariant(*args: P.args, **kwargs: P.kwargs) -> Result:
        with batch_invariant():
            return function(*args, **kwargs)

    return invariant


class _Mode(TorchFunctionMode):
    """Replaces torch's functions by those of ``_REPLACED``, and refuses those of ``_REFUSED``."""

    def __torch_function__(
        self, func: Callable[..., object], types: Sequence[type], args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        if func in _REFUSED or isinstance(func, torch._ops.OpOverloadPacket) and _PACKED.search(str(func)):
            name = getattr(func, "__name__", func)
            raise ValueError(f"batch_invariant: does not support {name}, as in quantized layers and models of transformers")
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


# -- linear layers -------------------------------------------------------------------------------------------------------


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` without gradient: (R, I), (O, I) -> (R, O)."""
    outputs = len(weight)
    if outputs < COLUMNS:
        weight = pad(weight, (0, 0, 0, COLUMNS - outputs))
    rows, columns = len(x), weight.T
    out = x.new_empty(rows, len(weight))
    whole = rows - rows % ROWS
    for first in range(0, whole, ROWS):
        torch.mm(x[first : first + ROWS], columns, out=out[first : first + ROWS])
    if whole < rows:
        out[whole:] = torch.mm(pad(x[whole:], (0, 0, 0, ROWS - rows % ROWS)), columns)[: rows - whole]
    return out if outputs == len(weight) else out[:, :outputs].contiguous()


class _Context(FunctionCtx):
    """What the functions below keep for the backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    usual: Callable[..., Tensor]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _check(x)
        ctx.save_for_backward(x, weight)
        with _usual_functions():
            out = product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
            return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, len(weight))
        return (
            (grad @ weight).view(x.shape) if ctx.needs_input_grad[0] else None,
            grad.T @ x.reshape(len(grad), -1) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, weight, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if other.dim() != 2 or input.dim() < 2:
        raise ValueError(f"batch_invariant: does not support products of {list(input.shape)} and {list(other.shape)}")
    return _Linear.apply(input, other.T, None)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor) -> Tensor:
    return _Linear.apply(mat1, mat2.T, input)


def _check(x: Tensor) -> None:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"batch_invariant: computes in fp32 or bf16 on a CPU, not in {dtype} on {x.device}")
    if torch.is_autocast_enabled("cpu"):
        raise ValueError("batch_invariant: does not support autocast, which bf16 uses at ZeRO stage 0")


# -- attention and activations: the usual gradients of exact results -------------------------------------------------------


class _WithUsualGradient(torch.autograd.Function):
    """The result of one function, the gradient of another, which computes the same up to rounding."""

    @staticmethod
    def forward(ctx: _Context, exact: Callable[..., Tensor], usual: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.usual = usual
        with _usual_functions():
            return exact(*inputs)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad(), _usual_functions():
            out = ctx.usual(*inputs)
        return None, None, *torch.autograd.grad(out, inputs, grads[0])


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """``softmax(q k / sqrt(D)) v``, in fp32 inside.

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D); position 0 of the keys is position 0 of the sequence.
        v: like ``k``.
        visible: (B or 1, T, S) bool, True where a query attends to a key. Every query attends to one.

    Returns:
        (B, T, H, D) in the dtype of q.
    """

    def usual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, visible[:, None], enable_gqa=True).transpose(1, 2)

    return _WithUsualGradient.apply(lambda q, k, v: _attention(q, k, v, visible), usual, q, k, v)


def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """As many sequences at a time as have ``SCORES`` scores, or one."""
    count = max(1, SCORES // (q.shape[1] * q.shape[2] * k.shape[1]))
    visible = visible.expand(len(q), -1, -1)
    parts = zip(*(x.split(count) for x in (q, k, v, visible)), strict=True)
    return torch.cat([_attend(*part) for part in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    (batch, queries, heads, width), kv_heads = q.shape, k.shape[2]
    group, scale, dtype = heads // kv_heads, width**-0.5, q.dtype
    # The queries of the heads that share keys are rows of one matrix: (B, K, T * H / K, D).
    rows = q.float().unflatten(2, (kv_heads, group)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    visible = visible.repeat_interleave(group, dim=1)
    blocks, chunks = -(-rows.shape[2] // QUERIES), -(-k.shape[1] // KEYS)
    more_rows, more_keys, more_width = blocks * QUERIES - rows.shape[2], chunks * KEYS - k.shape[1], -width % COLUMNS
    rows = pad(rows, (0, more_width, 0, more_rows)).unflatten(2, (blocks, QUERIES)).flatten(0, 2)  # (B K blocks, QUERIES, D)
    k, v = (pad(x.float().transpose(1, 2), (0, more_width, 0, more_keys)) for x in (k, v))
    hidden = ~pad(visible, (0, more_keys, 0, more_rows)).unflatten(1, (blocks, QUERIES)).unflatten(3, (chunks, KEYS))

    def chunk(x: Tensor, number: int) -> Tensor:
        part = x[:, :, None, number * KEYS : (number + 1) * KEYS]
        return part.expand(-1, -1, blocks, -1, -1).flatten(0, 2)  # (B K blocks, KEYS, D)

    scores = rows.new_empty(chunks, len(rows), QUERIES, KEYS)
    for number in range(chunks):
        torch.bmm(rows, chunk(k, number).mT, out=scores[number])
        masked = scores[number].view(batch, kv_heads, blocks, QUERIES, KEYS)
        masked.mul_(scale).masked_fill_(hidden[:, None, :, :, number], -math.inf)
    weights = scores.sub_(scores.amax(dim=(0, 3), keepdim=True).clamp(min=torch.finfo().min)).exp_()
    out, total = rows.new_zeros(rows.shape), rows.new_zeros(len(rows), QUERIES, 1)
    for number in range(chunks):
        out += torch.bmm(weights[number], chunk(v, number))
        total += weights[number].sum(dim=-1, keepdim=True)
    out = (out / total).view(batch, kv_heads, blocks * QUERIES, -1)[:, :, : queries * group, :width]
    return out.unflatten(2, (queries, group)).permute(0, 2, 1, 3, 4).flatten(2, 3).to(dtype)


def _sigmoid(x: Tensor) -> Tensor:
    return (1 / (1 + (-x.float()).exp())).to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    return (x.float() / (1 + (-x.float()).exp())).to(x.dtype)


def _gelu(x: Tensor) -> Tensor:
    return (0.5 * x.float() * (1 + (x.float() * math.sqrt(0.5)).erf())).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    wide = x.float()
    return (0.5 * wide * (1 + (math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)).tanh())).to(x.dtype)


def _activation(exact: Callable[[Tensor], Tensor], usual: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda input, inplace=False: _WithUsualGradient.apply(exact, usual, input)


def _any_gelu(input: Tensor, approximate: str = "none") -> Tensor:
    def usual(x: Tensor) -> Tensor:
        return F.gelu(x, approximate=approximate)

    return _WithUsualGradient.apply(_gelu if approximate == "none" else _gelu_tanh, usual, input)


_REPLACED: dict[Callable[..., object], Callable[..., object]] = {
    torch._C._nn.linear: _linear,  # F.linear, unless DeepSpeed has replaced it by a function that calls matmul or addmm
    torch.matmul: _matmul, torch.Tensor.matmul: _matmul, torch.Tensor.__matmul__: _matmul, torch.addmm: _addmm,
    F.silu: _activation(_silu, F.silu), F.gelu: _any_gelu,
    torch.sigmoid: _activation(_sigmoid, torch.sigmoid),
    torch.Tensor.sigmoid: _activation(_sigmoid, torch.sigmoid),
}  # fmt: skip
_PACKED = re.compile(r"linear|mm|matmul")  # operators of prepacked and quantized weights
_REFUSED: set[Callable[..., object]] = {
    F.scaled_dot_product_attention, F.multi_head_attention_forward, torch.einsum, torch.bmm, torch.Tensor.bmm, torch.baddbmm,
}  # fmt: skip
