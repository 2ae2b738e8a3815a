"""User errors end in one line that names the option, where it was set and what would be valid, and write nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers.recipe_files import RECIPE, SAMPLES

from bumblebee.cli.errors.reporting import fail
from bumblebee.cli.errors.value_errors import name_option
from bumblebee.cli.main import main
from bumblebee.cli.parser import ConfigFile, Parser

DATA, OPTIMIZER, TRAINER, CALLBACKS = (RECIPE[RECIPE.index(f"\n{name}:") + 1 :].split("\n\n")[0].rstrip() + "\n"
                                       for name in ("data", "optimizer", "trainer", "callbacks"))  # fmt: skip


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def matches(line: str, expected: str) -> bool:
    """Whether a line is the expected one, in which ``...`` stands for anything."""
    return re.fullmatch(".*".join(re.escape(part) for part in expected.split("...")), line) is not None


def unknown(key: str, near: str) -> str:
    return f"unknown option '{key}' (did you mean '{near}'?)"


# Words added to a valid recipe -> the error.
ON_THE_COMMAND_LINE = {
    # unknown
    "--trainer.max_step 3": unknown("trainer.max_step", "trainer.max_steps"),
    "--trainer.max_step=3": unknown("trainer.max_step", "trainer.max_steps"),
    "--trainr.max_steps 3": unknown("trainr.max_steps", "trainer"),
    "--overwrit": unknown("overwrit", "overwrite"),
    "--data.max_lenght 3": unknown("data.max_lenght", "data.max_length"),
    "--data.init_args.max_lenght 3": unknown("data.max_lenght", "data.max_length"),
    "--optimizer.learning_rate 3": "unknown option 'optimizer.learning_rate'; available options: lr, betas, ...",
    "--task.model.attenton sdpa": unknown("task.model.attenton", "task.model.attention"),
    "--task.model.config.hiden_size 3": unknown("task.model.config.hiden_size", "task.model.config.hidden_size"),
    "--callbacks.checkpoint.evry 3": unknown("callbacks.checkpoint.evry", "callbacks.checkpoint.every"),
    "--callbacks.chekpoint=null": "callbacks.chekpoint: cannot remove a callback that no recipe defines (did you mean ...)",
    # of the wrong type
    "--trainer.max_steps many": "trainer.max_steps: expected an integer or null, got 'many'",
    "--trainer.epochs lots": "trainer.epochs: expected a number, got 'lots'",
    "--seed x": "seed: expected an integer, got 'x'",
    "--data.max_length 1.5": "data.max_length: expected an integer, got 1.5",
    "--overwrite maybe": "overwrite: expected true or false, got 'maybe'",
    "--optimizer.lr high": "optimizer.lr: expected a number, got 'high'",
    "--optimizer.betas [0.9]": "optimizer.betas: expected a list of 2 elements, got [0.9]",
    "--trainer.precision fp8": "trainer.precision: expected fp32, bf16 or fp16, got 'fp8'",
    "--trainer.zero_stage 4": "trainer.zero_stage: expected 0, 1, 2, 3 or null, got 4",
    "--data.on_bad_record ignore": "data.on_bad_record: expected stop or skip, got 'ignore'",
    "--callbacks.checkpoint.every x": "callbacks.checkpoint.every: expected an integer or null, got 'x'",
    "--trainer.micro_batch_size null": "trainer.micro_batch_size: expected an integer, got null",
    "--optimizer.lr null": "optimizer.lr must not be null; set a value or leave the option out",
    # without a value
    "--data.files": "--data.files: expected a value",
    "--trainer.resume": "--trainer.resume: expected a value",
    "--trainer.max_steps": "--trainer.max_steps: expected a value",
    "--no_output_dir": "--output_dir: expected a value",
    "--config": "--config: expected a value",
    "--config=": "--config: expected a value",
    # out of range
    "--trainer.micro_batch_size 0": "trainer.micro_batch_size must be at least 1, got 0",
    "--trainer.epochs -1": "trainer.epochs must be more than 0, got -1.0",
    "--trainer.epochs nan": "trainer.epochs: expected a number, got 'nan'",
    "--trainer.gradient_clip 0": "trainer.gradient_clip must be more than 0, got 0.0; null turns clipping off",
    "--data.max_length 0": "data.max_length must be at least 1, got 0",
    "--schedule.warmup_ratio 2": "schedule.warmup_ratio must be in [0, 1), got 2.0",
    "--callbacks.checkpoint.every 0": "callbacks.checkpoint.every must be at least 1 or null, got 0",
    "--task.model.config.hidden_size 33": "task.model.config.hidden_size 33 is not a multiple of num_attention_heads 4...",
    "--task.model.config.rope_scaling.rope_type warp": "task.model.config.rope_scaling.rope_type: ...'warp'; available: ...",
    "--task.model.attention warp": "task.model.attention: unknown attention 'warp'; available: ...",
    "--optimizer.lr -1": "...learning rate: -1...",
    "--trainer.device gpu": "trainer.device: unknown device 'gpu': expected auto, cpu, cuda or cuda:N",
    "--trainer.device cuda:99": "trainer.device 'cuda:99' does not exist: ... GPUs are visible",
    "--data.validation_ratio 0.1 --data.validation_files data.jsonl": "data.validation_files and validation_ratio are ...",
    # classes
    "--optimizer torch.optim.Adamm": "optimizer: torch.optim has no class 'Adamm' (did you mean 'Adam' ...?)",
    "--schedule bumblebee.optim.Cosin": "schedule: bumblebee.optim has no class 'Cosin' (did you mean 'Cosine'?)",
    "--optimizer torch.nn.Linear": "optimizer: torch.nn.Linear is not an Optimizer",
    "--schedule datamodules.Pretrain": "schedule: datamodules.Pretrain is not a Schedule",
    "--callbacks.mine bumblebee.Trainer": "callbacks.mine: bumblebee.Trainer is not a Callback",
    "--optimizer Adamm": "optimizer: expected a class path, got 'Adamm' (did you mean 'torch.optim.Adam'?)",
    "--schedule cosin": "schedule: expected the class_path of a Schedule, got 'cosin' (did you mean 'bumblebee.optim.Cosine'?)",
    "--callbacks.stop callbacks.EarlyStoping": "callbacks.stop: callbacks has no class 'EarlyStoping' (did you mean ...)",
    "--callbacks.stop 5": "callbacks.stop: expected the class_path of a Callback, got 5; shipped classes: ...",
    "--config recipes/models/tiny.yaml": "--config: recipes/models/tiny.yaml describes a bumblebee.Bumblebee, not a recipe: "
    "use --task.model recipes/models/tiny.yaml together with a recipe",
    # parts that cannot work in this run
    "--schedule ReduceOnPlateau": (
        "schedule.class_path: bumblebee.optim.ReduceOnPlateau needs validations, or it never changes the learning rate: "
        "set data.validation_ratio or data.validation_files, and add callbacks.Validation"
    ),
    "--schedule ReduceOnPlateau --data.validation_ratio 0.1": "...needs validations, or it never changes ...",
    "--callbacks.stop EarlyStopping": "callbacks: EarlyStopping needs validation samples: ...",
    "--callbacks.checkpoint.best 1": "callbacks: Checkpoint needs validation samples: ...",
    "--callbacks.baseline BigramBaseline": "callbacks: BigramBaseline needs validation samples: ...",
    "--callbacks.validation Validation": "callbacks: Validation needs validation samples: ...",
    # options of another class, or without their group
    "--task.model.folder runs/sft": "unknown option 'task.model.folder': not an option of bumblebee.Bumblebee, but of "
    "bumblebee.Bumblebee.from_pretrained or bumblebee.HuggingFaceModel.from_pretrained (--task.model CLASS); "
    "see recipes/continue_pretrain.yaml",
    "--schedule.decay_ratio 1": "unknown option 'schedule.decay_ratio': not an option of bumblebee.optim.Cosine, but of "
    "bumblebee.optim.WarmupStableDecay (--schedule CLASS)",
    "--trust_remote_code": unknown("trust_remote_code", "task.model.trust_remote_code"),
    "--max_steps 3": unknown("max_steps", "trainer.max_steps"),
    "--lr 3": unknown("lr", "optimizer.lr"),
    # files
    "--data.files dato.jsonl": "data.files: file not found: dato.jsonl; did you mean 'data.jsonl'...",
    "--data.files path/to/data.jsonl": "data.files: 'path/to/data.jsonl' is a placeholder; replace it with...",
    "--data.files *.parquet": "data.files: no file matches '*.parquet'",
    "--data.files .": "data.files: '.' is a folder; name the files in it, for example './*.jsonl'",
    "--data.files recipe.yaml": "data.files: 'recipe.yaml': unsupported file type '.yaml'; supported: ...",
    '--data.files {"path":"data.jsonl","wieght":2} data.jsonl': (
        "data.files: unknown key 'wieght' in the entry of 'data.jsonl' (did you mean 'weight'?); allowed keys: path, weight"
    ),
    '--data.files [{"path":"data.jsonl","weight":0}]': "data.files: the weight of 'data.jsonl' must be a number above 0, got 0",
    '--data.files [{"weight":2}]': "data.files: expected a path in each entry, such as ...",
    "--data.files.0.weight 3": "recipe.yaml:21: data.files: expected a path in each entry, such as ...",
    "--data.files data.jsonl dato.jsonl": "data.files: file not found: dato.jsonl...",
    "--data.files empty.jsonl": "data.files: there is no text to train on in empty.jsonl",
    "--data.files bad.jsonl": "data.files: bad.jsonl:2: no key 'text'; the record's keys: 'txt'",
    "--data.tokenizer nowhere": "data.tokenizer: folder not found: nowhere",
    "--data.tokenizer .": "data.tokenizer: . is not a tokenizer folder: it has no tokenizer.json",
    "--task.model.config.vocab_size 399": "the tokenizer has 400 ids, the model's vocab_size is 399; use ...",
    "--trainer.resume nowhere": "trainer.resume: nowhere is not a complete checkpoint; checkpoints in out: none",
    "--trainer.deepspeed nope.json": "trainer.deepspeed: cannot read nope.json: ...",
    "--output_dir data.jsonl": "output_dir: data.jsonl is a file, not a folder",
    "--output_dir /proc/nowhere/out": "output_dir: cannot write to /proc/nowhere/out: No such file or directory",
    "--config nope.yaml": "--config: file not found: nope.yaml...",
    "--config recipe.yml": "--config: file not found: recipe.yml (did you mean 'recipe.yaml'?)",
    "--config tok": "--config: tok is a folder, not a file",
    "--task.model recipes/tiny.yaml": "task.model: file not found: recipes/tiny.yaml",
    "--task.model recip.yaml": "task.model: file not found: recip.yaml (did you mean 'recipe.yaml'?)",
    "--output_dir=": "output_dir must not be empty",
    "--seed -1": "seed must be in [0, 2**63), got -1",
    "--trainer.deepspeed.zero_optimization.stage 3 --trainer.zero_stage 2": "trainer.zero_stage is 2, but "
    "trainer.deepspeed.zero_optimization.stage is 3: set trainer.zero_stage to 3, or to null to follow trainer.deepspeed",
    "--trainer.deepspeed.zero_optimization.overlap_comm true": "trainer.deepspeed.zero_optimization.overlap_comm is true, ...",
    "--trainer.deepspeed.zero_optimization.overlap_com true": (
        "trainer.deepspeed.zero_optimization.overlap_com is not an option of DeepSpeed (did you mean 'overlap_comm'?)"
    ),
    "--trainer.deepspeed.zero_optimization.allgather_bucket_size 7": "trainer.deepspeed: DeepSpeed refuses this ...",
    "--trainer.groups [{patern:x}]": "unknown option 'trainer.groups.patern:x' (did you mean 'trainer.groups.pattern'?)",
    "--optimizer.class_path torch.optim.SGDD": "optimizer: torch.optim has no class 'SGDD' (did you mean 'SGD' or 'ASGD'?)",
}


@pytest.mark.parametrize("words", ON_THE_COMMAND_LINE)
def test_error_on_the_command_line(words, workdir, error_line):
    (workdir / "recipes" / "models").mkdir(parents=True)
    shutil.copy(SAMPLES.parent / "models" / "tiny.yaml", workdir / "recipes" / "models")
    before = files(workdir)
    line = error_line("fit", "--config", "recipe.yaml", *words.split())
    assert matches(line, ON_THE_COMMAND_LINE[words]), line
    assert files(workdir) == before


NOT_A_MAPPING = "recipe.yaml: expected options such as 'seed: 42', or groups such as 'trainer:' with options below them"

# A change of the recipe -> the error. Unless it names another line, it begins with the line of the change.
IN_THE_RECIPE = [
    ("trainer:", "trainr:", "recipe.yaml:33: " + unknown("trainr.max_steps", "trainer")),
    ("max_steps: 2", "max_step: 2", unknown("trainer.max_step", "trainer.max_steps")),
    ("max_length: 32", "max_lenght: 32", unknown("data.max_lenght", "data.max_length")),
    ("lr: 1.0e-3", "learning_rate: 1", "unknown option 'optimizer.learning_rate'; available options: lr, ..."),
    ("warmup_ratio: 0.1", "warmup_ration: 1", unknown("schedule.warmup_ration", "schedule.warmup_ratio")),
    ("hidden_size: 32", "hiden_size: 32", unknown("task.model.config.hiden_size", "task.model.config.hidden_size")),
    ("    model:\n", "    modell:\n", unknown("task.modell", "task.model")),
    ("      every: 1", "      evry: 1", unknown("callbacks.checkpoint.evry", "callbacks.checkpoint.every")),
    ("max_steps: 2", "max_steps: two", "trainer.max_steps: expected an integer or null, got 'two'"),
    ("lr: 1.0e-3", "lr: high", "optimizer.lr: expected a number, got 'high'"),
    ("lr: 1.0e-3", "lr:", "optimizer.lr must not be null; set a value or leave the option out"),
    ("seed: 1", "seed:", "seed must not be null; set a value or leave the option out"),
    ("hidden_size: 32", "hidden_size: wide", "task.model.config.hidden_size: expected an integer, got 'wide'"),
    ("hidden_size: 32", "hidden_size: 33", "task.model.config.hidden_size 33 is not a multiple of ..."),
    ("precision: fp32", "precision: fp8", "trainer.precision: expected fp32, bf16 or fp16, got 'fp8'"),
    ("device: cpu", "zero_stage: 4", "trainer.zero_stage: expected 0, 1, 2, 3 or null, got 4"),
    ("micro_batch_size: 2", "micro_batch_size: 0", "trainer.micro_batch_size must be at least 1, got 0"),
    ("      every: 1", "      every: 0", "callbacks.checkpoint.every must be at least 1 or null, got 0"),
    ("device: cpu", "deepspeed: {zero_optimization: {overlap_comm: true}}",
     "trainer.deepspeed.zero_optimization.overlap_comm is true, which needs trainer.zero_stage 2 or 3, not 1: ..."),
    ("files: data.jsonl", "files: dato.jsonl", "data.files: file not found: dato.jsonl; did you mean 'data.jsonl'..."),
    ("files: data.jsonl", "files: <your data>", "data.files: '<your data>' is a placeholder; ..."),
    ("files: data.jsonl", "files: bad.jsonl", "data.files: bad.jsonl:2: no key 'text'; the record's keys: 'txt'"),
    ("tokenizer: tok", "tokenizer: nowhere", "data.tokenizer: folder not found: nowhere"),
    ("    tokenizer: tok\n", "", "recipe.yaml:18: missing required option 'data.tokenizer'"),
    ("datamodules.Pretrain", "datamodules.Pretrian",
     "recipe.yaml:18: data: datamodules has no class 'Pretrian' (did you mean 'Pretrain'?)"),
    ("datamodules.Pretrain", "datamodule.Pretrain", "recipe.yaml:18: data: no module named 'datamodule'"),
    ("bumblebee.LanguageModeling", "bumblebee.Tokenizer", "recipe.yaml:4: task: bumblebee.Tokenizer is not a Task"),
    ("bumblebee.Bumblebee\n", "bumblebee.Tokenizer\n", "recipe.yaml:7: task.model: bumblebee.Tokenizer is not a Module"),
    ("torch.optim.AdamW", "torch.nn.Linear", "recipe.yaml:25: optimizer: torch.nn.Linear is not an Optimizer"),
    ("callbacks.Checkpoint", "callbacks.Chekpoint",
     "recipe.yaml:40: callbacks.checkpoint: callbacks has no class 'Chekpoint' (did you mean 'Checkpoint'?)"),
    ("callbacks.Checkpoint", "bumblebee.Trainer", "recipe.yaml:40: callbacks.checkpoint: bumblebee.Trainer is not a Callback"),
    ("  class_path: datamodules.Pretrain\n", "",
     "recipe.yaml:18: data: expected the class_path of a DataModule; shipped classes: ..."),
    ("    class_path: callbacks.Checkpoint\n", "",
     "recipe.yaml:42: unknown option 'callbacks.checkpoint.every': bumblebee.Callback has no options (is class_path missing?)"),
    (TRAINER, "trainer: 3\n", "trainer: expected a mapping of options, got 3"),
    (DATA, "data: hello\n", "data: expected the class_path of a DataModule, got 'hello'; shipped classes: ..."),
    (CALLBACKS, "callbacks: 3\n", "callbacks: expected a mapping of options, got 3"),
    ("seed: 1", "seed: [1", "recipe.yaml:2: invalid YAML: ..."),
    ("  max_steps: 2", "\tmax_steps: 2", "invalid YAML: found character '\\t' that cannot start any token"),
    ("seed: 1", "seed: 1\nseed: 2", "recipe.yaml:2: duplicate key 'seed'"),
    ("    files: data.jsonl", "    files: data.jsonl\n    files: other.jsonl", "recipe.yaml:22: duplicate key 'files'"),
    (RECIPE, "- 1\n- 2\n", NOT_A_MAPPING),
    (RECIPE, "hello\n", NOT_A_MAPPING),
    (RECIPE, "", NOT_A_MAPPING),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "expected"), IN_THE_RECIPE, ids=[expected[:60] for _, _, expected in IN_THE_RECIPE]
)
def test_error_in_the_recipe_names_the_line(before, after, expected, workdir, error_line):
    assert RECIPE.count(before) == 1
    (workdir / "recipe.yaml").write_text(RECIPE.replace(before, after))
    at = 1 + RECIPE[: RECIPE.index(before)].count("\n")
    existing = files(workdir)
    line = error_line("fit", "--config", "recipe.yaml")
    assert matches(line, expected if expected.startswith("recipe.yaml:") else f"recipe.yaml:{at}: {expected}"), line
    assert files(workdir) == existing


@pytest.mark.parametrize(("group", "name"), [(DATA, "data"), (OPTIMIZER, "optimizer")])
def test_missing_group_is_named(group, name, workdir, error_line):
    (workdir / "recipe.yaml").write_text(RECIPE.replace(group, ""))
    assert error_line("fit", "--config", "recipe.yaml") == f"missing required option '{name}'"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fitt", "unknown command 'fitt' (did you mean 'fit'?); available commands: fit, validate, ..."),
        ("--seed 3", "unknown command '--seed'; available commands: fit, validate, ..."),
        ("fit", "missing required options ...: pass a recipe, such as --config recipes/pretrain.yaml"),
        ("fit --hel", unknown("hel", "help")),
        ("fit --config recipe.yaml junk", "--config: file not found: junk"),
        ("validate --config recipe.yaml", "recipe.yaml:2: output_dir: folder not found: out"),
        ("validate --config recipe.yaml --model tok", "...tok is not a model folder: config.json not found"),
        ("consolidate", "missing required arguments 'checkpoint', 'output'"),
        ("generate --model tok", "prompt: give either --prompt TEXT or --prompts FILE"),
        ("generate --model nowhere --prompt x", "model: folder not found: nowhere"),
        ("generate --model nowhere --promt x", "unknown option 'promt' (did you mean 'prompt' or 'prompts'?)"),
        (
            "generate --model tok --prompt x --do_sample",
            "unknown option 'do_sample': use temperature; 0 always takes the most likely token, above 0 samples",
        ),
        (
            "generate --model Qwen/Qwen3-0.6B --prompt x",
            "model: folder not found: Qwen/Qwen3-0.6B; to use the model from the Hugging Face Hub, run: "
            "...hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B, and name models/Qwen3-0.6B",
        ),
        ("generate --model runs/sft --prompt x", "model: folder not found: runs/sft"),
        ("generate tok --prompt x", "unexpected argument 'tok' (did you mean '--model tok'?)"),
        ("fit recipe.yaml", "unexpected argument 'recipe.yaml' (did you mean '--config recipe.yaml'?)"),
        (
            "generate --model tok --prompt two words",
            "unexpected argument 'words'; options are written ...",
        ),
        ("generate --model tok --zzz x", "unknown option 'zzz'; available options: model, ..., include_stop_str_in_output"),
        ("tokenizer --files nope.txt --vocab_size 300 --output new", "files: file not found: nope.txt"),
        ("tokenizer --files data.jsonl --vocab_size 30 --output new", "vocab_size must be at least 259..."),
        ("tokenizer --files data.jsonl --vocab_size 300 --output tok", "output: tok already contains a tokenizer; ..."),
        ("tokenizer --files bad.jsonl --vocab_size 300 --output new", "files: bad.jsonl:2: no key 'text'..."),
    ],
)
def test_error_of_other_commands(words, expected, workdir, error_line):
    existing = files(workdir)
    line = error_line(*words.split())
    assert matches(line, expected), line
    assert files(workdir) == existing


def test_folder_of_another_run_is_refused(workdir, error_line):
    main(["fit", "--config", "recipe.yaml"])
    existing = files(workdir)
    line = error_line("fit", "--config", "recipe.yaml")
    assert line == (
        "recipe.yaml:2: output_dir: out already holds a run: continue it with --trainer.resume auto,"
        " replace it with --overwrite, or choose another folder"
    )
    assert files(workdir) == existing


# -- plain options, without the groups of a recipe -----------------------------------------------------------------------

PLAIN = {
    "temperatur: 1": "options.yaml:1: unknown option 'temperatur' (did you mean 'temperature'?)",
    "# sampling\ntemperature: hot": "options.yaml:2: temperature: expected a number, got 'hot'",
    "temperature: null": "options.yaml:1: temperature must not be null; set a value or leave the option out",
    "xyz: 42": "options.yaml:1: unknown option 'xyz'; available options: ...temperature, system_prompt...",
}


def plain_parser() -> Parser:
    """The parser of a command that takes no recipe."""
    parser = Parser(prog="plain")
    parser.add_argument("--config", action=ConfigFile, help="options")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature")
    parser.add_argument("--system_prompt", type=str | None, default=None, help="system prompt")
    return parser


@pytest.mark.parametrize("text", PLAIN)
def test_error_in_plain_options_names_the_line(text: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("options.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        plain_parser().parse(["--config", "options.yaml"])
    assert ended.value.code == 2
    assert matches(capsys.readouterr().err, f"bumblebee: {PLAIN[text]}\n")


def test_missing_wandb_is_noticed_before_anything_is_written(workdir, error_line, monkeypatch):
    monkeypatch.setattr("callbacks.wandb.find_spec", lambda name: None)
    before = files(workdir)
    line = error_line("fit", "--config", "recipe.yaml", "--callbacks.w", "callbacks.WandB", "--callbacks.w.project", "bees")
    assert line == "callbacks: WandB needs the wandb package: pip install wandb"
    assert files(workdir) == before


REWARDS = """\
task:
  class_path: bumblebee.GRPO
  init_args:
    model: {class_path: bumblebee.Bumblebee, init_args: {config: {hidden_size: 32}}}
    rewards:
      - helpers.reward_functions.lengths
      - class_path: bumblebee.rewards.InWorkers
        init_args:
          reward: {class_path: bumblebee.rewards.ExactAnswer, init_args: {key: answer}}
          timeout: 10
