"""The command line: what a user gets wrong ends in one line that says where and what would be right, and writes nothing.

Most of it runs in this process; whole commands in ``system/test_commands.py``.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.recipe_files import RECIPE, SAMPLES
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.cli.config_files import plain
from bumblebee.cli.main import main
from bumblebee.cli.parser import Parser, Recipe, fold

DATA, OPTIMIZER, TRAINER, CALLBACKS = (RECIPE[RECIPE.index(f"\n{name}:") + 1 :].split("\n\n")[0].rstrip() + "\n"
                                       for name in ("data", "optimizer", "trainer", "callbacks"))  # fmt: skip


@pytest.fixture
def place(tokenizer_folder, tmp_path, monkeypatch) -> Path:
    """A folder to work in: recipe.yaml, data.jsonl, tokenizer, and files that cannot be used."""
    shutil.copytree(tokenizer_folder, tmp_path / "tok")
    shutil.copy(SAMPLES / "pretrain.jsonl", tmp_path / "data.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def complaint(capsys) -> Callable[..., str]:
    """A function that runs a command which has to end with exit code 2 and one line; gives the line."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert printed.out == ""
        assert printed.err.startswith("bumblebee: ") and printed.err.count("\n") == 1, printed.err
        return printed.err[len("bumblebee: ") : -1]

    return run


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def matches(line: str, wanted: str) -> bool:
    """Whether a line is the wanted one, in which ``...`` stands for anything."""
    return re.fullmatch(".*".join(re.escape(part) for part in wanted.split("...")), line) is not None


def unknown(key: str, near: str) -> str:
    return f"unknown option '{key}' (did you mean '{near}'?)"


