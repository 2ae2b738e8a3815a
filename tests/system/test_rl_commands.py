"""The commands of docs/rl.md, in order, with the page's own reward and a model of random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.documents import RL, ROOT, bumblebee_words, commands

from bumblebee import Bumblebee
from bumblebee.cli.main import main

SHORT = ("--task.max_new_tokens", "8", "--task.group_size", "2", "--trainer.precision", "fp32")


@pytest.mark.slow
def test_commands_of_the_page_run_as_written(
    tokenizer_folder: Path, tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of short completions in fp32, to take little time; in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(ROOT / "recipes", "recipes")
    shutil.copytree(tokenizer_folder, "runs/sft")
    torch.manual_seed(0)
    Bumblebee(tiny(max_position_embeddings=1024)).save_pretrained("runs/sft")
    (reward,) = (
        block for block in re.findall(r"```python\n(.*?)```", RL.read_text(), re.DOTALL) if "def right_number" in block
    )
    Path("my_rewards.py").write_text(reward)
    printed: dict[str, list[str]] = {}
    for words in filter(None, map(bumblebee_words, commands(RL))):
        changes = {"fit": [*SHORT, "--overwrite", "true"], "preview": [*SHORT, "--measure", "never"]}
        if "runs/prompts.jsonl" in words and words[0] == "fit":
            _solve_some(Path("runs/prompts.jsonl"))
        main([*words, *changes.get(words[0], [])])
        printed.setdefault(words[0], []).append(capsys.readouterr().out)
    assert "reward 1.1" in "".join(printed["preview"]) and "empty completion: reward 0" in "".join(printed["preview"])
    assert "22 prompts rated" in "".join(printed["rollouts"]) and "page 1 of" in printed["rollouts"][0]
    assert "step 3/3 · reward " in printed["fit"][0] and "best completion at step 3, reward " in printed["fit"][0]
    assert any("pass rate below 0.05" in text for text in printed["fit"])
    assert Path("runs/numbers/adapter_model.safetensors").is_file()
    assert all(Path(f"runs/numbers/{name}.png").stat().st_size > 10_000 for name in ("loss", "reward"))


def _solve_some(file: Path) -> None:
    """Set some pass rates: a model of random weights has solved nothing."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum("pass_rate" in record for record in records) == 22
    for number, record in enumerate(records):
        record["pass_rate"] = (0.0, 0.5)[number % 2]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
