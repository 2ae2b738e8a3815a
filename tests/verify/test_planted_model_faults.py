"""The model check of ``bumblebee verify`` detects faults of the model itself, and says what to distrust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bumblebee import Bumblebee, BumblebeeConfig
from bumblebee.checkpoint.families import config_json as families
from bumblebee.nn import attention, attention_kernels, mlp, moe, norm, rope, router_losses
from bumblebee.tasks.task import Task
from bumblebee.verify import check
from bumblebee.verify.check_result import CheckResult
from bumblebee.verify.checks import model_check
from bumblebee.verify.context import Context
from bumblebee.verify.small_model import FAMILY_CONFIGS
from bumblebee.verify.subject import Subject
from bumblebee.verify.verify_options import VerifyOptions
from bumblebee.verify.verify_report import verdict

pytestmark = pytest.mark.slow

Patch = pytest.MonkeyPatch


def run_check(folder: Path, config: BumblebeeConfig | None, model_class: type[Bumblebee] = Bumblebee) -> CheckResult:
    return model_check.run(Context(VerifyOptions(), torch.device("cpu"), folder, Subject(config, model_class)))


def wrap(patch: Patch, owner: object, name: str, change: Callable) -> None:
    """Replace a function by ``change(original, *args, **kwargs)``."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def built(**changes: object) -> Callable[[Patch], None]:
    """The model is built as if its config said something else."""

    def fault(patch: Patch) -> None:
        def build(original, self, *args):
            config, self.config = self.config, replace(self.config, **changes)
            try:
                return original(self, *args)
            finally:
                self.config = config

        wrap(patch, Bumblebee, "build_decoder", build)

    return fault


def rotary_sign(patch: Patch) -> None:
    wrap(patch, attention, "apply_rotary", lambda original, x, cos, sin: original(x, cos, -sin))


def keys_not_rotated(patch: Patch) -> None:
    wrap(patch, attention, "apply_rotary", lambda original, x, cos, sin: x if x.shape[2] == 2 else original(x, cos, sin))


def gelu_for_silu(patch: Patch) -> None:
    patch.setitem(mlp.ACTIVATIONS, "silu", F.gelu)


def tanh_gelu(patch: Patch) -> None:
    patch.setitem(mlp.ACTIVATIONS, "gelu", lambda x: F.gelu(x, approximate="tanh"))


def norm_without_epsilon(patch: Patch) -> None:
    wrap(patch, norm.RMSNorm, "__init__", lambda original, self, size, eps: original(self, size, eps=0.0))


def norm_subtracts_mean(patch: Patch) -> None:
    wrap(patch, norm.RMSNorm, "forward", lambda original, self, x: original(self, x - x.mean(-1, keepdim=True)))


def head_untied(patch: Patch) -> None:
    patch.setattr(Bumblebee, "tie_weights", lambda self: None)


def head_copied(patch: Patch) -> None:
    """The same values, but the gradient of the head is lost: detached at each pass."""

    def tie(self):
        del self.lm_head.weight
        self.lm_head.weight = None
        self.lm_head.register_forward_pre_hook(
            lambda module, args: module.__dict__.__setitem__("weight", self.model.embed_tokens.weight.detach())
        )

    patch.setattr(Bumblebee, "tie_weights", tie)


def mixed_heads(patch: Patch) -> None:
    """Query heads h, h + K, h + 2K share a key head, instead of neighbours."""
    for name in ("sdpa", "naive"):

        def wrong(q, k, v, *args, kernel=attention_kernels.KERNELS[name]):
            group = q.shape[2] // k.shape[2]
            return kernel(q, k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1), *args)

        patch.setitem(attention_kernels.KERNELS, name, wrong)


def unscaled_scores(patch: Patch) -> None:
    kernel = attention_kernels.KERNELS["sdpa"]
    patch.setitem(attention_kernels.KERNELS, "sdpa", lambda q, *args: kernel(q * q.shape[-1] ** 0.5, *args))


def documents_not_separated(patch: Patch) -> None:
    patch.setattr(attention_kernels.AttentionMask, "packed", classmethod(lambda cls, position_ids: cls()))


def softcapped_logits(patch: Patch) -> None:
    wrap(patch, nn.Linear, "forward", lambda original, self, x: 30 * torch.tanh(original(self, x) / 30))


