"""Wrapped transformers models compute, train, save and generate as in transformers, or are rejected."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_runs import VOCABULARY, Rows, adapter_bytes, train, weight_bytes, weights
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers  # noqa: E402

from bumblebee import Bumblebee, Generator, HuggingFaceModel, SamplingParams, Tokenizer  # noqa: E402
from bumblebee.checkpoint.consolidate import consolidate  # noqa: E402
from bumblebee.checkpoint.merge import merge  # noqa: E402
from bumblebee.inference.placement.quantized_kernels import use_fast_kernels  # noqa: E402
from bumblebee.lora import logit_differences  # noqa: E402
from bumblebee.models.loading import load_model  # noqa: E402
from bumblebee.nn.quantized import QuantizedLinear  # noqa: E402
from bumblebee.verify.reference_loop import sample_indices

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
# What is special: learned positions and tied weights; norms elsewhere; windows and a scale of scores; a head with biases;
# scaled logits; other names in files.
COMPUTED = {
    "gpt2": ("GPT2", GPT2),
    "olmo2": ("Olmo2", SHAPE),
    "gemma3": ("Gemma3", SHAPE | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 20}),
    "phi": ("Phi", SHAPE),
    "granite": ("Granite", SHAPE | {"logits_scaling": 2.0, "attention_multiplier": 0.3}),
    "gpt_neox": ("GPTNeoX", SHAPE | {"num_key_value_heads": None}),
}
REPLACED = "attention cannot be replaced by ours"
REFUSED = {
    "bloom": (
        "Bloom",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "attention cannot be replaced by ours",
    ),
    "mamba": ("Mamba", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}, REPLACED),
    "gemma2": ("Gemma2", SHAPE | {"head_dim": 8}, "its attention uses softcap"),
    "olmoe": ("Olmoe", SHAPE, "transformers converts its weights"),
    "nemotron": ("Nemotron", SHAPE, "does not pass keyword arguments to its attention"),
}


def write(name: str, config: dict[str, Any], folder: Path) -> Path:
    """A folder of a model with random weights, large enough to make a difference."""
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    config = {key: value for key, value in config.items() if value is not None or key.endswith("_id")}
    made = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**config)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(made)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=COMPUTED, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(*COMPUTED[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(*COMPUTED["gpt2"], tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(*COMPUTED["olmo2"], tmp_path_factory.mktemp("olmo2"))


def hf(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def losses_of(lines: list[dict[str, float]]) -> list[float]:
    """Of the steps that had targets."""
    return [line["loss"] for line in lines if "loss" in line]


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * max(1.0, float(expected.abs().max())))


# -- computation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_losses_equal_transformers(folder: Path) -> None:
    ours, expected, ids = load_model(folder).eval(), hf(folder), tokens(2, 20)
    assert isinstance(ours, HuggingFaceModel)
    same(ours(ids), expected(ids).logits)
    labels = ids[:, 1:].masked_fill(ids[:, 1:] % 5 == 0, -100)
    losses = cross_entropy(expected(ids[:, :-1]).logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    same(ours(ids[:, :-1], labels=labels), losses)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = ours(torch.cat([ids[:1, :8], ids[1:, :12]], dim=1), position_ids=positions)
    same(packed[:, :8], expected(ids[:1, :8]).logits)
    same(packed[:, 8:], expected(ids[1:, :12]).logits)


@torch.no_grad()
def test_quantized_model_equals_its_dequantized_weights(folder: Path) -> None:
    quantized, ids = load_model(folder, quantize="int8").eval(), tokens(2, 12)
    assert any(isinstance(module, QuantizedLinear) for module in quantized.modules())
    dequantized = load_model(folder).eval()
    dequantized.load_state_dict(quantized.state_dict())
    use_fast_kernels(quantized)
    expected = dequantized(ids)
    # Gemma's embedding, which scales, is not quantized with its head; the reference has one table for both.
    error = 2e-2 if "Gemma3" in type(dequantized.wrapped[0]).__name__ else 1e-3
    torch.testing.assert_close(quantized(ids), expected, rtol=0, atol=error * float(expected.abs().max()))
    torch.testing.assert_close(quantized(ids, labels=ids), dequantized(ids, labels=ids), rtol=0, atol=0.1)


def test_gradients_are_those_of_transformers(folder: Path) -> None:
    ours, expected, ids = load_model(folder), hf(folder), tokens(2, 12)
    ours(ids[:, :-1], labels=ids[:, 1:]).sum().backward()
    cross_entropy(expected(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in ours.named_parameters():
        same(parameter.grad, gradients[name])


@torch.no_grad()
def test_cached_generation_equals_uncached_greedy(folder: Path) -> None:
    tokenizer = Tokenizer.train(["abc"], 259)
    generator, expected = Generator(load_model(folder), tokenizer, stop_ids=[63]), hf(folder)
    prompts = [tokens(1, length)[0].tolist() for length in (3, 17, 9)]
    outs = generator.generate(prompts, SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True))
    for prompt, out in zip(prompts, outs, strict=True):
        grown = list(prompt)
        for _ in range(12):
            grown.append(int(expected(torch.tensor([grown])).logits[0, -1].argmax()))
        assert out.token_ids == grown[len(prompt) :]


def test_a_saved_folder_is_one_of_transformers(folder: Path, tmp_path: Path) -> None:
    load_model(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    raw, before = (json.loads((place / "config.json").read_text()) for place in (tmp_path, folder))
    assert raw["torch_dtype"] == "bfloat16" and raw["architectures"] == before["architectures"]
    assert weights(tmp_path).keys() == weights(folder).keys()
    for name, tensor in weights(folder).items():
        assert torch.equal(weights(tmp_path)[name], tensor.bfloat16())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


# -- training --------------------------------------------------------------------------------------------------------------


def plain_loop(folder: Path, steps: int) -> list[float]:
    """Losses of a textbook loop over transformers' model."""
    model = hf(folder).train()
    named = list(model.named_parameters())
    decayed = [parameter for name, parameter in named if parameter.ndim > 1 and "wte" not in name and "wpe" not in name]
    others = [parameter for name, parameter in named if parameter.ndim == 1 or "wte" in name or "wpe" in name]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer, rows, losses = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1), Rows(), []
    rows.setup(0)
    for chosen in sample_indices(len(rows.train), 4, steps, 42):
        inputs, labels = (torch.stack(part) for part in zip(*(rows.train[index] for index in chosen), strict=True))
        if not (targets := int((labels != -100).sum())):
            continue
        loss = cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten(), reduction="sum") / targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_stage_trains_and_resumes_byte_identically(gpt2: Path, tmp_path: Path, stage: int) -> None:
    job = {"base": str(gpt2), "zero_stage": stage, "callbacks": {"save": ("Checkpoint", {"every": 3})}}
    losses = losses_of(train(tmp_path / "whole", **job))
    assert losses == pytest.approx(plain_loop(gpt2, 6), rel=1e-4)
    train(tmp_path / "part", resume=str(tmp_path / "whole" / "checkpoint-3"), **job)
    assert weight_bytes(tmp_path / "part") == weight_bytes(tmp_path / "whole")
    assert weights(tmp_path / "whole").keys() == weights(gpt2).keys()
    with torch.no_grad():
        same(load_model(tmp_path / "whole").eval()(tokens(1, 9)), hf(tmp_path / "whole")(tokens(1, 9)).logits)


