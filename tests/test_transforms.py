"""Transforms change how a model is computed, not the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from bumblebee.tasks.language_modeling import LanguageModeling
from bumblebee.transforms import ActivationCheckpointing, Compile, Freeze


def loss_and_gradients(model: Bumblebee) -> tuple[float, dict[str, torch.Tensor]]:
    ids = torch.arange(60).reshape(2, 30) % model.config.vocab_size
    loss = model(ids[:, :-1], labels=ids[:, 1:]).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def seeded_model(tiny: Callable[..., Any], **changes: Any) -> Bumblebee:
    torch.manual_seed(0)
    return Bumblebee(tiny(num_hidden_layers=4, **changes))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_activation_checkpointing_keeps_gradients(tiny: Callable[..., Any], every: int) -> None:
    plain, saving = seeded_model(tiny), seeded_model(tiny)
    LanguageModeling(saving, transforms=[ActivationCheckpointing(every)])
    loss, gradients = loss_and_gradients(plain)
    other_loss, other_gradients = loss_and_gradients(saving)
    assert other_loss == loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize(("every", "computed_twice"), [(1, 4), (2, 2), (3, 2)])
def test_every_nth_block_is_recomputed(tiny: Callable[..., Any], every: int, computed_twice: int) -> None:
    model = seeded_model(tiny)
    ActivationCheckpointing(every)(model)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, args: calls.append(module))
    loss_and_gradients(model)
    assert len(calls) == 4 + computed_twice


def test_activation_checkpointing_does_not_change_generation(tiny: Callable[..., Any]) -> None:
    model = seeded_model(tiny).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids)
        ActivationCheckpointing()(model)
        assert torch.equal(model(ids), before)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; none is installed")
def test_compile_keeps_gradients_and_parameter_names(tiny: Callable[..., Any]) -> None:
    plain, compiled = seeded_model(tiny), seeded_model(tiny)
    LanguageModeling(compiled, transforms=[Compile()])
    assert list(compiled.state_dict()) == list(plain.state_dict())
    loss, gradients = loss_and_gradients(plain)
    other_loss, other_gradients = loss_and_gradients(compiled)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-4)


def test_dropout_is_off_in_eval_mode(tiny: Callable[..., Any]) -> None:
    dropping = {"attention_dropout": 0.3, "residual_dropout": 0.2, "embedding_dropout": 0.1}
    plain, model = seeded_model(tiny).eval(), seeded_model(tiny, **dropping)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert not torch.equal(model.train()(ids), model(ids)), "dropout draws new masks in each call"
        torch.testing.assert_close(model.eval()(ids), plain(ids), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["attention_dropout", "residual_dropout", "embedding_dropout"])
def test_each_dropout_changes_the_loss_in_training(tiny: Callable[..., Any], name: str) -> None:
    torch.manual_seed(1)
    plain, _ = loss_and_gradients(seeded_model(tiny).train())
    dropping, _ = loss_and_gradients(seeded_model(tiny, **{name: 0.3}).train())
    assert dropping != plain


def test_activation_checkpointing_reuses_dropout_masks(tiny: Callable[..., Any]) -> None:
    results = []
    for transforms in ([], [ActivationCheckpointing()]):
        model = seeded_model(tiny, attention_dropout=0.3, residual_dropout=0.2, embedding_dropout=0.1).train()
        LanguageModeling(model, transforms=transforms)
        torch.manual_seed(1)
        results.append(loss_and_gradients(model))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=0, atol=0)


def test_freeze_removes_gradients_of_matching_parameters(tiny: Callable[..., Any]) -> None:
    model = seeded_model(tiny)
    LanguageModeling(model, transforms=[Freeze(["embed_tokens", "layers.[01]."], train=["layernorm"])])
    _, gradients = loss_and_gradients(model)
    names = [name for name, _ in model.named_parameters()]
    frozen = [n for n in names if "embed" in n or (".0." in n or ".1." in n) and "layernorm" not in n]
    assert frozen and sorted(gradients) == sorted(set(names) - set(frozen))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["["], r"Freeze '\[' is not a regular expression"),
        (["k_porj"], "Freeze 'k_porj' matches no parameter; an example of a name is"),
        (["."], r"Freeze \['.'\] leaves no trainable parameter"),
    ],
)
def test_freeze_refuses_invalid_patterns(tiny: Callable[..., Any], patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Freeze(patterns)(seeded_model(tiny))


def test_transforms_refuse_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ActivationCheckpointing(0)
    with pytest.raises(ValueError, match="mode must be one of"):
        Compile("fast")
    with pytest.raises(ValueError, match="supports Bumblebee and HuggingFaceModel, got Linear"):
        ActivationCheckpointing()(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("lora_first", [True, False])
def test_activation_checkpointing_keeps_adapter_gradients(
    tiny: Callable[..., Any], tmp_path: Path, lora_first: bool, dora: bool
) -> None:
    seeded_model(tiny).save_pretrained(tmp_path)
    plain, saving = Bumblebee.from_pretrained(tmp_path), Bumblebee.from_pretrained(tmp_path)
    lora = LoRA(rank=4, dropout=0.2, dora=dora)
    LanguageModeling(plain, transforms=[lora])
    both = [lora, ActivationCheckpointing()]
    LanguageModeling(saving, transforms=both if lora_first else both[::-1])
    losses = []
    for model in (plain, saving):
        torch.manual_seed(1)  # a recomputed block must draw the same dropout mask
        losses.append(loss_and_gradients(model))
    assert losses[0][0] == losses[1][0] and len(losses[0][1]) == len(losses[1][1]) == 4 * 7 * (3 if dora else 2)
    for name, gradient in losses[0][1].items():
        torch.testing.assert_close(losses[1][1][name], gradient, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; none is installed")
def test_compile_keeps_gradients_and_router_metrics_of_moe(tiny: Callable[..., Any]) -> None:
    ids = torch.arange(60).reshape(2, 30)
    batch = {"input_ids": ids, "labels": ids + 1, "position_ids": torch.arange(30).expand(2, -1)}
    results = []
    for transforms in ([], [Compile()], [Compile(), ActivationCheckpointing()]):
        model = seeded_model(tiny, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0], router_z_loss_coef=0.1)
        task = LanguageModeling(model, transforms=transforms)
        counts = {name: float(count) for name, count in task.all_counts(batch).items()}
        task.total(task.all_losses(model, batch), counts).backward()
        results.append(({name: p.grad for name, p in model.named_parameters()}, task.metrics()))
    for gradients, metrics in results[1:]:
        assert metrics == pytest.approx(results[0][1], rel=1e-5)
        for name, gradient in results[0][0].items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; none is installed")
@pytest.mark.parametrize("lora_first", [True, False])
def test_compile_keeps_adapter_gradients(tiny: Callable[..., Any], tmp_path: Path, lora_first: bool) -> None:
    seeded_model(tiny).save_pretrained(tmp_path)
    plain, compiled = Bumblebee.from_pretrained(tmp_path), Bumblebee.from_pretrained(tmp_path)
    lora = LoRA(rank=4, dropout=0.0)
    LanguageModeling(plain, transforms=[lora])
    both = [lora, Compile()]
    LanguageModeling(compiled, transforms=both if lora_first else both[::-1])
    loss, gradients = loss_and_gradients(plain)
    other_loss, other_gradients = loss_and_gradients(compiled)
    assert other_loss == pytest.approx(loss, rel=1e-5) and list(gradients) == list(other_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-4)
