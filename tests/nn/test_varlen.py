"""Packed training through torch's ``varlen_attn``, whose operators are given plain implementations on the CPU here."""

from __future__ import annotations

import pytest
import torch
from helpers import attention_operators
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bumblebee import Bumblebee
from bumblebee.nn import attention_kernels
from bumblebee.nn.attention_kernels import AttentionMask, naive, varlen
from bumblebee.nn.documents import Documents, documents_of, move_with_documents

B, T, H, K, D = 2, 12, 4, 2, 8
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 1, 2]])
MASKS = {"causal": AttentionMask, "packed": lambda: AttentionMask.packed(PACKED)}


@pytest.fixture(scope="module", autouse=True)
def plain_operators():
    attention_operators.register_varlen()


@pytest.fixture
def fp32(monkeypatch):
    """Let varlen run on the CPU and in fp32, so that results can be compared exactly."""
    monkeypatch.setattr(attention_kernels, "problems", lambda kernel, dtype: [])


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((B, T, heads, D), generator=generator, requires_grad=True) for heads in (H, K, K)]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("layout", MASKS)
def test_varlen_and_its_gradients_equal_naive(layout, window):
    def run(kernel):
        leaves = inputs()
        out = kernel(*leaves, MASKS[layout](), window)
        return out.detach(), torch.autograd.grad(out.square().sum(), leaves)

    torch.testing.assert_close(run(varlen), run(naive), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "dropout"), [(D, 0.5), (D + 1, 0.0)])
def test_what_varlen_lacks_is_computed_by_sdpa(width, dropout, monkeypatch):
    monkeypatch.setattr(attention_kernels, "sdpa", lambda *args: args[-1])
    q = torch.zeros(B, T, H, width)
    assert varlen(q, q, q, AttentionMask.packed(PACKED), None, dropout) == dropout


def step(config, attention: str) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Bumblebee(config, attention=attention)
    ids = torch.arange(B * T).view(B, T)
    loss = model(ids, position_ids=PACKED, labels=ids.roll(-1, 1)).sum()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_packed_training_step_through_varlen_equals_naive(tiny, fp32):
    torch.testing.assert_close(step(tiny(), "varlen"), step(tiny(), "naive"), rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Records the largest tensor that an operator returns, in numbers."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("attention", "has_mask"), [("varlen", False), ("sdpa", True)])
def test_packed_training_with_varlen_allocates_no_mask(attention, has_mask, tiny, fp32, monkeypatch):
    """On meta tensors: a (T, S) mask of 4,096 positions would be larger than anything else."""
    length = 4096
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know meta
    positions = torch.arange(length).remainder(1000).expand(1, length)
    with torch.device("meta"):
        model = Bumblebee(tiny(max_position_embeddings=length, num_hidden_layers=1), attention=attention)
        ids = torch.empty(1, length, dtype=torch.int64)
    with Largest() as largest:
        hidden = model.model(ids, meta := move_with_documents(positions, torch.device("meta")), AttentionMask.packed(meta))
        hidden.sum().backward()
    assert (largest.numel >= length * length) == has_mask


def test_documents_travel_with_their_tensor_only():
    documents = Documents.find(PACKED)
    moved = move_with_documents(PACKED, torch.device("meta"))
    known = documents_of(moved)
    assert (known.longest, known.one_per_row, known.cu_seqlens.shape) == (9, False, documents.cu_seqlens.shape)
    assert documents.cu_seqlens.tolist() == [0, 3, 12, 20, 21, 24]
    assert documents_of(moved[:1]) is None  # a meta tensor has no values to find them from
    assert documents_of(PACKED[:1]).cu_seqlens.tolist() == [0, 3, 12]
