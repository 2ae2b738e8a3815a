"""Every attention kernel equals the formula, and the mask equals its definition.

The formula is written once more here with Python loops, so that a mistake in the mask, which all kernels share, is seen.
Shapes: B rows, T queries and keys, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.nn import attention_kernels
from bumblebee.nn.attention import Attention
from bumblebee.nn.attention_kernels import KERNELS, AttentionMask, flash, flash3, naive, sdpa, select_kernel
from bumblebee.nn.documents import Documents

B, T, H, D = 2, 7, 4, 8
PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]])  # the last two of row 0 are padding

MASKS = {"causal": AttentionMask, "packed": lambda: AttentionMask.packed(PACKED)}
WINDOWS = [None, 1, 3, 100]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(groups: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(groups)
    shapes = [(B, T, H, D), (B, T, H // groups, D), (B, T, H // groups, D)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def sees(mask: AttentionMask, row: int, query: int, key: int, window: int | None) -> bool:
    """The rule of the mask, for one pair."""
    same = mask.documents is None or bool(mask.documents[row, query] == mask.documents[row, key])
    return key <= query and same and (window is None or query - key < window)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask, window: int | None) -> torch.Tensor:
    """Softmax of scores over the keys that are seen, one query and one head at a time."""
    out = torch.zeros_like(q)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        group = h // (q.shape[2] // k.shape[2])
        seen = [s for s in range(k.shape[1]) if sees(mask, b, t, s, window)]
        weights = torch.softmax(torch.stack([q[b, t, h] @ k[b, s, group] / math.sqrt(q.shape[3]) for s in seen]), 0)
        out[b, t, h] = sum(weight * v[b, s, group] for weight, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", MASKS)
def test_naive_equals_the_formula_written_with_loops(layout, groups, window):
    make = MASKS[layout]
    q, k, v = inputs(groups)
    torch.testing.assert_close(naive(q, k, v, make(), window), by_hand(q, k, v, make(), window), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", MASKS)
def test_sdpa_equals_naive(layout, groups, dtype, window):
    make = MASKS[layout]
    q, k, v = inputs(groups, dtype)
    out = sdpa(q, k, v, make(), window)
    assert out.dtype == dtype
    torch.testing.assert_close(out, naive(q, k, v, make(), window), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", MASKS)
def test_sdpa_gradients_equal_naive_gradients(layout, window):
    make = MASKS[layout]

    def gradients(kernel):
        leaves = [x.requires_grad_() for x in inputs(2)]
        return torch.autograd.grad(kernel(*leaves, make(), window).square().sum(), leaves)

    torch.testing.assert_close(gradients(sdpa), gradients(naive), rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rows", [[[9, 7, 8, 1, 5]], [[4, 4, 4, 3], [5, 1, 5, 4]]], ids=["one row", "two rows"])
def test_short_documents_need_no_mask_of_the_whole_row(rows, window):
    positions = torch.tensor([[at for length in row for at in range(length)] for row in rows])
    shape = (*positions.shape, H, D)
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in range(3))
    k, v = k[:, :, :2], v[:, :, :2]

    def result(kernel, mask):
        out = kernel(q, k, v, mask, window)
        return out, *torch.autograd.grad(out.square().sum(), [q, k, v], retain_graph=True)

    mask = AttentionMask.packed(positions)
    assert mask.has_padded_form
    torch.testing.assert_close(result(sdpa, mask), result(naive, AttentionMask.packed(positions)), rtol=0, atol=1e-4)
    assert not mask._dense


def test_compiled_layers_get_the_mask_of_the_whole_row():
    """Padded rows would be constants of their graph."""
    mask = AttentionMask.packed(torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]]))
    assert mask.has_padded_form
    mask.prepare("sdpa", 9, torch.device("cpu"), [None, 2])
    assert mask._dense.keys() == {None, 2}


@pytest.mark.parametrize("row", [[20], [19, 1], [1] * 19 + [16]], ids=["one document", "a long one", "mostly padding"])
def test_documents_become_rows_only_if_that_saves_work(row):
    positions = torch.tensor([[at for length in row for at in range(length)]])
    assert not AttentionMask.packed(positions).has_padded_form


@pytest.mark.parametrize("kernel", ["naive", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_padding_rows_attend_to_themselves_and_give_no_nan(kernel, dtype):
    q, k, v = inputs(2, dtype)
    out = KERNELS[kernel](q, k, v, AttentionMask.packed(torch.zeros(B, T, dtype=torch.int64)))
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=2), rtol=0, atol=TOLERANCE[dtype])


@st.composite
def rows_of_documents(draw) -> list[list[int]]:
    """For each row the lengths of its documents; all rows are equally long."""
    length = draw(st.integers(1, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())))
        rows.append([end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)])
    return rows


@settings(deadline=None)
@given(rows_of_documents())
def test_packed_mask_is_causal_within_documents(rows):
    position_ids = torch.tensor([[place for length in row for place in range(length)] for row in rows])
    numbers = [[n for n, length in enumerate(row) for _ in range(length)] for row in rows]
    length = position_ids.shape[1]
    mask = AttentionMask.packed(position_ids)
    expected = [[[row[q] == row[k] and k <= q for k in range(length)] for q in range(length)] for row in numbers]
    dense = mask.dense(length, length, torch.device("cpu"))
    assert dense.expand(len(rows), -1, -1, -1)[:, 0].tolist() == expected


@settings(deadline=None)
@given(rows_of_documents())
def test_cu_seqlens_cover_the_documents_of_all_rows(rows):
    position_ids = torch.tensor([[place for length in row for place in range(length)] for row in rows])
    mask, numbers = AttentionMask.packed(position_ids), (position_ids == 0).cumsum(1)
    lengths = [length for row in rows for length in row]
    for documents in (Documents.find(position_ids), mask.boundaries, AttentionMask(numbers).found_boundaries()):
        if mask.is_causal and documents is None:
            continue
        assert documents.cu_seqlens.dtype == torch.int32 and documents.cu_seqlens[0] == 0
        assert documents.cu_seqlens.diff().tolist() == lengths and documents.longest == max(lengths)
        assert documents.one_per_row == mask.is_causal == (len(lengths) == len(rows))


def fake_flash_attn(q, k, v, causal, window_size, dropout_p, deterministic):
    """What flash_attn_func promises: position i sees those from i - left to i + right, all where it is -1."""
    left, right = window_size
    assert causal and right in (-1, 0) and dropout_p == 0 and not deterministic
    return naive(q, k, v, AttentionMask(), None if left < 0 else left + 1)


def fake_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, **options):
    """What flash_attn_varlen_func promises: the same inside each stretch of the flattened batch."""
    assert q.dim() == 3 and starts_q is starts_k and longest_q == longest_k == int(starts_q.diff().max())
    stretches = zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True)
    return torch.cat([fake_flash_attn(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0] for a, b in stretches])


@pytest.fixture
def fake_flash(monkeypatch):
    """A stand-in for the flash-attn package that follows its documentation, so that the wiring is tested without a GPU."""
    package = SimpleNamespace(flash_attn_func=fake_flash_attn, flash_attn_varlen_func=fake_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", MASKS)
def test_flash_hands_its_package_the_same_attention(layout, window, fake_flash):
    make = MASKS[layout]
    q, k, v = inputs(2)
    torch.testing.assert_close(flash(q, k, v, make(), window), naive(q, k, v, make(), window), rtol=0, atol=1e-5)


def fake_flash3(q, k, v, *, causal, window_size, deterministic):
    """What flash_attn_func of FlashAttention-3 promises; it knows no dropout. Its first releases return a tuple."""
    return fake_flash_attn(q, k, v, causal, window_size, 0.0, deterministic), torch.empty(0)


def fake_flash3_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal, window_size, deterministic):
    """What flash_attn_varlen_func of FlashAttention-3 promises."""
    options = {"causal": causal, "window_size": window_size, "dropout_p": 0.0, "deterministic": deterministic}
    return fake_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


@pytest.fixture
def fake_flash_3(monkeypatch):
    package = SimpleNamespace(flash_attn_func=fake_flash3, flash_attn_varlen_func=fake_flash3_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", MASKS)
def test_flash3_hands_its_package_the_same_attention(layout, window, fake_flash_3):
    make = MASKS[layout]
    q, k, v = inputs(2)
    torch.testing.assert_close(flash3(q, k, v, make(), window), naive(q, k, v, make(), window), rtol=0, atol=1e-5)


def test_auto_is_flash3_on_hopper_and_flash_on_others(two_gpus, fake_flash, fake_flash_3, monkeypatch):
    assert [select_kernel("auto", dtype) for dtype in (torch.bfloat16, torch.float32)] == ["flash3", "sdpa"]
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(attention_kernels, "_machine_problems", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=capability: of)
        assert select_kernel("auto", torch.bfloat16) == "flash"
    with pytest.raises(ValueError, match=r"'flash3' cannot run: it needs a GPU of compute capability 9.0 \(H100, H200\)$"):
        select_kernel("flash3", torch.bfloat16)


def test_flash3_computes_dropout_by_sdpa(monkeypatch):
    """Without the package: it would raise if it was asked."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    torch.manual_seed(0)
    assert flash3(*inputs(2), AttentionMask(), dropout=0.5).isfinite().all()