# What is written on the command line -> the line. The recipe itself is sound.
ON_THE_COMMAND_LINE = {
    # unknown
    "--trainer.max_step 3": unknown("trainer.max_step", "trainer.max_steps"),
    "--trainer.max_step=3": unknown("trainer.max_step", "trainer.max_steps"),
    "--trainr.max_steps 3": unknown("trainr.max_steps", "trainer"),
    "--overwrit": unknown("overwrit", "overwrite"),
    "--data.max_lenght 3": unknown("data.max_lenght", "data.max_length"),
    "--data.init_args.max_lenght 3": unknown("data.max_lenght", "data.max_length"),
    "--optimizer.learning_rate 3": "unknown option 'optimizer.learning_rate'; there are lr, betas, ...",
    "--task.model.attenton sdpa": unknown("task.model.attenton", "task.model.attention"),
    "--task.model.config.hiden_size 3": unknown("task.model.config.hiden_size", "task.model.config.hidden_size"),
    "--callbacks.checkpoint.evry 3": unknown("callbacks.checkpoint.evry", "callbacks.checkpoint.every"),
    "--callbacks.chekpoint=null": "callbacks.chekpoint: no recipe has such a callback to remove (did you mean 'checkpoint'?)",
    # of the wrong type
    "--trainer.max_steps many": "trainer.max_steps: expected a whole number or null, got many",
    "--trainer.epochs lots": "trainer.epochs: expected a number, got lots",
    "--seed x": "seed: expected a whole number, got x",
    "--data.max_length 1.5": "data.max_length: expected a whole number, got 1.5",
    "--overwrite maybe": "overwrite: expected true or false, got maybe",
    "--optimizer.lr high": "optimizer.lr: expected a number, got high",
    "--optimizer.betas [0.9]": "optimizer.betas: expected a list of 2 elements, got [0.9]",
    "--trainer.precision fp8": "trainer.precision: expected fp32, bf16 or fp16, got fp8",
    "--trainer.zero_stage 4": "trainer.zero_stage: expected 0, 1, 2 or 3, got 4",
    "--data.on_bad_record ignore": "data.on_bad_record: expected stop or skip, got ignore",
    "--callbacks.checkpoint.every x": "callbacks.checkpoint.every: expected a whole number or null, got x",
    "--trainer.micro_batch_size null": "trainer.micro_batch_size: expected a whole number, got null",
    "--optimizer.lr null": "optimizer.lr is null: give it a value, or leave it out",
    # without a value
    "--data.files": "--data.files: expected a value after it",
    "--trainer.resume": "--trainer.resume: expected a value after it",
    "--trainer.max_steps": "--trainer.max_steps: expected a value after it",
    "--no_output_dir": "--output_dir: expected a value after it",
    "--config": "--config: expected a value after it",
    "--config=": "--config: expected a value after it",
    # out of range
    "--trainer.micro_batch_size 0": "trainer.micro_batch_size must be at least 1, got 0",
    "--trainer.epochs -1": "trainer.epochs must be more than 0, got -1.0",
    "--trainer.epochs nan": "trainer.epochs: expected a number, got nan",
    "--trainer.gradient_clip 0": "trainer.gradient_clip must be more than 0, got 0.0; null turns clipping off",
    "--data.max_length 0": "data.max_length must be at least 1, got 0",
    "--schedule.warmup_ratio 2": "schedule.warmup_ratio must be in [0, 1), got 2.0",
    "--callbacks.checkpoint.every 0": "callbacks.checkpoint.every must be at least 1 or null, got 0",
    "--task.model.config.hidden_size 33": "task.model.config.hidden_size 33 is not a multiple of num_attention_heads 4...",
    "--task.model.config.rope_scaling.rope_type warp": "task.model.config.rope_scaling.rope_type: ...'warp'; known are ...",
    "--task.model.attention warp": "task.model.attention: unknown attention 'warp'; known are ...",
    "--optimizer.lr -1": "...learning rate: -1...",
    "--trainer.device gpu": "trainer.device: unknown device 'gpu': expected auto, cpu, cuda or cuda:N",
    "--trainer.device cuda:99": "trainer.device 'cuda:99' does not exist: ... GPUs are visible",
    "--data.validation_ratio 0.1 --data.validation_files data.jsonl": "data.validation_files and validation_ratio are ...",
    # classes
    "--optimizer torch.optim.Adamm": "optimizer: torch.optim has no 'Adamm' (did you mean 'Adam' ...?)",
    "--schedule bumblebee.optim.Cosin": "schedule: bumblebee.optim has no 'Cosin' (did you mean 'Cosine'?)",
    "--optimizer torch.nn.Linear": "optimizer: torch.nn.Linear is no Optimizer",
    "--schedule datamodules.Pretrain": "schedule: datamodules.Pretrain is no Schedule",
    "--callbacks.mine bumblebee.Trainer": "callbacks.mine: bumblebee.Trainer is no Callback",
    # files
    "--data.files dato.jsonl": "data.files: 'dato.jsonl' does not exist; did you mean 'data.jsonl'...",
    "--data.files path/to/data.jsonl": "data.files: 'path/to/data.jsonl' is a placeholder; put the path of your own file...",
    "--data.files *.parquet": "data.files: no file matches '*.parquet'",
    "--data.files .": "data.files: '.' is a folder; name the files in it, for example './*.jsonl'",
    "--data.files recipe.yaml": "data.files: 'recipe.yaml': files of kind '.yaml' cannot be read; supported: ...",
    '--data.files {"path":"data.jsonl","wieght":2} data.jsonl': (
        "data.files: unknown key 'wieght' in the entry of 'data.jsonl' (did you mean 'weight'?); it may have path, weight"
    ),
    '--data.files [{"path":"data.jsonl","weight":0}]': "data.files: the weight of 'data.jsonl' must be a number above 0, got 0",
    '--data.files [{"weight":2}]': "data.files: expected a path in each entry, such as ...",
    "--data.files.0.weight 3": "recipe.yaml:21: data.files: expected a path in each entry, such as ...",
    "--data.files data.jsonl dato.jsonl": "data.files: 'dato.jsonl' does not exist...",
    "--data.files empty.jsonl": "data.files: there is no text to train on in empty.jsonl",
    "--data.files bad.jsonl": "data.files: bad.jsonl:2: no key 'text'; the record's keys: 'txt'",
    "--data.tokenizer nowhere": "data.tokenizer: nowhere is not a tokenizer folder: it does not exist",
    "--data.tokenizer .": "data.tokenizer: . is not a tokenizer folder: it has no tokenizer.json",
    "--task.model.config.vocab_size 399": "the tokenizer has 400 ids, the model's vocab_size is 399: take the model's own"
    " tokenizer, or make a new model larger: --task.model.config.vocab_size 400",
    "--trainer.resume nowhere": "trainer.resume: nowhere is no complete checkpoint; in out there are: none",
    "--trainer.deepspeed nope.json": "trainer.deepspeed: cannot read nope.json: ...",
    "--output_dir data.jsonl": "output_dir: data.jsonl is a file, not a folder",
    "--output_dir /proc/nowhere/out": "output_dir: cannot write to /proc/nowhere/out: No such file or directory",
    "--config nope.yaml": "--config: nope.yaml is not there...",
    "--config recipe.yml": "--config: recipe.yml is not there (did you mean 'recipe.yaml'?)",
    "--config tok": "--config: tok is a folder",
    "--task.model recipes/tiny.yaml": "task.model: recipes/tiny.yaml is not there",
    "--task.model recip.yaml": "task.model: recip.yaml is not there (did you mean 'recipe.yaml'?)",
    "--output_dir=": "output_dir is empty: expected a folder",
    "--seed -1": "seed must be in [0, 2**63), got -1",
    "--trainer.deepspeed.zero_optimization.stage 3": "trainer.deepspeed.zero_optimization.stage is 3, but ...",
    "--trainer.groups [{patern:x}]": "unknown option 'trainer.groups.patern:x' (did you mean 'trainer.groups.pattern'?)",
    "--optimizer.class_path torch.optim.SGDD": "optimizer: torch.optim has no 'SGDD' (did you mean 'SGD' or 'ASGD'?)",
}


