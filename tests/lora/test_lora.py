"""LoRA: what it trains and saves, that adapters are compatible with PEFT, and merging."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"

from bumblebee import Bumblebee  # noqa: E402
from bumblebee.lora import LoRA, adapters_off, attach, has_adapters  # noqa: E402
from bumblebee.lora.targets import ALL_LINEAR  # noqa: E402

IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "dora rslora": {"dora": True, "rslora": True, "targets": ["q_proj", "down_proj"]},
    "pattern": {"targets": r".*layers\.1\..*[vo]_proj"},
}


def wide(model: torch.nn.Module, only_trained: bool = False) -> None:
    """Fill all parameters, or the trainable ones, with random numbers, so that every part has an effect."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only_trained:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    torch.manual_seed(0)
    model = Bumblebee(tiny(vocab_size=96, tie_word_embeddings=request.param, eos_token_id=2))
    wide(model)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tied head, for tests that do not depend on it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tied")
    Bumblebee(tiny(vocab_size=96, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def adapted(base: Path, **options: Any) -> Bumblebee:
    """A model with nonzero adapters."""
    model = Bumblebee.from_pretrained(base)
    LoRA(**{"rank": 4, "alpha": 8, "dropout": 0.0, **options})(model)
    wide(model, only_trained=True)
    return model


def same(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 2e-6) -> None:
    largest = max(1.0, float(reference.abs().max()))  # rounding errors scale with the logits
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * largest)


# -- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapter_is_identity_and_rest_is_frozen(base: Path, dora: bool) -> None:
    model = Bumblebee.from_pretrained(base)
    before = model(IDS)
    LoRA(rank=4, dora=dora)(model)
    same(model.eval()(IDS), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == set(ALL_LINEAR)  # and not the head
    assert len(trained) == 2 * 7 * (3 if dora else 2)


def test_initial_adapter_depends_only_on_seed(tied: Path) -> None:
    def start(seed: int, draws: int, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        model = Bumblebee.from_pretrained(tied, dtype=dtype)
        torch.manual_seed(seed)
        torch.rand(draws)
        LoRA(rank=4)(model)
        return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}

    first, again, other = start(1, 0), start(1, 5, torch.bfloat16), start(2, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in first:
        if "lora_A" in name:
            assert not torch.equal(first[name], other[name])
            bound = first[name].shape[1] ** -0.5
            assert 0.8 * bound < first[name].abs().max() <= bound  # like nn.Linear
        else:
            assert not first[name].any()


def test_adapters_off_gives_the_base_model(base: Path) -> None:
    plain, model = Bumblebee.from_pretrained(base), adapted(base)
    assert has_adapters(model) and not has_adapters(plain)
    with_them = model(IDS)
    with adapters_off(model):
        assert torch.equal(model(IDS), plain(IDS))
        with adapters_off(model):
            pass
        assert torch.equal(model(IDS), plain(IDS))  # leaving a nested context does not enable them
    assert torch.equal(model(IDS), with_them) and not torch.equal(with_them, plain(IDS))
    with pytest.raises(ValueError, match="the model has no LoRA adapters to switch off"), adapters_off(plain):
        pass


# -- PEFT ----------------------------------------------------------------------------------------------------------------


def reference(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_adapters(base: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    model = adapted(base, **KINDS[kind])
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
    }  # fmt: skip
    same(PeftModel.from_pretrained(reference(base), tmp_path / "adapter").eval()(IDS).logits, model(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_adapters_load_merged_and_attached(base: Path, tmp_path: Path, kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    options = {"targets": list(ALL_LINEAR), **KINDS[kind]}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=options["targets"], use_dora="dora" in options, use_rslora="rslora" in options,
        task_type="CAUSAL_LM", rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 3},
    )  # fmt: skip
    model = get_peft_model(reference(base), config)
    wide(model, only_trained=True)
    model.save_pretrained(tmp_path)
    expected = model.eval()(IDS).logits
    same(Bumblebee.from_pretrained(tmp_path)(IDS), expected)
    beside = Bumblebee.from_pretrained(base)
    attach(beside, tmp_path)
    same(beside.eval()(IDS), expected)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_merge_is_in_fp32_and_cast_once(tied: Path, tmp_path: Path, kind: str) -> None:
    """Equals PEFT's merge in fp32; its merge in bf16 is less exact."""
    Bumblebee.from_pretrained(tied, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", **KINDS[kind])
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    merged = PeftModel.from_pretrained(reference(tmp_path / "base"), tmp_path / "adapter").merge_and_unload().state_dict()
    ours = Bumblebee.from_pretrained(tmp_path / "adapter").state_dict()
    in_fp32 = Bumblebee.from_pretrained(tmp_path / "adapter", dtype=torch.float32).state_dict()
    for name, weight in ours.items():
        assert weight.dtype == torch.bfloat16
        same(in_fp32[name], merged[name], 1e-6)
        assert torch.equal(weight, in_fp32[name].bfloat16()), name


def test_chained_adapters_are_summed(base: Path, tmp_path: Path) -> None:
    first = adapted(base)
    first.save_pretrained(tmp_path / "first")
    second = adapted(tmp_path / "first", dora=True, rank=2)
    second.save_pretrained(tmp_path / "second")
    named = json.loads((tmp_path / "second" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((tmp_path / "first").resolve())
    same(Bumblebee.from_pretrained(tmp_path / "second")(IDS), second(IDS))
    with adapters_off(second):
        same(second(IDS), first(IDS))


def test_complete_model_takes_precedence_over_adapter(tied: Path, tmp_path: Path) -> None:
    """Some tools write the adapter's config next to the merged weights."""
    model = adapted(tied)
    model.save_pretrained(tmp_path / "adapter")
    merged = Bumblebee.from_pretrained(tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "adapter")
    assert torch.equal(Bumblebee.from_pretrained(tmp_path / "adapter")(IDS), merged(IDS))


def test_the_base_is_found_from_another_folder(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Bumblebee(tiny(vocab_size=96)).save_pretrained("base")
    model = adapted(Path("base"))
    model.save_pretrained("adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    same(Bumblebee.from_pretrained("../adapter")(IDS), model(IDS))


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"targets": []}, "targets must be all-linear, a list of names or a regular expression, got an empty value"),
        ({"targets": ["q_proj", "query"]}, "targets: 'query' matches no layer; available are down_proj, .* as in model"),
        ({"targets": "query"}, "targets: 'query' matches no layer; available are .*gate_proj"),
        ({"targets": ["lm_head"]}, "targets: 'lm_head' matches lm_head, which cannot have an adapter; available are .*up_proj"),
        ({"targets": ".*"}, "targets: '.*' matches lm_head, which cannot have an adapter"),
        ({"targets": "(q_proj"}, r"targets: '\(q_proj' is not a valid regular expression"),
    ],
)  # fmt: skip
def test_invalid_options_are_refused(tied: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**options)(Bumblebee.from_pretrained(tied))


def test_new_model_and_second_adapter_are_refused(tied: Path, tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="LoRA needs a model loaded from a folder"):
        LoRA()(Bumblebee(tiny()))
    with pytest.raises(ValueError, match="the model already has LoRA adapters; list LoRA once"):
        LoRA()(adapted(tied))


@pytest.fixture
def saved(tied: Path, tmp_path: Path) -> Path:
    """An adapter folder for tests to damage."""
    adapted(tied, rank=2).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base_model_name_or_path": "/no/where"},
            "names a base model that has moved: folder not found: /no/where; .* --base FOLDER",
        ),
        ({"base_model_name_or_path": None}, "adapter_config.json names no base model"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; only 'LORA' is supported"),
        ({"lora_alpha": None}, "has lora_alpha None; expected a number"),
        ({"bias": "all"}, "has bias 'all', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\], which is not supported"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa', which changes the base's weights"),
        ({"use_dora": True}, "do not match adapter_config.json: lora_magnitude_vector"),
    ],
)
def test_unsupported_adapter_settings_are_refused(saved: Path, settings: dict[str, Any], message: str) -> None:
    change(saved, **settings)
    with pytest.raises(ValueError, match=message) as error:
        Bumblebee.from_pretrained(saved)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


def test_adapter_cycle_is_refused(saved: Path, tied: Path, tmp_path: Path) -> None:
    adapted(saved).save_pretrained(tmp_path / "other")
    change(saved, base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="name each other in a cycle: .*adapter -> .*other -> .*adapter"):
        Bumblebee.from_pretrained(saved)


def test_adapter_of_another_model_is_refused(saved: Path, tiny: Callable[..., Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"hidden_size": 64}, r"has B \[.*\] and A \[.*\], .* weight \[.*\]: the adapter belongs to a model of another size"),
        ({"num_hidden_layers": 1}, "7 updates match no weight of the base model, such as model.layers.1.mlp.down_proj"),
    ):
        Bumblebee(tiny(vocab_size=96, **changes)).save_pretrained(tmp_path / message[:5])
        change(saved, base_model_name_or_path=str(tmp_path / message[:5]))
        with pytest.raises(ValueError, match=message):
            Bumblebee.from_pretrained(saved)


def test_bad_adapter_weights_are_refused(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2)}, file)
    with pytest.raises(
        ValueError, match="has base_model.model.lm_head.weight, which is not supported: it is not an update of a linear layer"
    ):
        Bumblebee.from_pretrained(saved)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged or not a safetensors file"):
        Bumblebee.from_pretrained(saved)
    file.unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; .* bumblebee consolidate"):
        Bumblebee.from_pretrained(saved)
    (saved / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle file, which can run code"):
        Bumblebee.from_pretrained(saved)


def test_adapter_of_tied_head_is_refused(tied: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    shutil.copytree(tied, tmp_path / "base")
    weights = load_file(tied / "model.safetensors")
    save_file({**weights, "lm_head.weight": torch.zeros(96, 32)}, tmp_path / "base" / "model.safetensors")
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(reference(tied), config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    change(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="1 updates match no weight of the base model, such as lm_head"):
        Bumblebee.from_pretrained(tmp_path / "adapter")