"""
IN_THE_REWARDS = [
    ("reward_functions.lengths", "reward_functions.length",
     "6: task.rewards: helpers.reward_functions has no class or function 'length' (did you mean 'lengths'?)"),
    ("helpers.reward_functions.lengths", "bumblebee.rewards.Matches",
     "6: missing required option 'task.rewards.pattern' of bumblebee.rewards.Matches"),
    ("{class_path: bumblebee.rewards.ExactAnswer, init_args: {key: answer}}", "bumblebee.rewards.Matches",
     "9: missing required option 'task.rewards.reward.pattern' of bumblebee.rewards.Matches"),
    ("reward_functions.lengths", "reward_functions.__name__",
     "5: task.rewards: helpers.reward_functions.__name__ is neither a function nor a class"),
    ("helpers.reward_functions.lengths", "bumblebee.Tokenizer",
     "5: task.rewards: objects of bumblebee.Tokenizer cannot be called: the class has no method __call__"),
    ("timeout: 10", "timeout: 0", "10: task.rewards.timeout must be positive, got 0.0"),
    ("timeout: 10", "process: 1", "10: unknown option 'task.rewards.process' (did you mean 'task.rewards.processes'?)"),
    ("    rewards:\n", "    num_generations: 8\n    rewards:\n", "5: unknown option 'task.num_generations': use group_size"),
    ("    rewards:\n", "    loss_type: dapo\n    rewards:\n",
     "5: unknown option 'task.loss_type': use normalise, advantages, ratio and surrogate; their values for dapo, dr_grpo, gspo,"
     " rloo and others are in docs/rl.md, Published variants"),
    ("timeout: 10", "on_error: skip", "10: task.rewards.on_error: expected a number or stop, got 'skip'"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "expected"), IN_THE_REWARDS)
def test_error_in_a_list_of_rewards_names_the_item(before, after, expected, workdir, error_line):
    Path("rewards.yaml").write_text(REWARDS.replace(before, after))
    line = error_line("fit", "--config", "recipe.yaml", "--config", "rewards.yaml")
    assert line == f"rewards.yaml:{expected}"


def test_a_reward_on_the_command_line_needs_its_options(workdir, error_line):
    Path("rewards.yaml").write_text(REWARDS)
    line = error_line(
        "fit", "--config", "recipe.yaml", "--config", "rewards.yaml", "--task.rewards", "[bumblebee.rewards.Matches]"
    )
    assert line == "missing required option 'task.rewards.pattern' of bumblebee.rewards.Matches"


def test_an_error_of_another_rank_only_is_printed_by_that_rank(monkeypatch, capsys):
    monkeypatch.setattr("bumblebee.cli.errors.reporting._HEAD_START", 0)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        fail("no such judge")
    assert ended.value.code == 2 and capsys.readouterr().err == "bumblebee: rank 3: no such judge\n"


def test_an_error_of_a_list_is_not_taken_for_one_of_an_option_that_it_mentions():
    config = {"task": {"rewards": [{"class_path": "bumblebee.rewards.Judge", "init_args": {"model": "m"}}]}}
    message = "task.rewards: Judge: there is no model 'm'"
    assert name_option(message, config, []) == message