@pytest.mark.parametrize("words", ON_THE_COMMAND_LINE)
def test_a_mistake_on_the_command_line_is_one_line_with_the_key_the_value_and_what_is_right(words, place, complaint):
    before = files(place)
    line = complaint("fit", "--config", "recipe.yaml", *words.split())
    assert matches(line, ON_THE_COMMAND_LINE[words]), line
    assert files(place) == before


NO_RECIPE = "recipe.yaml: no recipe: expected lines such as seed: 42, or groups such as trainer: with lines under them"

# A change of the recipe -> the line. Where it names no other place, it begins with the place of the change.
IN_THE_RECIPE = [
    ("trainer:", "trainr:", "recipe.yaml:33: " + unknown("trainr.max_steps", "trainer")),
    ("max_steps: 2", "max_step: 2", unknown("trainer.max_step", "trainer.max_steps")),
    ("max_length: 32", "max_lenght: 32", unknown("data.max_lenght", "data.max_length")),
    ("lr: 1.0e-3", "learning_rate: 1", "unknown option 'optimizer.learning_rate'; there are lr, ..."),
    ("warmup_ratio: 0.1", "warmup_ration: 1", unknown("schedule.warmup_ration", "schedule.warmup_ratio")),
    ("hidden_size: 32", "hiden_size: 32", unknown("task.model.config.hiden_size", "task.model.config.hidden_size")),
    ("    model:\n", "    modell:\n", unknown("task.modell", "task.model")),
    ("      every: 1", "      evry: 1", unknown("callbacks.checkpoint.evry", "callbacks.checkpoint.every")),
    ("max_steps: 2", "max_steps: two", "trainer.max_steps: expected a whole number or null, got two"),
    ("lr: 1.0e-3", "lr: high", "optimizer.lr: expected a number, got high"),
    ("lr: 1.0e-3", "lr:", "optimizer.lr is null: give it a value, or leave it out"),
    ("seed: 1", "seed:", "seed is null: give it a value, or leave it out"),
    ("hidden_size: 32", "hidden_size: wide", "task.model.config.hidden_size: expected a whole number, got wide"),
    ("hidden_size: 32", "hidden_size: 33", "task.model.config.hidden_size 33 is not a multiple of ..."),
    ("precision: fp32", "precision: fp8", "trainer.precision: expected fp32, bf16 or fp16, got fp8"),
    ("device: cpu", "zero_stage: 4", "trainer.zero_stage: expected 0, 1, 2 or 3, got 4"),
    ("micro_batch_size: 2", "micro_batch_size: 0", "trainer.micro_batch_size must be at least 1, got 0"),
    ("      every: 1", "      every: 0", "callbacks.checkpoint.every must be at least 1 or null, got 0"),
    ("device: cpu", "deepspeed: {zero_optimization: {stage: 3}}",
     "trainer.deepspeed.zero_optimization.stage is 3, but the trainer's own options make it 1: drop it"),
    ("files: data.jsonl", "files: dato.jsonl", "data.files: 'dato.jsonl' does not exist; did you mean 'data.jsonl'..."),
    ("files: data.jsonl", "files: <your data>", "data.files: '<your data>' is a placeholder; ..."),
    ("files: data.jsonl", "files: bad.jsonl", "data.files: bad.jsonl:2: no key 'text'; the record's keys: 'txt'"),
    ("tokenizer: tok", "tokenizer: nowhere", "data.tokenizer: nowhere is not a tokenizer folder: it does not exist"),
    ("    tokenizer: tok\n", "", "recipe.yaml:18: data.tokenizer is missing"),
    ("datamodules.Pretrain", "datamodules.Pretrian",
     "recipe.yaml:18: data: datamodules has no 'Pretrian' (did you mean 'Pretrain'?)"),
    ("datamodules.Pretrain", "datamodule.Pretrain", "recipe.yaml:18: data: there is no Python module 'datamodule'"),
    ("bumblebee.LanguageModeling", "bumblebee.Tokenizer", "recipe.yaml:4: task: bumblebee.Tokenizer is no Task"),
    ("bumblebee.Bumblebee\n", "bumblebee.Tokenizer\n", "recipe.yaml:7: task.model: bumblebee.Tokenizer is no Module"),
    ("torch.optim.AdamW", "torch.nn.Linear", "recipe.yaml:25: optimizer: torch.nn.Linear is no Optimizer"),
    ("callbacks.Checkpoint", "callbacks.Chekpoint",
     "recipe.yaml:40: callbacks.checkpoint: callbacks has no 'Chekpoint' (did you mean 'Checkpoint'?)"),
    ("callbacks.Checkpoint", "bumblebee.Trainer", "recipe.yaml:40: callbacks.checkpoint: bumblebee.Trainer is no Callback"),
    ("  class_path: datamodules.Pretrain\n", "", "recipe.yaml:18: data: expected the class_path of a DataModule"),
    ("    class_path: callbacks.Checkpoint\n", "",
     "recipe.yaml:42: unknown option 'callbacks.checkpoint.every': bumblebee.Callback takes none; is a class_path missing?"),
    (TRAINER, "trainer: 3\n", "trainer: expected options under it, got 3"),
    (DATA, "data: hello\n", "data: expected the class_path of a DataModule, got hello"),
    (CALLBACKS, "callbacks: 3\n", "callbacks: expected options under it, got 3"),
    ("seed: 1", "seed: [1", "recipe.yaml:2: not valid YAML: ..."),
    ("  max_steps: 2", "\tmax_steps: 2", "not valid YAML: found character '\\t' that cannot start any token"),
    ("seed: 1", "seed: 1\nseed: 2", "recipe.yaml:2: 'seed' is there twice"),
    ("    files: data.jsonl", "    files: data.jsonl\n    files: other.jsonl", "recipe.yaml:22: 'files' is there twice"),
    (RECIPE, "- 1\n- 2\n", NO_RECIPE),
    (RECIPE, "hello\n", NO_RECIPE),
    (RECIPE, "", NO_RECIPE),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "wanted"), IN_THE_RECIPE, ids=[wanted[:60] for _, _, wanted in IN_THE_RECIPE])
