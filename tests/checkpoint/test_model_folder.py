"""Model folders: round trip of the weights, shard sizes, and the index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bumblebee import Bumblebee, BumblebeeConfig
from bumblebee.checkpoint.hf_folder import is_model_folder, load_config
from bumblebee.checkpoint.model_files import HuggingFaceModelFiles, ModelFiles, save_model
from bumblebee.checkpoint.weight_files import INDEX, SINGLE
from bumblebee.checkpoint.weight_reader import read_tensors


@pytest.fixture(scope="module")
def make_model(tiny):
    def make(**changes) -> Bumblebee:
        torch.manual_seed(0)
        return Bumblebee(tiny(vocab_size=64, **changes))

    return make


def same(first: Bumblebee, second: Bumblebee) -> bool:
    """Whether all weights are bitwise equal."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours
    )


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def sizes(file: Path) -> dict[str, int]:
    """Size of each tensor of a file in bytes."""
    return {key: tensor.nbytes for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_and_config_come_back(make_model, tmp_path, tied, dtype, shard_size):
    model = make_model(tie_word_embeddings=tied, eos_token_id=[3, 4]).to(dtype)
    model.save_pretrained(tmp_path / "m", max_shard_size=shard_size)
    again = Bumblebee.from_pretrained(tmp_path / "m")
    assert same(model, again) and again.config == model.config
    assert is_model_folder(tmp_path / "m") and load_config(tmp_path / "m") == model.config


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_saving_what_was_loaded_gives_the_same_bytes(make_model, tmp_path, shard_size):
    make_model().save_pretrained(tmp_path / "one", max_shard_size=shard_size)
    Bumblebee.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two", max_shard_size=shard_size)
    assert names(tmp_path / "one") == names(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_weights_are_cast_to_requested_dtype(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "m")
    assert same(Bumblebee.from_pretrained(tmp_path / "m", dtype=torch.bfloat16), make_model().bfloat16())


def test_tied_head_is_not_saved_and_tied_on_load(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "m")
    assert "lm_head.weight" not in dict(read_tensors(tmp_path / "m"))
    again = Bumblebee.from_pretrained(tmp_path / "m")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_stored_tied_head_is_ignored(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "m")
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, tmp_path / "m" / SINGLE)
    assert same(Bumblebee.from_pretrained(tmp_path / "m"), model)


def test_unused_weights_are_ignored(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "m")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(tmp_path / "m" / SINGLE), **extra}, tmp_path / "m" / SINGLE)
    assert same(Bumblebee.from_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize("limit", [1, 3000, 10_000, 20_000])
def test_only_single_tensor_shards_exceed_max_size(make_model, tmp_path, limit):
    make_model().save_pretrained(tmp_path / "m", max_shard_size=str(limit))
    shards = [sizes(file) for file in sorted((tmp_path / "m").glob("*.safetensors"))]
    assert len(shards) > 1
    assert [shard for shard in shards if sum(shard.values()) > limit and len(shard) > 1] == []


def test_shards_are_filled_in_order(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "m", max_shard_size="10KB")
    shards = [list(sizes(file).values()) for file in sorted((tmp_path / "m").glob("*.safetensors"))]
    assert all(sum(a) + sum(b) > 10_000 for a, b in zip(shards, shards[1:], strict=False))


def test_index_has_weight_map_and_total_size(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    files = {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            files |= {key: file.name for key in shard.keys()}  # noqa: SIM118
    assert index["weight_map"] == files
    assert set(files) == set(model.state_dict()) - {"lm_head.weight"}
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    count = len(set(files.values()))
    assert set(files.values()) == {f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)}


@pytest.mark.parametrize("second", ["5GB", "30KB", "8KB"])
@pytest.mark.parametrize("first", ["5GB", "30KB", "8KB"])
def test_saving_again_removes_stale_shards(make_model, tmp_path, first, second):
    make_model().save_pretrained(tmp_path / "m", max_shard_size=first)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    other = make_model(num_hidden_layers=1)
    other.save_pretrained(tmp_path / "m", max_shard_size=second)
    other.save_pretrained(tmp_path / "fresh", max_shard_size=second)
    assert names(tmp_path / "m") == names(tmp_path / "fresh") | {"tokenizer.json"}
    assert same(Bumblebee.from_pretrained(tmp_path / "m"), other)


def test_saving_leaves_no_temporary_folder(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "m", max_shard_size="8KB")
    assert names(tmp_path) == {"m"}
    assert not [name for name in names(tmp_path / "m") if "partial" in name]


def test_parents_of_a_new_folder_are_made(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "a" / "b" / "m")
    assert is_model_folder(tmp_path / "a" / "b" / "m")


def test_tensors_are_consumed_one_by_one(make_model, tmp_path):
    model = make_model()
    save_model(tmp_path / "m", ModelFiles(model.config), iter(model.state_dict().items()), "10KB")
    assert same(Bumblebee.from_pretrained(tmp_path / "m"), model)


def test_an_empty_tensor_is_not_written(make_model, tmp_path):
    with pytest.raises(AssertionError, match="x is empty: it was not gathered"):
        save_model(tmp_path / "m", ModelFiles(make_model().config), {"x": torch.empty(0)})
    assert names(tmp_path) == set()


def test_load_keeps_requires_grad(make_model, tmp_path):
    class FrozenTable(Bumblebee):
        def build_decoder(self):
            decoder = super().build_decoder()
            decoder.embed_tokens.requires_grad_(False)
            return decoder

    make_model().save_pretrained(tmp_path / "m")
    model = FrozenTable.from_pretrained(tmp_path / "m")
    assert not model.model.embed_tokens.weight.requires_grad and model.model.norm.weight.requires_grad


@pytest.mark.parametrize(
    ("version", "written"), [(None, "5.0.0"), ("4.57.2", "5.0.0"), ("5.15.0", "5.15.0"), ("10.0.0", "10.0.0")]
)
def test_only_older_transformers_versions_are_replaced(version, written, tmp_path):
    raw = {"model_type": "gpt2"} | ({"transformers_version": version} if version else {})
    HuggingFaceModelFiles(BumblebeeConfig.preset("tiny"), raw).write_configs(tmp_path, "float32")
    assert json.loads((tmp_path / "config.json").read_text())["transformers_version"] == written
