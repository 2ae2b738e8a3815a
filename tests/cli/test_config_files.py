"""Config files compose: later files override earlier ones, the command line overrides all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.cli.config_files import plain
from bumblebee.cli.main import main
from bumblebee.cli.parser import ConfigFile, Parser


def printed(capsys, *words: str) -> dict:
    """The resolved recipe that ``--print_config`` prints."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert ended.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_command_line_overrides_recipes_in_any_position(workdir, capsys):
    for words in (["--trainer.max_steps", "9", "--config", "recipe.yaml"], ["--config=recipe.yaml", "--trainer.max_steps=9"]):
        config = printed(capsys, *words)
        assert config["trainer"]["max_steps"] == 9
        assert config["trainer"]["micro_batch_size"] == 2
        assert config["trainer"]["log_every"] == 1


def test_init_args_may_be_omitted_in_every_group(workdir, capsys):
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


def test_new_class_drops_options_it_does_not_have(workdir, capsys):
    config = printed(capsys, "--config", "recipe.yaml", "--optimizer", "torch.optim.SGD", "--optimizer.momentum", "0.9")
    assert config["optimizer"]["class_path"] == "torch.optim.SGD"
    assert config["optimizer"]["init_args"]["momentum"] == 0.9
    assert "betas" not in config["optimizer"]["init_args"]


def test_new_schedule_keeps_only_the_warm_up(workdir, capsys):
    (workdir / "cosine.yaml").write_text(
        "schedule: {class_path: bumblebee.optim.Cosine, init_args: {warmup_steps: 3, min_ratio: 0.1}}\n"
    )
    (workdir / "more.yaml").write_text("schedule: {init_args: {min_ratio: 0.3}}\n")

    def schedule(*words: str) -> dict:
        return printed(capsys, "--config", "recipe.yaml", "cosine.yaml", *words)["schedule"]["init_args"]

    assert schedule()["min_ratio"] == 0.1
    changed = schedule("--schedule", "bumblebee.optim.ReduceOnPlateau")
    assert (changed["warmup_steps"], changed["min_ratio"]) == (3, 0.0)
    assert schedule("--schedule", "linear", "--schedule.min_ratio", "0.2")["min_ratio"] == 0.2
    assert schedule("--schedule.class_path=bumblebee.optim.Cosine")["min_ratio"] == 0.1
    assert schedule("more.yaml", "--schedule", "linear")["min_ratio"] == 0.3


def test_recipes_compose_and_callbacks_add_up(workdir, capsys):
    (workdir / "second.yaml").write_text(
        "trainer: {max_steps: 7}\n"
        "callbacks:\n"
        "  checkpoint: {class_path: callbacks.Checkpoint, init_args: {every: 5}}\n"
        "  history: callbacks.MetricsHistory\n"
    )
    (workdir / "third.yaml").write_text("seed: 3\ncallbacks:\n  history:\n")
    base = printed(capsys, "--config", "recipe.yaml")
    config = printed(capsys, "--config", "recipe.yaml", "--config", "second.yaml", "--config=third.yaml")
    assert config == printed(capsys, "--config", "recipe.yaml", "second.yaml", "third.yaml")
    assert config["trainer"] == {**base["trainer"], "max_steps": 7}
    assert config["seed"] == 3
    assert config["callbacks"]["checkpoint"]["init_args"]["every"] == 5
    assert config["callbacks"]["history"] is None
    assert config["data"] == base["data"]


def test_transforms_of_several_recipes_add_up(workdir, capsys):
    transforms = "task:\n  init_args:\n    transforms:"
    lora = f"{transforms} [{{class_path: bumblebee.lora.LoRA, init_args: {{rank: 2}}}}]\n"
    for name, text in (("lora", lora), ("none", f"{transforms} null\n"), ("else", "seed: 1\n")):
        (workdir / f"{name}.yaml").write_text(text)
    (workdir / "extra.yaml").write_text(
        f"{transforms} [bumblebee.transforms.Compile, bumblebee.transforms.ActivationCheckpointing]\n"
    )

    def names(*words: str) -> list[str]:
        transforms = printed(capsys, "--config", "recipe.yaml", *words)["task"]["init_args"]["transforms"] or []
        return [f"{each['class_path'].split('.')[-1]} {each['init_args'].get('rank', '')}".strip() for each in transforms]

    assert names("lora.yaml", "extra.yaml") == ["Compile", "ActivationCheckpointing", "LoRA 2"]
    assert names("lora.yaml", "extra.yaml", "--task.transforms.rank", "3")[-1] == "LoRA 3"
    assert names("lora.yaml", "else.yaml") == names("lora.yaml", "lora.yaml") == ["LoRA 2"]
    assert names("lora.yaml", "none.yaml") == []


def test_callbacks_are_added_and_removed_on_the_command_line(workdir, capsys):
    words = ["--callbacks.checkpoint=null", "--callbacks.bar", "callbacks.ProgressBar"]
    config = printed(capsys, "--config", "recipe.yaml", *words)
    assert config["callbacks"]["checkpoint"] is None
    assert config["callbacks"]["bar"]["class_path"] == "callbacks.ProgressBar"