def test_a_mistake_in_the_recipe_is_one_line_with_its_place(before, after, wanted, place, complaint):
    assert RECIPE.count(before) == 1
    (place / "recipe.yaml").write_text(RECIPE.replace(before, after))
    at = 1 + RECIPE[: RECIPE.index(before)].count("\n")
    there = files(place)
    line = complaint("fit", "--config", "recipe.yaml")
    assert matches(line, wanted if wanted.startswith("recipe.yaml:") else f"recipe.yaml:{at}: {wanted}"), line
    assert files(place) == there


@pytest.mark.parametrize(("group", "name"), [(DATA, "data"), (OPTIMIZER, "optimizer")])
def test_a_group_that_is_missing_is_named(group, name, place, complaint):
    (place / "recipe.yaml").write_text(RECIPE.replace(group, ""))
    assert complaint("fit", "--config", "recipe.yaml") == f"{name} is missing"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("fitt", "unknown command 'fitt' (did you mean 'fit'?); there are fit, validate, ..."),
        ("--seed 3", "unknown command '--seed'; there are fit, validate, ..."),
        ("fit", "...are missing: name a recipe, such as --config recipes/pretrain.yaml"),
        ("fit --hel", unknown("hel", "help")),
        ("fit --config recipe.yaml junk", "--config: junk is not there"),
        ("validate --config recipe.yaml", "recipe.yaml:2: output_dir: out is no model folder: it is not there"),
        ("validate --config recipe.yaml --model tok", "...tok is no model folder: it has no config.json"),
        ("generate --model tok", "prompt: give either --prompt TEXT or --prompts FILE"),
        ("generate --model nowhere --prompt x", "model: nowhere is no model folder: it is not there"),
        ("generate --model nowhere --promt x", "unknown option 'promt' (did you mean 'prompt' or 'prompts'?)"),
        ("generate tok --prompt x", "'tok' belongs to no option: write --model tok"),
        ("fit recipe.yaml", "'recipe.yaml' belongs to no option: write --config recipe.yaml"),
        ("generate --model tok --prompt two words", "'words' belongs to no option: write --NAME VALUE, and quotes around ..."),
        ("generate --model tok --zzz x", "unknown option 'zzz'; there are model, ..., ignore_eos"),
        ("tokenizer --files nope.txt --vocab_size 300 --output new", "files: 'nope.txt' does not exist"),
        ("tokenizer --files data.jsonl --vocab_size 30 --output new", "vocab_size must be at least 259..."),
        ("tokenizer --files data.jsonl --vocab_size 300 --output tok", "output: tok already holds a tokenizer..."),
        ("tokenizer --files bad.jsonl --vocab_size 300 --output new", "files: bad.jsonl:2: no key 'text'..."),
    ],
)
def test_a_mistake_in_any_command_is_one_line(words, wanted, place, complaint):
    there = files(place)
    line = complaint(*words.split())
    assert matches(line, wanted), line
    assert files(place) == there


