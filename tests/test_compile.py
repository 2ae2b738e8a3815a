"""Compiled blocks: no graph breaks, few graphs for many lengths, and the results of plain ones. Dynamo's counters tell.

Most of these tests compile with ``aot_eager_decomp_partition``, which traces and partitions graphs but generates no code.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import attention_operators, training_runs
from helpers.training_runs import BlockUsedTwice, Rows, train
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from bumblebee.nn import attention_kernels
from bumblebee.nn.attention_kernels import AttentionMask
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.transforms import ActivationCheckpointing, Compile

TRANSFORMS = {
    "compiled": (Compile,),
    "recomputed": (ActivationCheckpointing, Compile),
    "attention kept": (Compile, partial(ActivationCheckpointing, keep_attention=True)),
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture
def traced(monkeypatch):
    """Trace without generating code, and start with empty caches and counters."""
    compile_ = torch.compile

    def trace(*args, mode=None, **options):
        return compile_(*args, **options) if mode is None else compile_(*args, backend="aot_eager_decomp_partition")

    monkeypatch.setattr(torch, "compile", trace)
    torch._dynamo.reset()
    counters.clear()


def assert_no_breaks(graphs: int) -> None:
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= graphs, counters


def losses_and_gradients(config, attention: str, transforms=()):
    """Of packed and unpacked batches of four lengths."""
    torch.manual_seed(0)
    task = LanguageModeling(Bumblebee(config, attention=attention), [make() for make in transforms])
    losses = []
    for length in (12, 9, 14, 11):
        for first in (4, length):
            ids = torch.arange(2 * (length + 1)).reshape(2, -1)
            positions = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(2, -1).contiguous()
            batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}
            loss = task.total(task.all_losses(task.model, batch), {name: 20.0 for name in ("loss", *task.all_counts(batch))})
            loss.backward()
            losses.append(loss.item())
    return losses, {name: parameter.grad for name, parameter in task.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "varlen", "flash", "naive"])
def test_no_graph_breaks_with_any_attention(attention, tiny, traced, monkeypatch):
    """A model with windows, QK-norm, a dense layer and one of experts; each kind of layer has at most two graphs a mask."""
    attention_operators.register_varlen()
    monkeypatch.setattr(attention_kernels, "problems", lambda kernel, dtype: [])
    monkeypatch.setitem(sys.modules, "flash_attn", attention_operators.FLASH_ATTN)
    config = tiny(
        qk_norm=True, sliding_window=6, layer_types=["full_attention", "sliding_attention"],
        num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0], router_z_loss_coef=0.1,
    )  # fmt: skip
    losses, gradients = losses_and_gradients(config, attention)
    other_losses, other_gradients = losses_and_gradients(config, attention, TRANSFORMS["attention kept"])
    assert_no_breaks(graphs=8)
    assert other_losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(other_gradients, gradients, rtol=1e-3, atol=1e-5)


class Packed(Rows):
    """Rows of two documents and of different lengths."""

    def collate(self, samples):
        length = 8 + len(self.seen) % 4
        self.seen.append(length)
        batch = {name: tensor[:, :length].contiguous() for name, tensor in super().collate(samples).items()}
        batch["position_ids"] = torch.cat([torch.arange(3), torch.arange(length - 3)]).expand(len(samples), -1).contiguous()
        return batch

    seen: list[int]

    def setup(self, seed):
        super().setup(seed)
        self.seen = []


class Transformed(LanguageModeling):
    def __init__(self, model, names=(), lora=False):
        model.source = Path("base")  # adapters name the folder of their model
        super().__init__(
            model, [*([LoRA(rank=4, dropout=0.0)] if lora else []), *(make() for make in TRANSFORMS.get(names, ()))]
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_graph_breaks_at_any_zero_stage(stage, tmp_path, traced, monkeypatch):
    monkeypatch.setattr(training_runs, "Packed", Packed, raising=False)
    monkeypatch.setattr(training_runs, "Transformed", Transformed, raising=False)

    def run(names, lora=False):
        task = ["Transformed", {"names": names, "lora": lora}]
        data = ["Packed", {"targets": [16]}]
        lines = train(tmp_path / f"{names} {lora}", zero_stage=stage, data=data, task=task, max_steps=3)
        return [value for line in lines for value in (line["loss"], line["grad_norm"])]

    assert run("attention kept") == pytest.approx(run(""), rel=1e-4)
    assert_no_breaks(graphs=2)
    if stage == 3:  # the input of the first block requires no gradient
        assert run("compiled", lora=True) == pytest.approx(run("", lora=True), rel=1e-4)
        assert not counters["graph_break"]


class CompiledTwice(BlockUsedTwice):
    def __init__(self, model):
        super().__init__(model)
        Compile()(model)


@pytest.mark.slow
def test_stage_3_refuses_a_compiled_block_used_twice(tmp_path, traced, monkeypatch):
    monkeypatch.setattr(training_runs, "CompiledTwice", CompiledTwice, raising=False)
    with pytest.raises(ValueError, match="Compile at ZeRO stage 3 supports one use of a block per backward pass"):
        train(tmp_path / "run", zero_stage=3, task="CompiledTwice", max_steps=1)


class Operators(TorchDispatchMode):
    """Counts attention operators and matrix products."""

    def __init__(self):
        super().__init__()
        self.attention = self.products = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += func.name() == "aten::_scaled_dot_product_flash_attention_for_cpu"
        self.products += func.name() in ("aten::mm", "aten::addmm")
        return func(*args, **(kwargs or {}))


def test_keep_attention_recomputes_all_but_attention(tiny):
    counts, gradients = {}, {}
    for name, transforms in (("none", ()), ("all", TRANSFORMS["recomputed"][:1]), ("kept", TRANSFORMS["attention kept"][1:])):
        torch.manual_seed(0)
        model = Bumblebee(tiny(num_hidden_layers=2), attention="sdpa")
        LanguageModeling(model, [make() for make in transforms])
        ids = torch.arange(40).view(2, 20)
        loss = model(ids, labels=ids + 1).sum()
        with Operators() as operators:
            loss.backward()
        counts[name] = operators.attention, operators.products
        gradients[name] = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.testing.assert_close(gradients[name], gradients["none"], rtol=0, atol=0)
    assert counts["none"][0] == counts["kept"][0] == 0 and counts["all"][0] == 2
    assert counts["none"][1] < counts["kept"][1] == counts["all"][1]


def saved_by_block(config, transforms) -> list[torch.Tensor]:
    """What autograd keeps of a block's forward pass, without its weights."""
    model = Bumblebee(config, attention="sdpa")
    LanguageModeling(model, [make() for make in transforms])
    x = torch.randn(2, 16, model.config.hidden_size, requires_grad=True)
    weights = {p.untyped_storage()._cdata for p in model.blocks[0].parameters()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = model.blocks[0](x, model.model.rotary(torch.arange(16).expand(2, -1)), AttentionMask())
    out.sum().backward()
    shared = [tensor for tensor in saved if tensor.untyped_storage()._cdata in weights]
    assert not transforms or all(tensor._base is None for tensor in shared), "a view of a weight that ZeRO-3 releases"
    return [tensor for tensor in saved if tensor.untyped_storage()._cdata not in weights]


def test_recomputing_blocks_save_less_and_no_views_of_weights(tiny, traced):
    config = tiny(num_hidden_layers=1, qk_norm=True)
    saved = {name: saved_by_block(config, transforms) for name, transforms in {"none": (), **TRANSFORMS}.items()}
    sizes = {name: sum(t.nbytes for t in tensors if t.is_floating_point()) for name, tensors in saved.items()}  # no RNG state
    assert sizes["recomputed"] < sizes["attention kept"] < sizes["compiled"] < sizes["none"]


@pytest.mark.slow
@needs_compiler
def test_compiled_block_fuses_norms_rope_and_swiglu(tiny):
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    saved_by_block(tiny(num_hidden_layers=1, qk_norm=True), TRANSFORMS["compiled"])
    assert_no_breaks(graphs=1)
    assert metrics.generated_kernel_count < 0.7 * metrics.ir_nodes_pre_fusion