def test_checkpointing_and_consolidation_change_nothing(gpt2: Path, tmp_path: Path) -> None:
    job = {"base": str(gpt2), "callbacks": {"save": ("Checkpoint", {"every": 3})}}
    train(tmp_path / "run", **job)
    consolidate(tmp_path / "run" / "checkpoint-3", tmp_path / "again", "auto")
    for name, tensor in weights(tmp_path / "run" / "checkpoint-3").items():
        assert torch.equal(weights(tmp_path / "again")[name], tensor)
    kept = ("architectures", "n_embd", "torch_dtype")
    configs = [json.loads((tmp_path / place / "config.json").read_text()) for place in ("run/checkpoint-3", "again")]
    assert [configs[0][name] for name in kept] == [configs[1][name] for name in kept]
    plain, saving, ids = load_model(gpt2), load_model(gpt2), tokens(2, 12)
    saving.checkpoint_activations(1)
    for model in (plain, saving):
        model.train()(ids[:, :-1], labels=ids[:, 1:]).sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_lora_trains_adapters_that_resume_and_merge(olmo2: Path, tmp_path: Path) -> None:
    job = {"base": str(olmo2), "lora": {"rank": 4, "alpha": 8}, "callbacks": {"save": ("Checkpoint", {"every": 3})}}
    losses = losses_of(train(tmp_path / "whole", **job))
    assert len(losses) >= 5 and weights(olmo2).keys().isdisjoint(load_file(tmp_path / "whole" / "adapter_model.safetensors"))
    train(tmp_path / "part", resume=str(tmp_path / "whole" / "checkpoint-3"), **job)
    assert adapter_bytes(tmp_path / "part") == adapter_bytes(tmp_path / "whole")
    merge(tmp_path / "whole", tmp_path / "merged")
    assert logit_differences(tmp_path / "merged", tmp_path / "whole")["float32"][0] < 1e-4
    ids = tokens(1, 9)
    with torch.no_grad():
        same(load_model(tmp_path / "whole").eval()(ids), hf(tmp_path / "merged")(ids).logits)


def test_dpo_begins_at_ln_2(olmo2: Path, tmp_path: Path) -> None:
    lines = train(tmp_path / "run", base=str(olmo2), data=("Pairs", {}), task="DPO", max_steps=3)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] != lines[0]["loss"]


# -- rejections ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_would_compute_otherwise_is_refused_by_name(name: str, tmp_path: Path) -> None:
    kind, config, why = REFUSED[name]
    write(kind, config, tmp_path)
    with pytest.raises(ValueError, match=why) as refused:
        load_model(tmp_path)(tokens(1, 4))
    assert kind in str(refused.value)


def test_code_in_a_folder_runs_only_where_that_is_asked_for(gpt2: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    raw = json.loads((gpt2 / "config.json").read_text())
    own = {"architectures": ["OwnModel"], "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(raw | own))
    (tmp_path / "model.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes())
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnConfig: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path)
    assert not ran.exists()
    with pytest.raises(AttributeError, match="OwnConfig"):  # that it ran is enough here
        load_model(tmp_path, trust_remote_code=True)
    assert ran.exists()


def test_an_architecture_that_is_not_ours_is_told_where_it_runs(gpt2: Path) -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*bumblebee\.HuggingFaceModel\.from_pretrained"):
        Bumblebee.from_pretrained(gpt2)