def embeddings_scaled(patch: Patch) -> None:
    wrap(patch, nn.Embedding, "forward", lambda original, self, x: original(self, x) * 8)


def router_loss_doubled(patch: Patch) -> None:
    def wrong(original, self, *args):
        original(self, *args)
        self.weights = {name: 2 * weight for name, weight in self.weights.items()}

    wrap(patch, router_losses.RouterLosses, "__init__", wrong)


def router_loss_ignored(patch: Patch) -> None:
    total = Task.total
    patch.setattr(Task, "total", lambda self, losses, counts: total(self, {"loss": losses["loss"]}, counts))


def z_loss_not_squared(patch: Patch) -> None:
    patch.setattr(router_losses, "z_loss", lambda logits, counted: logits.logsumexp(-1) * counted)


def router_counts_padding(patch: Patch) -> None:
    def wrong(original, logits, experts, counted):
        return original(logits, experts, torch.ones_like(counted))

    wrap(patch, router_losses, "sequence_balance_loss", wrong)


def balance_without_gradient(patch: Patch) -> None:
    wrap(patch, router_losses, "sequence_balance_loss", lambda original, *args: original(*args).detach())


def experts_renormalized(patch: Patch) -> None:
    def wrong(original, self, x):
        routing = original(self, x)
        return routing._replace(weights=routing.weights / routing.weights.sum(-1, keepdim=True))

    wrap(patch, moe.Router, "forward", wrong)


def shared_gate_without_sigmoid(patch: Patch) -> None:
    patch.setattr(torch.Tensor, "sigmoid", lambda x: x)


def rope_theta_ignored(patch: Patch) -> None:
    wrap(patch, rope, "rotary_frequencies", lambda original, dim, theta: original(dim, 10_000.0))


FAULTS = [
    ("Qwen2", rotary_sign, "logits"),
    ("Qwen2", keys_not_rotated, "logits"),
    ("Qwen2", gelu_for_silu, "logits"),
    ("Qwen2", norm_without_epsilon, "logits"),
    ("Qwen2", built(rms_norm_eps=1.1e-6), "logits"),
    ("Qwen2", built(rms_norm_eps=1e-5), "logits"),
    ("Qwen2", norm_subtracts_mean, "logits"),
    ("Qwen2", head_untied, "tensors missing, unexpected or misshapen"),
    ("Qwen2", head_copied, "gradient of the loss"),
    ("Qwen2", mixed_heads, "logits"),
    ("Qwen2", unscaled_scores, "logits"),
    ("Qwen2", rope_theta_ignored, "logits"),
    ("Qwen2", documents_not_separated, "packed logits"),
    ("Qwen2", softcapped_logits, "logits"),
    ("Qwen2", embeddings_scaled, "logits"),
    ("Qwen2", built(attention_bias=False), "tensors missing, unexpected or misshapen"),
    ("Llama 3.1", built(rope_scaling=None), "logits"),
    ("Qwen3 with windows", built(qk_norm=False), "tensors missing, unexpected or misshapen"),
    ("Qwen3 with windows", built(sliding_window=11), "logits"),
    ("Qwen3 with windows", built(layer_types=None), "logits"),
    ("GLM-4", built(rope_interleaved=False), "logits"),
    ("GLM-4", built(partial_rotary_factor=1.0), "logits"),
    ("GLM-4", built(post_norms=False), "tensors missing, unexpected or misshapen"),
    ("Qwen2-MoE", router_loss_doubled, "router losses"),
    ("Qwen2-MoE", router_loss_ignored, "router losses"),
    ("Qwen2-MoE", z_loss_not_squared, "router losses"),
    ("Qwen2-MoE", router_counts_padding, "router losses"),
    ("Qwen2-MoE", balance_without_gradient, "gradient of the router losses"),
    ("Qwen2-MoE", experts_renormalized, "logits"),
    ("Qwen2-MoE", shared_gate_without_sigmoid, "logits"),
    ("layer norm and plain MLP", built(mlp_bias=False), "tensors missing, unexpected or misshapen"),
    ("layer norm and plain MLP", tanh_gelu, "logits"),
]


