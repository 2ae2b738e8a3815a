"""``bumblebee validate``: compute the validation metrics of a trained model on the validation data of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from jsonargparse import Namespace

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser
from bumblebee.cli.recipe_options import recipe_command_parser, require_validation


def parser() -> Parser:
    """Return the options of the command."""
    options = recipe_command_parser("validate")
    options.add_argument("--model", type=str | None, default=None, help="model folder; null: the recipe's output_dir")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    replace_model(cfg, cfg.pop("model") or cfg.output_dir)
    with user_errors(cfg, options.words):
        from bumblebee.distributed import process_group
        from bumblebee.recipe import build
        from bumblebee.training import loader
        from bumblebee.training.validation import validation_sums

        run = build(cfg, nullcontext)  # whole at any ZeRO stage: there is no engine to gather partitions
        device = process_group.pick_device(run.trainer.device_name)
        run.data.setup(run.seed)
        run.task.setup(run.data)
        run.task.begin_validation(device)
        require_validation(run.data.validation)
    model = run.task.model.to(device).eval()
    batches = loader.validation_batches(run.data, run.trainer.micro_batch_size, 0, 1)
    on_device = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
    for name, value in run.task.validation_metrics(validation_sums(run.task, model, on_device)).items():
        print(f"{name} {value:.6g}")


def replace_model(cfg: Namespace, folder: str) -> None:
    """Make a recipe load its model from the folder of a finished run."""
    args = cfg.task.init_args
    initial = args.model
    loader_path = initial.class_path.removesuffix(".from_pretrained") + ".from_pretrained"
    args.model = Namespace(class_path=loader_path, init_args=Namespace(folder=folder))
    if args.get("reference") in ("auto", "copy", "adapters_off") and "folder" in initial.get("init_args", {}):
        args.reference = initial.init_args.folder  # the reference model of the run
