"""Incomplete, damaged or mismatched folders are refused with an error that names the file, key or shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bumblebee import Bumblebee
from bumblebee.checkpoint.weight_files import INDEX, SINGLE

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """The same model in a single file and in shards."""
    root = tmp_path_factory.mktemp("saved")
    model = Bumblebee(tiny(vocab_size=64))
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "shards", max_shard_size="20KB")
    return root


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "single", tmp_path / "single"))


@pytest.fixture
def shards(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "shards", tmp_path / "shards"))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        Bumblebee.from_pretrained(folder)
    return str(caught.value)


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set or delete tensors of model.safetensors."""
    tensors = {key: value for key, value in {**load_file(folder / SINGLE), **changes}.items() if value is not None}
    save_file(tensors, folder / SINGLE)


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_missing_key_is_named(single):
    change_weights(single, **{NORM: None})
    assert refusal(single) == f"the weights in {single} do not match the model: 1 missing key: {NORM}"


def test_unexpected_key_is_named(single):
    change_weights(single, **{"model.extra": torch.ones(2)})
    assert refusal(single) == f"the weights in {single} do not match the model: 1 unexpected key: model.extra"


def test_missing_and_unexpected_keys_are_counted(single):
    change_weights(single, **{NORM: None, "a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1), "d": torch.ones(1)})
    assert refusal(single).endswith(f"1 missing key: {NORM}; 4 unexpected keys: a, b, c")


def test_missing_untied_head_is_named(single):
    change_config(single, tie_word_embeddings=False)
    assert "1 missing key: lm_head.weight" in refusal(single)


def test_wrong_shape_is_named_with_both_shapes(single):
    change_weights(single, **{NORM: torch.ones(7)})
    assert refusal(single) == f"{single}: {NORM} has shape [7], expected [32] from config.json"


def test_pickled_weights_are_refused_by_default(single):
    (single / SINGLE).rename(single / "pytorch_model.bin")
    assert f"{single} has no {SINGLE}" in refusal(single)
    assert "pytorch_model.bin is a pickle file, which can run code" in refusal(single)


class Code:
    """Code that unpickling would run."""

    def __reduce__(self) -> tuple:
        return print, ("run!",)


def test_pickled_weights_load_with_allow_pickle(single):
    weights = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    for legacy in (False, True):
        torch.save(weights, single / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        model = Bumblebee.from_pretrained(single, allow_pickle=True)
        torch.testing.assert_close(model.state_dict()[NORM], weights[NORM], rtol=0, atol=0)


def test_pickled_shards_load_with_allow_pickle(single):
    weights = load_file(single / SINGLE)
    (single / SINGLE).unlink()
    files = {key: f"pytorch_model-{number % 2 + 1:05d}-of-00002.bin" for number, key in enumerate(weights)}
    for file in set(files.values()):
        torch.save({key: weights[key] for key in weights if files[key] == file}, single / file)
    (single / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert "is a pickle file" in refusal(single)
    assert Bumblebee.from_pretrained(single, allow_pickle=True).num_parameters() > 0


@pytest.mark.parametrize("content", [{"x": Code()}, Code(), [1]], ids=["a value", "all", "no dict"])
def test_code_in_a_pickle_file_is_never_run(single, content, capsys):
    (single / SINGLE).unlink()
    torch.save(content, single / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin (is damaged or contains objects other than tensors|is not a state dict)"
    ):
        Bumblebee.from_pretrained(single, allow_pickle=True)
    assert "run!" not in capsys.readouterr().out


def test_a_folder_without_weights_is_refused(single):
    (single / SINGLE).unlink()
    assert refusal(single) == f"{single} has no {SINGLE} or {INDEX}"


def test_a_missing_shard_is_named(shards):
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    assert refusal(shards) == f"{shards} is incomplete: file not found: {lost}"


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_file_that_was_cut_is_named(single, keep):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:keep])
    assert refusal(single).startswith(f"{single / SINGLE} is damaged or not a safetensors file: ")


def test_a_file_of_something_else_is_named(single):
    (single / SINGLE).write_bytes(b"PK\x03\x04" * 1000)
    assert refusal(single).startswith(f"{single / SINGLE} is damaged or not a safetensors file: ")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metadata": {}}', "\udcff"])
def test_a_damaged_index_is_named(shards, content):
    (shards / INDEX).write_text(content, errors="surrogateescape")
    assert refusal(shards).startswith(f"{shards / INDEX}")


@pytest.mark.parametrize("content", ["", "{", "[]", "\udcff"])
def test_a_damaged_config_is_named(single, content):
    (single / "config.json").write_text(content, errors="surrogateescape")
    assert refusal(single).startswith(f"{single / 'config.json'}: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures ['GPT2LMHeadModel']"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_setting_is_named_with_its_file(single, changes, message):
    change_config(single, **changes)
    assert refusal(single).startswith(f"{single / 'config.json'}: ") and message in refusal(single)


def test_missing_folder_or_config_is_refused(tmp_path):
    assert refusal(tmp_path / "none") == f"folder not found: {tmp_path / 'none'}"
    assert refusal(tmp_path) == f"{tmp_path} is not a model folder: config.json not found"


def test_refusal_of_an_unfinished_run_names_its_newest_checkpoint(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("trainer_state.json", "model.safetensors"):
            (tmp_path / f"checkpoint-{step}" / name).write_text("{}")
    assert refusal(tmp_path).endswith(f"the run has not finished, its newest checkpoint is {tmp_path / 'checkpoint-10'}")