@pytest.mark.parametrize(
    ("words", "class_path"),
    [
        (["--optimizer", "adamw"], "torch.optim.AdamW"),
        (["--optimizer=SGD", "--optimizer.momentum", "0.9"], "torch.optim.SGD"),
        (["--schedule", "linear"], "bumblebee.optim.Linear"),
        (["--callbacks.stop", "callbacks.EarlyStopping"], "callbacks.EarlyStopping"),
        (["--callbacks.stop", "EarlyStopping", "--callbacks.stop.patience", "3"], "callbacks.EarlyStopping"),
    ],
)
def test_command_line_may_name_a_shipped_class_without_module(words, class_path, workdir, capsys):
    config = printed(capsys, "--config", "recipe.yaml", *words)
    for part in words[0][2:].partition("=")[0].split("."):
        config = config[part]
    assert config["class_path"] == class_path


def test_printed_config_is_the_same_config(workdir, capsys):
    words = ["--config", "recipe.yaml", "--trainer.gradient_clip=null", "--callbacks.checkpoint=null", "--data.files", "a", "b"]
    config = printed(capsys, *words)
    assert config["trainer"]["gradient_clip"] is None and config["data"]["init_args"]["files"] == ["a", "b"]
    (workdir / "printed.yaml").write_text(yaml.safe_dump(config))
    assert printed(capsys, "--config", "printed.yaml") == config


def test_files_may_have_weights(workdir, capsys):
    entry = {"path": "b", "weight": 2}
    for words in (["a", json.dumps(entry)], [json.dumps(["a", entry])], ["[a, {path: b, weight: 2}]"]):
        config = printed(capsys, "--config", "recipe.yaml", "--data.files", *words)
        assert config["data"]["init_args"]["files"] == ["a", entry]
    (workdir / "printed.yaml").write_text(yaml.safe_dump(config))
    assert printed(capsys, "--config", "printed.yaml") == config
    more = printed(capsys, "--config", "recipe.yaml", "--data.files+", json.dumps(entry))
    assert more["data"]["init_args"]["files"] == ["data.jsonl", entry]


def test_saved_recipe_is_the_same_config_in_any_folder(workdir, capsys, monkeypatch):
    words = ["--config", "recipe.yaml", "--trainer.gradient_clip", "null", "--trainer.max_steps", "1"]
    main(["fit", *words])
    config = printed(capsys, *words)
    (workdir / "elsewhere").mkdir()
    monkeypatch.chdir(workdir / "elsewhere")
    saved = printed(capsys, "--config", "../out/recipe.yaml")
    config.pop("overwrite"), saved.pop("overwrite")
    assert saved == config


def test_validate_reproduces_the_validation_of_the_run(workdir, capsys):
    held_out = ["--config", "recipe.yaml", "--data.validation_ratio", "0.2"]
    callbacks = ["--callbacks.validation", "callbacks.Validation", "--callbacks.history", "callbacks.MetricsHistory"]
    main(["fit", *held_out, *callbacks])
    lines = [json.loads(line) for line in (workdir / "out" / "metrics.jsonl").read_text().splitlines()]
    [measured] = [line for line in lines if "validation_loss" in line]
    capsys.readouterr()
    main(["validate", *held_out])
    metrics = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert set(metrics) == {"validation_loss", "validation_perplexity", "validation_bits_per_byte"}
    assert all(math.isclose(float(value), measured[name], rel_tol=1e-5) for name, value in metrics.items())


@given(st.lists(st.sampled_from(["a", "init_args", "dict_kwargs", "model", "lr"]), max_size=5))
def test_plain_key_omits_init_args(parts):
    assert plain(".".join(parts)) == ".".join(part for part in parts if part not in ("init_args", "dict_kwargs"))


def plain_parser() -> Parser:
    """The parser of a command that takes no recipe."""
    parser = Parser(prog="plain")
    parser.add_argument("--config", action=ConfigFile, help="options")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    parser.add_argument("--system_prompt", type=str | None, default=None, help="system prompt")
    return parser


def test_command_line_overrides_plain_options_of_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text("temperature: 0.7\nsystem_prompt: Be brief.\n")
    Path("second.yaml").write_text("temperature: 0.5\n")
    cfg = plain_parser().parse(["--temperature", "0.2", "--config", "first.yaml", "second.yaml"])
    assert (cfg.temperature, cfg.system_prompt) == (0.2, "Be brief.")
    cfg = plain_parser().parse(["--config", "first.yaml", "--config", "second.yaml"])
    assert (cfg.temperature, cfg.system_prompt) == (0.5, "Be brief.")


# The file that Hugging Face's Trainer and LLaMA-Factory use for ZeRO-3.
DS_Z3_CONFIG = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "steps_per_print": 2000, "wall_clock_breakdown": False,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip


@pytest.mark.slow
def test_a_deepspeed_file_with_auto_values_sets_the_stage(workdir):
    (workdir / "ds_z3_config.json").write_text(json.dumps(DS_Z3_CONFIG))
    words = ["--trainer.deepspeed", "ds_z3_config.json", "--callbacks.summary", "callbacks.RunSummary"]
    main(["fit", "--config", "recipe.yaml", *words])
    summary = json.loads((workdir / "out" / "summary.json").read_text())
    assert summary["device"]["zero_stage"] == 3
    assert (workdir / "out" / "model.safetensors").is_file()
