"""``data.chat_template``: a file or "chatml" for a base model; saved with the model, and generation ends where it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers.chat_folders import GLM, GLM_TOKENS, LLAMA, byte_level, write
from helpers.chat_records import conversations

from bumblebee import Bumblebee, Generator, SamplingParams, Tokenizer
from bumblebee.cli.main import main
from datamodules import SFT, Preferences, worker_pool

ONE = {"instruction": "Two?", "output": "Two."}


def base_folder(folder: Path) -> Path:
    """A tokenizer without template and without ChatML's tokens."""
    backend = tokenizers.Tokenizer.from_str(byte_level().to_str().replace("<|im_", "<|no_"))
    backend.add_special_tokens(GLM_TOKENS)
    return write(folder, backend, None)


@pytest.fixture
def make(tmp_path):
    def set_up(kind: type = SFT, records: list[dict] | None = None, **options: Any) -> Any:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records or [ONE]))
        options = {"tokenizer": str(base_folder(tmp_path / "base")), "cache_dir": str(tmp_path / "cache"), **options}
        data = kind(files=str(file), max_length=128, **options)
        data.setup(seed=0)
        return data

    return set_up


def trained_text(data: SFT) -> str:
    row = data.collate([data.train[0]])
    ids = [int(id) for id in row["labels"][0] if id >= 0]
    return data.tokenizer.decode(ids, skip_special_tokens=False)


def test_base_model_without_template_needs_the_option(make):
    with pytest.raises(ValueError, match=r"no chat template.* --data.chat_template FILE or --data.chat_template chatml"):
        make()


def test_chatml_and_files_render_the_records(make, tmp_path):
    data = make(chat_template="chatml")
    assert trained_text(data) == "Two.</s>"
    assert data.stop_ids == [data.tokenizer.eos_token_id]
    (tmp_path / "llama.jinja").write_text(LLAMA)
    other = make(chat_template=str(tmp_path / "llama.jinja"))
    assert trained_text(other) == "Two.<|eot|>"
    data.tokenizer.save_pretrained(tmp_path / "saved")
    assert make(tokenizer=str(tmp_path / "saved")).stop_ids == data.stop_ids


def test_preferences_take_the_option_too(make):
    data = make(Preferences, [{"instruction": "Two?", "chosen": "Two.", "rejected": "No."}], chat_template="chatml")
    assert len(data.train) == 1
    assert data.stop_ids == [data.tokenizer.eos_token_id]


def test_worker_processes_use_the_template_too(make, tmp_path, monkeypatch):
    records = conversations(200)
    alone = make(records=records, chat_template="chatml")
    monkeypatch.setattr(worker_pool, "MIN_BYTES", 1)
    pooled = make(records=records, chat_template="chatml", cache_dir=str(tmp_path / "other"))
    assert (pooled.cache.tokens[:] == alone.cache.tokens[:]).all()


def test_wrong_name_is_refused_with_the_option(make):
    with pytest.raises(ValueError, match=r"data\.chat_template: 'nowhere\.jinja' is not a file"):
        make(chat_template="nowhere.jinja")


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chatml", "glm"])
def test_trained_model_stops_where_its_template_says(tmp_path, template):
    folder, file = base_folder(tmp_path / "base"), tmp_path / "glm.jinja"
    file.write_text(GLM)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ONE) + "\n")
    main(
        [
            "fit", "--config", "recipes/sft_full.yaml", "--task.model", "recipes/models/tiny.yaml",
            "--task.model.config.num_hidden_layers", "2", "--task.model.config.hidden_size", "64",
            "--data.files", str(data), "--data.tokenizer", str(folder), "--data.max_length", "64",
            "--data.validation_ratio", "0", "--data.chat_template", "chatml" if template == "chatml" else str(file),
            "--trainer.max_steps", "60", "--trainer.accumulate", "1", "--trainer.precision", "fp32",
                "--callbacks.validation", "null", "--optimizer.lr", "1e-2",
            "--output_dir", str(tmp_path / "run"),
        ]
    )  # fmt: skip
    generator = Generator.from_pretrained(tmp_path / "run")
    prompt = generator.tokenizer.apply_chat_template([{"role": "user", "content": "Two?"}], add_generation_prompt=True)
    [output] = generator.generate([prompt], SamplingParams(temperature=0.0, max_new_tokens=30))
    assert (output.text.strip(), output.finish_reason) == ("Two.", "stop")
    assert set(Bumblebee.from_pretrained(tmp_path / "run").config.eos_token_ids) >= set(generator.tokenizer.end_of_turn_ids)
    assert Tokenizer.from_pretrained(tmp_path / "run").chat_template.sources["default"].startswith(("{%", "[gMASK]"))