@pytest.mark.parametrize(
    ("family", "fault", "measurement"),
    FAULTS,
    ids=[f"{n}-{fault.__name__}" for n, (_, fault, _) in enumerate(FAULTS)],
)
def test_planted_fault_is_detected_and_named(family, fault, measurement, tmp_path, monkeypatch):
    monkeypatch.setattr(model_check, "load_unmodified", lambda folder: None)  # the formulas alone detect it
    fault(monkeypatch)
    result = run_check(tmp_path, FAMILY_CONFIGS[family])
    assert measurement in [each.name for each in result.measurements if not each.passed], result
    line = verdict([(check.MODEL, result)])
    assert line.startswith("FAIL model: the model does not compute what its config says") and measurement in line
    assert "models trained with these options cannot be trusted" in line


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
OTHERS = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 4096},
    "yarn": {"rope_scaling": YARN, "rope_theta": 1e4},
    "yarn with mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False}},
    "one key head": {"num_key_value_heads": 1, "head_dim": 12, "norm": "layernorm", "qk_norm": True},
    "relu2": {"hidden_act": "relu2", "mlp_gated": False, "rms_norm_eps": 1e-3},
    "gelu": {"attention_output_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False},
    "Mixtral": {"num_experts": 5, "intermediate_size": 48, "attention_bias": False, "sliding_window": 4096},
    "balanced by bias": {
        "num_experts": 4,
        "router_bias_update_rate": 0.1,
        "router_balance_loss": "batch",
        "router_aux_loss_coef": 1,
    },
    "windows above": {
        "sliding_window": 4096,
        "num_hidden_layers": 40,
        "layer_types": ["full_attention"] * 30 + ["sliding_attention"] * 10,
    },
    "learned dropout": {"attention_dropout": 0.1, "residual_dropout": 0.1, "rms_norm_eps": 0.0},
}


@pytest.mark.parametrize("preset", ["7b", "tiny-moe"])
def test_presets_pass(preset, tmp_path):
    result = run_check(tmp_path, BumblebeeConfig.preset(preset))
    assert result.passed and result.measurements, result


def test_other_options_pass_and_stay_below_half_the_bounds(tmp_path):
    for name, changes in OTHERS.items():
        folder = tmp_path / name
        folder.mkdir()
        result = run_check(folder, BumblebeeConfig(**changes))
        assert all(each.value <= 0.5 * each.bound for each in result.measurements), (name, result)


def test_all_families_agree_with_formulas_and_transformers(tmp_path):
    result = run_check(tmp_path, None)
    assert all(each.value <= 0.5 * each.bound for each in result.measurements), result
    names = [each.name for each in result.measurements]
    assert "gradient of transformers" in names and "packed logits of transformers" in names
    assert "layer norm and plain MLP: transformers has no such architecture" in result.note


def test_wrong_config_json_is_detected_through_transformers(tmp_path, monkeypatch):
    """The formulas agree, but another program reads another epsilon from the model's folder."""
    wrap(monkeypatch, families, "_write", lambda original, *args: {**original(*args), "rms_norm_eps": 1e-5})
    monkeypatch.setattr(families, "_expresses", lambda family, config: family.architecture == "Qwen2ForCausalLM")
    result = run_check(tmp_path, BumblebeeConfig())
    assert {each.name for each in result.measurements if not each.passed} == {
        "logits of transformers", "packed logits of transformers", "gradient of transformers"
    }  # fmt: skip


class LearnedPositions(Bumblebee):
    """As in docs/research.md."""

    def build_positions(self) -> nn.Module:
        return nn.Embedding(self.config.max_position_embeddings, self.config.hidden_size)


class Leaky(Bumblebee):
    """Sees the next token."""

    def forward(self, input_ids, *args, **kwargs):
        return super().forward(input_ids, *args, **kwargs) + super().forward(input_ids.roll(-1, 1), *args, **kwargs)


def test_properties_of_a_subclass_are_checked(tmp_path, monkeypatch):
    result = run_check(tmp_path, BumblebeeConfig(), LearnedPositions)
    assert result.passed and "LearnedPositions computes something of its own" in result.note
    assert not run_check(tmp_path, BumblebeeConfig(), Leaky).passed
    documents_not_separated(monkeypatch)
    result = run_check(tmp_path, BumblebeeConfig(), LearnedPositions)
    assert [each.name for each in result.measurements if not each.passed] == ["packed documents"]