def test_a_folder_that_holds_a_run_is_refused_with_the_ways_out_and_left_alone(place, complaint):
    main(["fit", "--config", "recipe.yaml"])
    there = files(place)
    line = complaint("fit", "--config", "recipe.yaml")
    assert line == (
        "recipe.yaml:2: output_dir: out already holds a run: continue it with --trainer.resume auto,"
        " replace it with --overwrite, or choose another folder"
    )
    assert files(place) == there


# -- composing -----------------------------------------------------------------------------------------------------------


def printed(capsys, *words: str) -> dict:
    """The resolved recipe, as --print_config tells it."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert ended.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_the_command_line_wins_over_recipes_wherever_it_stands_and_recipes_over_defaults(place, capsys):
    for words in (["--trainer.max_steps", "9", "--config", "recipe.yaml"], ["--config=recipe.yaml", "--trainer.max_steps=9"]):
        config = printed(capsys, *words)
        assert config["trainer"]["max_steps"] == 9
        assert config["trainer"]["micro_batch_size"] == 2
        assert config["trainer"]["log_every"] == 1


def test_options_of_every_group_can_be_given_in_short_as_well_as_with_init_args(place, capsys):
    short = printed(
        capsys, "--config", "recipe.yaml", "--data.max_length", "7", "--optimizer.lr", "0.5", "--schedule.warmup_ratio", "0.5",
        "--callbacks.checkpoint.every", "9", "--task.model.config.hidden_size", "64", "--seed", "5",
    )  # fmt: skip
    long = printed(
        capsys, "--config", "recipe.yaml", "--data.init_args.max_length=7", "--optimizer.init_args.lr=0.5",
        "--schedule.init_args.warmup_ratio=0.5", "--callbacks.checkpoint.init_args.every=9",
        "--task.init_args.model.init_args.config.hidden_size=64", "--seed=5",
    )  # fmt: skip
    assert short == long
    assert short["data"]["init_args"]["max_length"] == 7
    assert short["callbacks"]["checkpoint"]["init_args"]["every"] == 9
    assert short["task"]["init_args"]["model"]["init_args"]["config"]["hidden_size"] == 64


def test_changing_the_class_of_a_group_drops_options_that_the_new_class_does_not_have(place, capsys):
    config = printed(capsys, "--config", "recipe.yaml", "--optimizer", "torch.optim.SGD", "--optimizer.momentum", "0.9")
    assert config["optimizer"]["class_path"] == "torch.optim.SGD"
    assert config["optimizer"]["init_args"]["momentum"] == 0.9
    assert "betas" not in config["optimizer"]["init_args"]


def test_several_recipes_compose_later_ones_win_and_callbacks_are_added_changed_and_removed(place, capsys):
    (place / "second.yaml").write_text(
        "trainer: {max_steps: 7}\n"
        "callbacks:\n"
        "  checkpoint: {class_path: callbacks.Checkpoint, init_args: {every: 5}}\n"
        "  history: callbacks.MetricsHistory\n"
    )
    (place / "third.yaml").write_text("seed: 3\ncallbacks:\n  history:\n")
    base = printed(capsys, "--config", "recipe.yaml")
    config = printed(capsys, "--config", "recipe.yaml", "--config", "second.yaml", "--config=third.yaml")
    assert config == printed(capsys, "--config", "recipe.yaml", "second.yaml", "third.yaml")
    assert config["trainer"] == {**base["trainer"], "max_steps": 7}
    assert config["seed"] == 3
    assert config["callbacks"]["checkpoint"]["init_args"]["every"] == 5
    assert config["callbacks"]["history"] is None
    assert config["data"] == base["data"]


def test_transforms_of_several_recipes_add_up_so_that_lora_survives_what_goes_behind_it(place, capsys):
    transforms = "task:\n  init_args:\n    transforms:"
    lora = f"{transforms} [{{class_path: bumblebee.lora.LoRA, init_args: {{rank: 2}}}}]\n"
    for name, text in (("lora", lora), ("none", f"{transforms} null\n"), ("else", "seed: 1\n")):
        (place / f"{name}.yaml").write_text(text)
    (place / "behind.yaml").write_text(
        f"{transforms} [bumblebee.transforms.Compile, bumblebee.transforms.ActivationCheckpointing]\n"
    )

    def kinds(*words: str) -> list[str]:
        found = printed(capsys, "--config", "recipe.yaml", *words)["task"]["init_args"]["transforms"] or []
        return [f"{each['class_path'].split('.')[-1]} {each['init_args'].get('rank', '')}".strip() for each in found]

    assert kinds("lora.yaml", "behind.yaml") == ["Compile", "ActivationCheckpointing", "LoRA 2"]
    assert kinds("lora.yaml", "behind.yaml", "--task.transforms.rank", "3")[-1] == "LoRA 3"
    assert kinds("lora.yaml", "else.yaml") == kinds("lora.yaml", "lora.yaml") == ["LoRA 2"]
    assert kinds("lora.yaml", "none.yaml") == []


def test_a_callback_is_removed_from_the_command_line_and_added_there(place, capsys):
    words = ["--callbacks.checkpoint=null", "--callbacks.bar", "callbacks.ProgressBar"]
    config = printed(capsys, "--config", "recipe.yaml", *words)
    assert config["callbacks"]["checkpoint"] is None
    assert config["callbacks"]["bar"]["class_path"] == "callbacks.ProgressBar"


def test_a_printed_config_alone_is_the_same_config(place, capsys):
    words = ["--config", "recipe.yaml", "--trainer.gradient_clip=null", "--callbacks.checkpoint=null", "--data.files", "a", "b"]
    config = printed(capsys, *words)
    assert config["trainer"]["gradient_clip"] is None and config["data"]["init_args"]["files"] == ["a", "b"]
    (place / "printed.yaml").write_text(yaml.safe_dump(config))
    assert printed(capsys, "--config", "printed.yaml") == config


def test_files_may_have_weights_on_the_command_line_and_in_recipes(place, capsys):
    entry = {"path": "b", "weight": 2}
    for words in (["a", json.dumps(entry)], [json.dumps(["a", entry])], ["[a, {path: b, weight: 2}]"]):
        config = printed(capsys, "--config", "recipe.yaml", "--data.files", *words)
        assert config["data"]["init_args"]["files"] == ["a", entry]
    (place / "printed.yaml").write_text(yaml.safe_dump(config))
    assert printed(capsys, "--config", "printed.yaml") == config
    more = printed(capsys, "--config", "recipe.yaml", "--data.files+", json.dumps(entry))
    assert more["data"]["init_args"]["files"] == ["data.jsonl", entry]


def test_the_saved_recipe_alone_is_the_same_config_from_another_folder_too(place, capsys, monkeypatch):
    words = ["--config", "recipe.yaml", "--trainer.gradient_clip", "null", "--trainer.max_steps", "1"]
    main(["fit", *words])
    config = printed(capsys, *words)
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    saved = printed(capsys, "--config", "../out/recipe.yaml")
    config.pop("overwrite"), saved.pop("overwrite")
    assert saved == config


def test_validate_measures_what_the_run_measured_at_its_end(place, capsys):
    held_out = ["--config", "recipe.yaml", "--data.validation_ratio", "0.2"]
    callbacks = ["--callbacks.validation", "callbacks.Validation", "--callbacks.history", "callbacks.MetricsHistory"]
    main(["fit", *held_out, *callbacks])
    lines = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    [measured] = [line for line in lines if "validation_loss" in line]
    capsys.readouterr()
    main(["validate", *held_out])
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert set(told) == {"validation_loss", "validation_perplexity", "validation_bits_per_byte"}
    assert all(math.isclose(float(value), measured[name], rel_tol=1e-5) for name, value in told.items())


# -- words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "folded", "flags"),
    [
        ("--overwrite", "--overwrite=true", ["overwrite"]),
        ("--no_overwrite", "--overwrite=false", ["overwrite"]),
        ("--overwrite false", "--overwrite false", []),
        ("--data.files a b", '--data.files=["a", "b"]', []),
        ('--data.files a {"path":"x","weight":2}', '--data.files=["a", {"path": "x", "weight": 2}]', []),
        ("--data.files a {b", '--data.files=["a", "{b"]', []),
        ("--data.files a", "--data.files a", []),
        ("--a 1 --config x --b=2", "--config x --a 1 --b=2", []),
        ("--config x y", "--config x --config y", []),
        ("--config=x --a 1 --config y", "--config=x --config y --a 1", []),
        ("--trainer.epochs -1", "--trainer.epochs -1", []),
        ("--help", "--help", []),
        ("--print_config", "--print_config", []),
    ],
)
def test_words_become_what_the_parser_takes(words, folded, flags):
    assert fold(words.split()) == (re.findall(r"\S+=\[.*\]|\S+", folded), flags)


@given(st.lists(st.sampled_from(["a", "init_args", "dict_kwargs", "model", "lr"]), max_size=5))
def test_a_plain_key_is_the_key_without_init_args(parts):
    assert plain(".".join(parts)) == ".".join(part for part in parts if part not in ("init_args", "dict_kwargs"))


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(words, capsys):
    main(words)
    out = capsys.readouterr().out
    from bumblebee.cli.main import COMMANDS

    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in COMMANDS)


def test_version_is_told(capsys):
    from bumblebee import __version__

    main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize("option", ["--trainer.max_steps", "--output_dir", "--overwrite", "--config"])
def test_the_help_of_fit_tells_its_options(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code in (0, None)
    assert option in capsys.readouterr().out


def test_a_traceback_is_there_for_those_who_ask_for_it(place, monkeypatch):
    monkeypatch.setenv("BUMBLEBEE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="dato.jsonl"):
        main(["fit", "--config", "recipe.yaml", "--data.files", "dato.jsonl"])


# -- a recipe of plain options, without a recipe's groups ----------------------------------------------------------------

PLAIN = {
    "temperatur: 1": "options.yaml:1: unknown option 'temperatur' (did you mean 'temperature'?)",
    "# sampling\ntemperature: hot": "options.yaml:2: temperature: expected a number, got hot",
    "temperature: null": "options.yaml:1: temperature is null: give it a value, or leave it out",
    "xyz: 42": "options.yaml:1: unknown option 'xyz'; there are ...temperature, system_prompt...",
}


def plain_parser() -> Parser:
    """As a command has it that is no training."""
    parser = Parser(prog="plain")
    parser.add_argument("--config", action=Recipe, help="a recipe")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the choice")
    parser.add_argument("--system_prompt", type=str | None, default=None, help="what comes first")
    return parser


def test_plain_options_come_from_recipes_and_flags_win(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text("temperature: 0.7\nsystem_prompt: Be brief.\n")
    Path("second.yaml").write_text("temperature: 0.5\n")
    cfg = plain_parser().parse(["--temperature", "0.2", "--config", "first.yaml", "second.yaml"])
    assert (cfg.temperature, cfg.system_prompt) == (0.2, "Be brief.")
    cfg = plain_parser().parse(["--config", "first.yaml", "--config", "second.yaml"])
    assert (cfg.temperature, cfg.system_prompt) == (0.5, "Be brief.")


@pytest.mark.parametrize("text", PLAIN)
def test_a_mistake_among_plain_options_is_one_line_with_its_place(text: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("options.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        plain_parser().parse(["--config", "options.yaml"])
    assert ended.value.code == 2
    assert matches(capsys.readouterr().err, f"bumblebee: {PLAIN[text]}\n")