@pytest.mark.parametrize("kernel", ["naive", "sdpa"])
def test_attention_weights_are_dropped_and_the_others_scaled(kernel):
    """Averaged over many draws, dropout does not change the output."""
    q, k, v = inputs(2)
    torch.manual_seed(0)
    drawn = torch.stack([KERNELS[kernel](q, k, v, AttentionMask(), None, 0.3) for _ in range(2000)])
    plain = KERNELS[kernel](q, k, v, AttentionMask())
    assert (drawn[0] != plain).any()
    torch.testing.assert_close(drawn[:, :, 0].eq(0).all(-1).float().mean(), torch.tensor(0.3), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.mean(0), plain, rtol=0, atol=0.12)


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layout", MASKS)
@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash", "flash3"])
def test_gpu_kernels_equal_naive(kernel, layout, groups, window):
    if reasons := attention_kernels.problems(kernel, torch.bfloat16):
        pytest.skip("; ".join(reasons))
    make = MASKS[layout]
    q, k, v = (x.cuda() for x in inputs(groups, torch.bfloat16))
    mask = make()
    moved = AttentionMask(None if mask.documents is None else mask.documents.cuda())
    torch.testing.assert_close(KERNELS[kernel](q, k, v, moved, window), naive(q, k, v, moved, window), rtol=0, atol=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_flash_without_a_gpu_is_refused(dtype):
    named = "" if dtype == torch.bfloat16 else r"; it computes in bf16 or fp16, not in float32"
    with pytest.raises(ValueError, match=rf"'flash' cannot run: the flash-attn package .*; no GPU is visible{named}$"):
        select_kernel("flash", dtype)


def test_flash_is_refused_for_what_is_missing_only(two_gpus, fake_flash):
    assert [select_kernel(name, dtype) for name in ("flash", "auto") for dtype in (torch.float16, torch.bfloat16, None)] == [
        "flash"
    ] * 6
    assert select_kernel("auto", torch.float32) == "sdpa"
    with pytest.raises(ValueError, match=r"^attention 'flash' cannot run: it computes in bf16 or fp16, not in float32$"):
        select_kernel("flash", torch.float32)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"flash_attn/cute/__init__.py": ""}, "module 'flash_attn' has no attribute 'flash_attn_func'"),  # flash-attn-4 alone
        ({"flash_attn/__init__.py": "raise ImportError('undefined symbol: _ZN3c10')"}, "undefined symbol: _ZN3c10"),
        ({"flash_attn/__init__.py": "import flash_attn_2_cuda"}, "No module named 'flash_attn_2_cuda'"),
    ],
    ids=["namespace", "other build", "no extension"],
)
def test_flash_that_cannot_be_imported_is_not_selected(files, reason, two_gpus, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert select_kernel("auto", torch.bfloat16) == "varlen"
    with pytest.raises(ValueError, match=rf"'flash' cannot run: the flash-attn package cannot be imported: {reason}"):
        select_kernel("flash", torch.bfloat16)


def test_flash_is_imported_once_and_not_for_gpus_before_the_a100(two_gpus, fake_flash, monkeypatch):
    tries: list[None] = []
    monkeypatch.setattr(attention_kernels, "_import_problems", lambda name: tries.append(name) or [])
    assert [select_kernel("auto", torch.bfloat16) for _ in range(3)] == ["flash3"] * 3 and tries == [
        "flash3", "flash", "varlen",
    ]  # fmt: skip
    monkeypatch.setattr(attention_kernels, "_machine_problems", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert select_kernel("auto", torch.float16) == "sdpa"


def test_varlen_of_an_older_torch_is_not_selected(two_gpus, monkeypatch):
    """torch 2.11's has neither windows nor grouped heads."""
    older = SimpleNamespace(varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", older)
    monkeypatch.setattr(attention_kernels, "find_spec", lambda name: True)
    assert select_kernel("auto", torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="torch is too old: its varlen_attn has no enable_gqa, window_size$"):
        select_kernel("varlen", torch.bfloat16)


def test_auto_is_the_best_kernel_that_can_run(two_gpus):
    assert [select_kernel("auto", dtype) for dtype in (torch.bfloat16, torch.float16)] == ["varlen"] * 2  # without flash-attn
    assert select_kernel("auto", torch.float32) == "sdpa"
    with pytest.raises(ValueError, match=r"^attention 'varlen' cannot run: it computes in bf16 or fp16, not in float32$"):
        select_kernel("varlen", torch.float32)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown attention 'flsh'; available: auto, naive, sdpa, varlen, flash, flash3"):
        select_kernel("flsh", torch.float32)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), st.integers(1, 9))
def test_the_dense_mask_of_a_plain_window_is_lower_triangular(queries, keys):
    dense = AttentionMask().dense(queries, keys, torch.device("cpu"))
    assert dense[0, 0].tolist() == [[k <= q for k in range(keys)] for q in range(queries)]


def test_attention_of_two_kernels_is_the_same_module_otherwise():
    torch.manual_seed(0)
    modules = [Attention(32, H, 2, D, bias=True, output_bias=True, kernel=kernel) for kernel in ("naive", "sdpa")]
    modules[1].load_state_dict(modules[0].state_dict())
    x, ones = torch.randn(B, T, 32), torch.ones(B, T, 1, D // 2)
    outs = [module(x, (ones, torch.zeros_like(ones)), AttentionMask()) for module in modules]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)
