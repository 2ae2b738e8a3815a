"""Inside ``batch_invariant`` a token's result depends on the tokens before it only, bit for bit; outside nothing changes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from helpers.training_runs import VOCABULARY, small_model
from torch import Tensor
from torch.nn import functional as F

from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.batch_invariant import ROWS, attention, batch_invariant, product
from bumblebee.transforms import ActivationCheckpointing, Compile

LENGTHS = (1, 3, 16, 29)
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries, QK-norm, window": {
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "qk_norm": True, "sliding_window": 9,
    },
    "odd widths, biases": {"hidden_size": 36, "intermediate_size": 50, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    "mixture of experts": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "n_shared_experts": 1, "shared_expert_gate": True,
    },
    "LayerNorm, GELU": {"hidden_act": "gelu", "mlp_gated": False, "norm": "layernorm"},
    "tanh GELU, tied": {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
}  # fmt: skip


def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (length + 1,), generator=generator) for length in lengths]


def log_probs(model: Any, batch: list[Tensor], padding: int = 0) -> list[Tensor]:
    """Log-probabilities of the tokens of padded rows."""
    shape = len(batch), max(len(row) for row in batch) - 1 + padding
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    for at, row in enumerate(batch):
        ids[at, : len(row) - 1], labels[at, : len(row) - 1] = row[:-1], row[1:]
    out = -model(ids, position_ids=torch.arange(shape[1]).expand(shape), labels=labels)
    return [out[at, : len(row) - 1] for at, row in enumerate(batch)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_log_probabilities_do_not_depend_on_the_batch(changes, dtype):
    model = small_model(initializer_range=0.3, **changes).to(dtype)
    with batch_invariant(), torch.no_grad():
        alone = [log_probs(model, [row])[0] for row in rows()]
        reverse = log_probs(model, rows()[::-1])[::-1]
        for batch in (log_probs(model, rows(), padding=5), reverse, log_probs(model, rows() * 3)[4:8]):
            for one, other in zip(alone, batch, strict=True):
                assert torch.equal(one, other)
        logits = model(rows()[3][None, :-1])
        assert torch.equal(torch.log_softmax(logits, -1, dtype=torch.float32)[0].gather(1, rows()[3][1:, None])[:, 0], alone[3])


@pytest.mark.parametrize("inputs", [1, 8, 33, 64, 200])
def test_rows_of_a_product_do_not_depend_on_others(inputs):
    """Nor on where they are, on alignment, or on the number of threads."""
    generator = torch.Generator().manual_seed(inputs)
    for outputs in (1, 2, 8, 11, 16, 37, 300):
        x, weight = torch.randn(53, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
        expected, order = product(x, weight), torch.randperm(53, generator=generator)
        torch.testing.assert_close(expected, x @ weight.T, rtol=1e-4, atol=1e-4)
        assert torch.equal(product(x[order], weight), expected[order])
        assert torch.equal(product(x[5:8], weight), expected[5:8])
        unaligned = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(weight.shape)
        assert torch.equal(product(x[1:].clone(), unaligned), expected[1:])
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(product(x, weight), expected)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("window", [None, 30])
def test_attention_does_not_depend_on_queries_or_padding(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 150, heads, 20, generator=generator) for heads in (6, 2, 2))
    visible = torch.ones(1, 150, 150, dtype=torch.bool).tril()
    visible = visible if window is None else visible.triu(1 - window)
    whole = attention(q, k, v, visible)
    usual = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), visible[:, None], enable_gqa=True)
    torch.testing.assert_close(whole, usual.transpose(1, 2), rtol=1e-4, atol=1e-5)
    for first, last in ((0, 1), (63, 64), (64, 65), (100, 131), (149, 150)):
        part = attention(q[1:, first:last], k[1:, :last], v[1:, :last], visible[:, first:last, :last])
        assert torch.equal(part[0], whole[1, first:last])


@pytest.mark.parametrize("transforms", [[], [ActivationCheckpointing()]], ids=["stored", "recomputed"])
@pytest.mark.parametrize("changes", list(MODELS.values())[:3], ids=list(MODELS)[:3])
def test_gradients_are_the_usual_ones(changes, transforms):
    """Also of activations that are recomputed after the context has ended."""
    gradients = []
    for enabled in (False, True):
        model = small_model(**changes)
        for transform in transforms:
            transform(model)
        with batch_invariant(enabled):
            loss = torch.cat(log_probs(model.train(), rows())).sum()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_of_extreme_activations_are_finite():
    x = torch.tensor([-200.0, -1.0, 0.0, 1.0, 200.0], requires_grad=True)
    for function in (F.silu, F.gelu, torch.sigmoid):
        (expected,) = torch.autograd.grad(function(x).sum(), x)
        with batch_invariant():
            out = function(x)
        torch.testing.assert_close(out, function(x))
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


def test_nothing_changes_outside():
    model = small_model()
    before = log_probs(model, rows())
    with batch_invariant(), batch_invariant():
        inside = log_probs(model, rows())
    with batch_invariant(enabled=False):
        after = log_probs(model, rows())
    assert all(map(torch.equal, before, after))
    assert not all(map(torch.equal, before, inside))


@pytest.mark.parametrize(
    ("context", "changes", "message"),
    [
        (torch.autocast("cpu", torch.bfloat16), {}, "does not support autocast"),
        (nullcontext(), {"dtype": torch.float64}, "computes in fp32 or bf16 on a CPU, not in float64 on cpu"),
        (nullcontext(), {"attention_dropout": 0.1}, "does not support attention_dropout, which is 0.1"),
        (nullcontext(), {"positions": torch.tensor([[0, 1, 0, 1]])}, "does not support packed rows"),
        (nullcontext(), {"transform": Compile()}, "does not support compiled blocks"),
    ],
)  # fmt: skip
def test_what_is_not_batch_invariant_is_refused(context, changes, message):
    dtype, positions, transform = (changes.pop(name, None) for name in ("dtype", "positions", "transform"))
    model = small_model(**changes).to(dtype or torch.float32).train()
    if transform is not None:
        transform(model)
    with pytest.raises(ValueError, match=f"batch_invariant: {message}"), batch_invariant(), context:
        model(torch.zeros(1, 4, dtype=torch.int64), position_ids=positions)


def test_other_matrix_products_are_refused():
    x = torch.randn(2, ROWS, ROWS)
    einsum = partial(torch.einsum, "bij,bjk->bik")
    for function in (torch.matmul, einsum, lambda *inputs: F.scaled_dot_product_attention(*inputs, x)):
        with pytest.raises(ValueError, match="^batch_invariant: "), batch_invariant():
            function(x, x)
