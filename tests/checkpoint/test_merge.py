"""``bumblebee merge``: the merged folder equals base model and adapter, and never overwrites one that is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from bumblebee import Bumblebee, Generator, SamplingParams, Tokenizer  # noqa: E402
from bumblebee.checkpoint.weight_reader import read_tensors  # noqa: E402
from bumblebee.cli.main import main  # noqa: E402
from bumblebee.lora import LoRA  # noqa: E402

IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def folders(request: pytest.FixtureRequest, tiny: Callable[..., Any], tokenizer_folder: Path, tmp_path: Path) -> Path:
    """Folders base, adapter (with its own tokenizer and stop ids) and chained (an adapter of the adapter)."""
    torch.manual_seed(0)
    Bumblebee(tiny(tie_word_embeddings=False, eos_token_id=1)).to(request.param).save_pretrained(tmp_path / "base")
    for name, below, dora in (("adapter", "base", False), ("chained", "adapter", True)):
        model = Bumblebee.from_pretrained(tmp_path / below)
        LoRA(rank=4, alpha=8, dora=dora)(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (tmp_path / "chained" / "generation_config.json").unlink()
    return tmp_path


def merge(*words: object) -> None:
    main(["merge", *map(str, words)])


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The single error line of a failing command."""
    with pytest.raises(SystemExit) as done:
        merge(*words)
    lines = capsys.readouterr().err.splitlines()
    assert done.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", ["adapter", "chained"])
def test_merged_folder_equals_loaded_adapter_folder(folders: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    merge("--adapter", folders / name, "--output", folders / "out", "--max_shard_size", "50KB")
    assert len(list((folders / "out").glob("model-*-of-*.safetensors"))) > 1
    merged, expected = Bumblebee.from_pretrained(folders / "out"), Bumblebee.from_pretrained(folders / name)
    for key, tensor in expected.state_dict().items():
        assert merged.state_dict()[key].dtype == tensor.dtype and torch.equal(merged.state_dict()[key], tensor), key
    assert json.loads((folders / "out" / "generation_config.json").read_text()) == {"eos_token_id": [1, 7]}
    assert Tokenizer.from_pretrained(folders / "out").vocab_size == Tokenizer.from_pretrained(folders / "adapter").vocab_size
    assert not (folders / "out" / "adapter_config.json").exists()

    dtype = str(next(iter(read_tensors(folders / "base")))[1].dtype).removeprefix("torch.")
    lines = re.findall(r"(\w+): maximum logit difference (\S+), maximum logit (\S+)", capsys.readouterr().out)
    assert [line[0] for line in lines] == list(dict.fromkeys(["float32", dtype]))
    for _, difference, largest in lines:
        assert float(difference) < float(largest) * (1e-5 if dtype == "float32" else 0.05)


def test_transformers_loads_the_merged_folder(folders: Path) -> None:
    from transformers import AutoModelForCausalLM

    merge("--adapter", folders / "adapter", "--output", folders / "out", "--dtype", "float32", "--check", "false")
    reference = AutoModelForCausalLM.from_pretrained(folders / "out", local_files_only=True).eval()
    assert reference.dtype == torch.float32
    torch.testing.assert_close(reference(IDS).logits, Bumblebee.from_pretrained(folders / "out")(IDS), rtol=0, atol=2e-6)


def test_adapter_folders_generate(folders: Path) -> None:
    """The chained adapter has no tokenizer or stop ids: it uses those of the adapter below."""
    merge("--adapter", folders / "chained", "--output", folders / "out", "--check", "false")
    params = SamplingParams(max_new_tokens=8, temperature=0.0)
    first, second = (Generator.from_pretrained(folders / name, device="cpu") for name in ("chained", "out"))
    assert set(first.stop_ids) == set(second.stop_ids) >= {1, 7}
    assert first.generate(["The"], params)[0].token_ids == second.generate(["The"], params)[0].token_ids


def test_moved_base_is_named_and_can_be_replaced(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = Bumblebee.from_pretrained(folders / "adapter")(IDS)
    (folders / "base").rename(folders / "moved")
    error = fails(capsys, "--adapter", folders / "adapter", "--output", folders / "out")
    assert str(folders / "adapter" / "adapter_config.json") in error and str(folders / "base") in error and "--base" in error
    merge("--adapter", folders / "adapter", "--output", folders / "out", "--base", folders / "moved")
    assert torch.equal(Bumblebee.from_pretrained(folders / "out")(IDS), expected)


def test_invalid_merges_are_refused(folders: Path, tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = ("--adapter", folders / "adapter"), ("--output", folders / "out")
    assert "is not an adapter folder: adapter_config.json not found" in fails(capsys, "--adapter", folders / "base", *out)
    assert "adapter: folder not found: " in fails(capsys, "--adapter", folders / "nothing", *out)
    assert "unknown dtype 'fp8'" in fails(capsys, *adapter, *out, "--dtype", "fp8")
    for taken in ("base", "adapter", "chained"):
        assert "contains an adapter or the base model" in fails(capsys, *adapter, "--output", folders / taken, "--overwrite")
    Bumblebee(tiny(hidden_size=64)).save_pretrained(folders / "wide")
    assert "the adapter belongs to a model of another size" in fails(capsys, *adapter, *out, "--base", folders / "wide")
    assert not (folders / "out").exists()


def test_merge_replaces_a_model_only_with_overwrite(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--adapter", folders / "adapter", "--output", folders / "out", "--check", "false")
    merge(*words, "--max_shard_size", "50KB")
    assert "already contains a model: add --overwrite to replace it" in fails(capsys, *words)
    merge(*words, "--overwrite")
    assert [file.name for file in (folders / "out").glob("model*")] == ["model.safetensors"]
    shutil.rmtree(folders / "base")  # the merged model does not need it
    Bumblebee.from_pretrained(folders / "out")
