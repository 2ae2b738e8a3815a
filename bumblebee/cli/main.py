"""The command line: ``bumblebee COMMAND --options``. Parse, build, call.

Only the parser of the named command is made, and torch is imported when there is something to compute, so that help is
instant. What a user got wrong ends in one line and exit code 2; a traceback means that we got something wrong.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from bumblebee.shared_packages import NameCollision, prefer_ours

prefer_ours()  # on import, so that spawned processes, which import this module again, find our packages too

COMMANDS = {
    "fit": "train what a recipe describes",
    "validate": "measure a trained model on a recipe's held-out data",
    "preview": "show what a recipe would do, without training",
    "verify": "check that training is exact on this machine, and measure it",
    "generate": "let a model continue texts",
    "chat": "talk to a model in the terminal",
    "serve": "answer OpenAI's clients, and people in a browser",
    "answer": "let a model answer the questions of a recipe's data",
    "plot": "compare runs in one picture",
    "tokenizer": "train a tokenizer on text files",
    "consolidate": "make a model folder from a checkpoint's shards",
    "merge": "make a model folder from a LoRA adapter and its base model",
}
PREVIEW_OPTIONS = ("samples", "ranks", "measure", "gpu", "overwrite")  # beside a recipe's
NO_VALIDATION = "the recipe's data has no validation samples: set data.validation_ratio or data.validation_files"
USAGE = """usage: bumblebee COMMAND [options]

{commands}

bumblebee COMMAND --help lists the options of a command; --log_level debug|info|warning|error works with all of them.
Several devices: torchrun --nproc_per_node N -m bumblebee fit ..., or deepspeed --module bumblebee fit ...
"""


def main(argv: list[str] | None = None) -> None:
    """The program."""
    # Idle OpenMP threads must sleep: spinning, they take the cores from each other. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    find_classes_here()
    claim_package_names()
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank")]
    words = configure_logging(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items())), end="")
        return
    if words[0] == "--version":
        from bumblebee import __version__

        print(__version__)
        return
    if words[0] not in COMMANDS:
        from bumblebee.cli.parser import fail
        from bumblebee.formatting import hint

        fail(f"unknown command {words[0]!r}{hint(words[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
    run: Callable[[list[str]], None] = globals()[words[0]]
    try:
        run(words[1:])
    except NameCollision as error:  # of serve, which only some commands import
        from bumblebee.cli.parser import fail

        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # whoever read has seen enough, as ``head`` does; what is still to be flushed goes nowhere
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def claim_package_names() -> None:
    """Share ``callbacks`` and ``datamodules`` with the user's folders of these names before a recipe is parsed."""
    try:
        import_module("callbacks")
        import_module("datamodules")
    except NameCollision as error:
        from bumblebee.cli.parser import fail

        fail(str(error))


def configure_logging(words: list[str]) -> list[str]:
    """Apply ``--log_level LEVEL``, which every command accepts anywhere, and return the words without it."""
    from bumblebee.cli import logs

    level, rest = "info", []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == "--log_level":
            level = value if equals else next(remaining, "")
        else:
            rest.append(word)
    if level not in logs.LEVELS:
        from bumblebee.cli.parser import fail

        fail(f"--log_level: expected {', '.join(logs.LEVELS[:-1])} or {logs.LEVELS[-1]}, got {level or 'nothing'}")
    logs.configure(level)
    return rest


def find_classes_here() -> None:
    """Let a recipe name classes in files of the current folder, as with ``python -m``; last, so that they hide nothing."""
    with suppress(FileNotFoundError):  # the folder has been deleted
        here = os.getcwd()  # in full: while a recipe is read, its folder is the current one
        sys.path.extend({here} - set(sys.path))


# -- fit and validate ----------------------------------------------------------------------------------------------------


def fit(words: list[str]) -> None:
    """Train what a recipe describes."""
    from bumblebee.distributed import process_group
    from bumblebee.recipe import build

    parser = recipe_parser("fit", "Train what a recipe describes.")
    parser.add_argument("--overwrite", type=bool, default=False, help="delete an earlier run in output_dir")
    cfg = parser.parse(words)
    overwrite = cfg.pop("overwrite")
    with user_errors(parser, cfg):
        parts = build(cfg)
    trainer = parts.trainer
    try:
        with user_errors(parser, cfg):
            trainer.setup(
                parts.task, parts.data, parts.optimizer, parts.schedule, parts.callbacks, cfg.output_dir, cfg.seed, overwrite
            )
            if process_group.is_main():
                save_recipe(cfg)
        with user_errors(parser, cfg, until=lambda: trainer.started):
            trainer.run()
    finally:
        trainer.close()


def validate(words: list[str]) -> None:
    """Measure a trained model on a recipe's held-out data."""
    from jsonargparse import Namespace

    parser = recipe_parser("validate", "Measure a trained model on the held-out data of a recipe.")
    parser.add_argument("--model", type=str | None, default=None, help="model folder; by default the recipe's output_dir")
    cfg = parser.parse(words)
    folder = cfg.pop("model") or cfg.output_dir
    kind = cfg.task.init_args.model.class_path.removesuffix(".from_pretrained")  # that of the recipe
    source = Namespace(class_path=f"{kind}.from_pretrained", init_args=Namespace(folder=folder))
    trained, cfg.task.init_args.model = cfg.task.init_args.model, source
    if cfg.task.init_args.get("reference") in ("auto", "copy", "adapters_off") and "folder" in trained.get("init_args", {}):
        cfg.task.init_args.reference = trained.init_args.folder  # what the run has compared with
    with user_errors(parser, cfg):
        from bumblebee.distributed import process_group
        from bumblebee.recipe import build
        from bumblebee.training import loader
        from bumblebee.training.validation import validation_sums

        parts = build(cfg, nullcontext)  # whole, whatever the stage: no engine gathers its parts
        device = process_group.pick_device(cfg.trainer.device)
        parts.data.setup(cfg.seed)
        parts.task.setup(parts.data)
        parts.task.begin_validation(device)
        if not parts.data.validation:
            raise ValueError(NO_VALIDATION)
    model = parts.task.model.to(device).eval()
    batches = loader.validation_batches(parts.data, cfg.trainer.micro_batch_size, 0, 1)
    on_device = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in batches)
    for name, value in parts.task.validation_metrics(validation_sums(parts.task, model, on_device)).items():
        print(f"{name} {value:.6g}")


def preview(words: list[str]) -> None:
    """Show what a recipe would do, without training."""
    from bumblebee.distributed import process_group

    parser = preview_parser()
    cfg = parser.parse(words)
    options = {name: cfg.pop(name) for name in PREVIEW_OPTIONS}
    samples = options.pop("samples")
    if not process_group.is_main():
        return
    with user_errors(parser, cfg):
        from bumblebee.checkpoint.hf_folder import shapes_only
        from bumblebee.preview.preview import Preview, report
        from bumblebee.recipe import build

        with shapes_only():
            parts = build(cfg, nullcontext)
            found = Preview(parts, cfg, **options)
        report(found, samples)


def preview_parser() -> Any:
    """The parser of ``preview``."""
    from jsonargparse.typing import NonNegativeInt, PositiveInt

    parser = recipe_parser("preview", "Show what a recipe would do: samples, counts, steps, parameters, memory, time.")
    parser.add_argument("--samples", type=NonNegativeInt, default=3, help="how many to show")
    parser.add_argument("--ranks", type=PositiveInt | None, default=None, help="devices; null: those of the launcher")
    parser.add_argument("--overwrite", type=bool, default=False, help="as for fit; nothing is deleted here")
    parser.add_argument("--gpu", type=bool, default=False, help="compute the memory of GPUs, also where there is none")
    choices = Literal["auto", "always", "never"]
    parser.add_argument("--measure", type=choices, default="auto", help="run a few steps: if that is quick, always or never")
    return parser


def recipe_parser(command: str, description: str) -> Any:
    """The parser of a recipe's groups."""
    from bumblebee.cli.parser import Parser, Recipe
    from bumblebee.recipe import add_recipe_arguments

    parser = Parser(prog=f"bumblebee {command}", description=description)
    parser.add_argument("--config", action=Recipe, help="a recipe; several compose, later ones win")
    add_recipe_arguments(parser)
    return parser


def save_recipe(cfg: Any) -> None:
    """Write the resolved recipe: given to ``--config`` alone it makes the same run."""
    from bumblebee.recipe import dump

    path = Path(cfg.output_dir) / "recipe.yaml"
    path.write_text(dump(cfg), encoding="utf-8")


# -- generate and tokenizer ----------------------------------------------------------------------------------------------


def generate(words: list[str]) -> None:
    """Let a model continue texts."""
    parser = generate_parser()
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from dataclasses import replace

        from bumblebee.cli.sampling_options import given_sampling
        from bumblebee.inference.batch import BatchGeneration, PromptRecord, check_files, open_output
        from bumblebee.inference.generator import Generator
        from datamodules.prompt_files import read_prompts

        given = given_sampling(cfg)
        check_files(cfg.prompt, cfg.prompts, cfg.output, cfg.overwrite)
        as_lines = cfg.prompt is None or cfg.output is not None or cfg.num_samples > 1 or "logprobs" in given
        prompts = list(read_prompts(cfg.prompts)) if cfg.prompt is None else [PromptRecord.of(cfg.prompt)]
        generator = Generator.from_pretrained(cfg.model, cfg.device, cfg.dtype, cfg.device_map, cfg.trust_remote_code)
        params = replace(generator.defaults, **given)
        batch = BatchGeneration(generator, prompts, params, cfg.num_samples, cfg.chat, cfg.system)
        file = sys.stdout.buffer if cfg.output is None else open_output(cfg.output, cfg.overwrite)
    with run_errors():
        if as_lines:
            batch.write(file)
        else:
            batch.print("" if cfg.chat else cfg.prompt, cfg.stream)


def generate_parser() -> Any:
    """The parser of ``generate``."""
    from bumblebee.cli.parser import Parser
    from bumblebee.cli.sampling_options import add_sampling_options

    parser = Parser(prog="bumblebee generate", description="Let a model continue texts.")
    parser.add_argument("--model", type=str, required=True, help="model folder")
    parser.add_argument("--prompt", type=str | None, default=None, help="the text to continue, or with chat the question")
    help = 'a file of prompts instead: a .txt with one a line, or a .jsonl with {"prompt": ...} or {"messages": [...]}'
    parser.add_argument("--prompts", type=str | None, default=None, help=help)
    parser.add_argument("--output", type=str | None, default=None, help="JSON Lines file for the texts; null prints them")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace an output that is there")
    parser.add_argument("--num_samples", type=int, default=1, help="texts for each prompt")
    parser.add_argument("--chat", type=bool, default=False, help="ask: put prompts into the tokenizer's chat template")
    parser.add_argument("--system", type=str | None, default=None, help="system prompt of chats that bring none")
    parser.add_argument("--stream", type=bool, default=True, help="print each piece as it comes")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", type=str, default="auto", help="auto (the file's), float32, bfloat16 or float16")
    map_help = "auto spreads the layers of a model too large for one GPU over all; null puts it on one device"
    parser.add_argument("--device_map", type=Literal["auto"] | None, default=None, help=map_help)
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that the model's folder names or holds")
    add_sampling_options(parser)
    return parser


def chat(words: list[str]) -> None:
    """Talk to a model in the terminal."""
    from bumblebee.cli.parser import Parser, Recipe
    from bumblebee.cli.sampling_options import add_sampling_options, given_sampling
    from serve.terminal.chat import ChatOptions
    from serve.terminal.commands import UNSUPPORTED_SAMPLING

    parser = Parser(prog="bumblebee chat", description="Talk to a model in the terminal.")
    parser.add_argument("--config", action=Recipe, help="a recipe; several compose, later ones win")
    parser.add_class_arguments(ChatOptions, None)
    add_sampling_options(parser, leave_out=UNSUPPORTED_SAMPLING)
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from serve.terminal.chat import open_chat

        options = ChatOptions(**{name: cfg[name] for name in ChatOptions.__dataclass_fields__})
        session = open_chat(options, given_sampling(cfg))
    raise SystemExit(not session.run() and not session.reader.interactive)


def serve(words: list[str]) -> None:
    """Answer OpenAI's clients, and people in a browser."""
    from bumblebee.cli.parser import Parser, Recipe
    from bumblebee.cli.sampling_options import add_sampling_options, given_sampling
    from serve.serve_options import ServeOptions

    parser = Parser(prog="bumblebee serve", description="Answer OpenAI's clients, and people in a browser.")
    parser.add_argument("--config", action=Recipe, help="a file with options; several compose, later ones win")
    parser.add_class_arguments(ServeOptions, None, skip={"sampling"})
    add_sampling_options(parser, leave_out=("logprobs", "seed", "spelled_ids"))
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from serve.server import Server

        given = {name: cfg[name] for name in ServeOptions.__dataclass_fields__ if name in cfg}
        Server(ServeOptions(**given, sampling=given_sampling(cfg))).run()


def answer(words: list[str]) -> None:
    """Let a model answer the questions of a recipe's data."""
    parser = recipe_parser("answer", "Let a model answer the questions of a recipe's data, and compare.")
    parser.add_argument("--model", type=str | None, default=None, help="model folder; by default the recipe's output_dir")
    parser.add_argument("--split", type=Literal["train", "validation"], default="train", help="of the recipe's data")
    parser.add_argument("--limit", type=int | None, default=None, help="questions asked; null for all")
    parser.add_argument("--show", type=int, default=10, help="questions shown")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that the model's folder names or holds")
    cfg = parser.parse(words)
    folder, split, limit, show, trust = (cfg.pop(name) for name in ("model", "split", "limit", "show", "trust_remote_code"))
    with user_errors(parser, cfg):
        from jsonargparse import Namespace

        from bumblebee.evaluation.exact_match import answered, questions
        from bumblebee.inference.generator import Generator

        data = parser.instantiate(Namespace(data=cfg.data)).data
        data.setup(cfg.seed)
        samples = getattr(data, split)
        if not samples:
            raise ValueError(NO_VALIDATION)
        generator = Generator.from_pretrained(folder or cfg.output_dir, cfg.trainer.device, trust_remote_code=trust)
        found = answered(generator, questions(data, samples), limit)
    for each in found[:: max(1, len(found) // max(show, 1))][:show]:
        verdict = "" if each.right else f"\n   (in the data: {each.expected})"
        behind = f"(question {each.turn}) " if each.turn > 1 else ""
        print(f"{behind}{each.question.strip()}\n-> {each.given.strip()}{verdict}\n")
    right = sum(each.right for each in found)
    print(f"answered as in the data: {right} of {len(found)} questions ({right / len(found):.1%})")


def tokenizer(words: list[str]) -> None:
    """Train a tokenizer on text files."""
    from bumblebee.cli.parser import Parser

    parser = Parser(prog="bumblebee tokenizer", description="Train a byte-level BPE tokenizer on text files.")
    parser.add_argument("--files", type=str | list[str], required=True, help="as in data.files")
    parser.add_argument("--vocab_size", type=int, required=True, help="entries, 256 bytes and 3 special tokens included")
    parser.add_argument("--output", type=str, required=True, help="folder for tokenizer.json and tokenizer_config.json")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace a tokenizer that is there")
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from bumblebee.tokenizer.tokenizer import Tokenizer
        from datamodules import record_files

        if (Path(cfg.output) / "tokenizer.json").exists() and not cfg.overwrite:
            raise ValueError(f"output: {cfg.output} already holds a tokenizer: add --overwrite to replace it")
        texts = (record_files.text_of(record) for file in record_files.expand(cfg.files) for record in record_files.read(file))
        trained = Tokenizer.train(texts, cfg.vocab_size, show_progress=sys.stderr.isatty())
        trained.save_pretrained(cfg.output)
    print(f"{trained.vocab_size} tokens in {cfg.output}")


def consolidate(words: list[str]) -> None:
    """Make a model folder from a checkpoint's shards."""
    from bumblebee.cli.parser import Parser

    parser = Parser(prog="bumblebee consolidate", description="Make a model folder from a checkpoint's shards.")
    parser.add_argument("checkpoint", type=str, help="a run's checkpoint-<step>")
    parser.add_argument("--output", type=str, required=True, help="the model folder")
    parser.add_argument("--dtype", type=str, default="auto", help="auto (as trained), float32, bfloat16 or float16")
    parser.add_argument("--max_shard_size", type=str, default="5GB", help="largest file")
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from bumblebee.checkpoint.consolidate import consolidate as write

        write(cfg.checkpoint, cfg.output, cfg.dtype, cfg.max_shard_size)
    print(f"model folder: {cfg.output}")


def merge(words: list[str]) -> None:
    """Make a model folder from a LoRA adapter and its base model."""
    from bumblebee.cli.parser import Parser

    parser = Parser(prog="bumblebee merge", description="Make a model folder from a LoRA adapter and its base model.")
    parser.add_argument("--adapter", type=str, required=True, help="adapter folder")
    parser.add_argument("--output", type=str, required=True, help="the model folder")
    parser.add_argument("--base", type=str | None, default=None, help="the base model; by default the folder the adapter names")
    parser.add_argument("--dtype", type=str, default="auto", help="auto (the base model's), float32, bfloat16 or float16")
    parser.add_argument("--max_shard_size", type=str, default="5GB", help="largest file")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace a model that is there")
    parser.add_argument("--check", type=bool, default=True, help="compare logits with base and adapter; loads whole models")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that folders name, to compare logits")
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from bumblebee.checkpoint.merge import merge as write

        write(cfg.adapter, cfg.output, cfg.base, cfg.dtype, cfg.max_shard_size, cfg.overwrite)
    print(f"model folder: {cfg.output}", flush=True)
    if cfg.check:
        with user_errors(parser, cfg):
            from bumblebee.lora import differences

            found = differences(cfg.output, cfg.adapter, cfg.base, cfg.trust_remote_code)
        for dtype, (difference, largest) in found.items():
            print(f"computed in {dtype}: a logit differs by {difference:.3g} at most; the largest is {largest:.3g}", flush=True)


def plot(words: list[str]) -> None:
    """Compare runs in one picture."""
    from bumblebee.cli.parser import Parser

    parser = Parser(prog="bumblebee plot", description="Compare the metrics of runs in one picture and one table.")
    parser.add_argument("runs", type=str, nargs="+", help="output folders of runs")
    parser.add_argument("--output", type=str, default="comparison.png", help="the picture; its ending is the format")
    parser.add_argument("--metrics", type=str | list[str], default="loss", help="of metrics.jsonl; each has a panel")
    parser.add_argument("--along", type=Literal["step", "tokens", "epoch", "seconds"], default="step", help="horizontal axis")
    parser.add_argument("--smoothing", type=float, default=0.9, help="share that the smoothed value keeps; 0: none")
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from bumblebee.plotting.run_comparison import RunComparison

        metrics = [cfg.metrics] if isinstance(cfg.metrics, str) else cfg.metrics
        comparison = RunComparison(cfg.runs, metrics, cfg.along, cfg.smoothing)
        comparison.plot(cfg.output)
    print(comparison.table())
    print(f"picture: {cfg.output}")


def verify(words: list[str]) -> None:
    """Check that training is exact on this machine, and measure the machine."""
    from bumblebee.cli.parser import Parser
    from bumblebee.verify.verify_options import VerifyOptions

    parser = Parser(prog="bumblebee verify", description="Check that training is exact on this machine, and measure it.")
    parser.add_class_arguments(VerifyOptions, None)
    cfg = parser.parse(words)
    with user_errors(parser, cfg):
        from bumblebee.verify.verification import Verification

        verification = Verification(VerifyOptions(**cfg.as_dict()))
    with run_errors():
        passed = verification.run()
    raise SystemExit(not passed)


# -- errors --------------------------------------------------------------------------------------------------------------


@contextmanager
def user_errors(parser: Any, cfg: Any, until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Values and files that cannot be used: one line, exit code 2. While building and setting up, never while training.

    Args:
        parser: which has parsed the command line.
        cfg: what it has found there.
        until: once this is true, a ValueError is our mistake and keeps its traceback.
    """
    from bumblebee.cli.errors import explain_refusal
    from bumblebee.cli.parser import fail

    try:
        with run_errors():
            yield
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if until() or os.environ.get("BUMBLEBEE_TRACEBACK"):
            raise
        fail(explain_refusal(told_by(error), cfg.as_dict(), parser.words))


@contextmanager
def run_errors() -> Iterator[None]:
    """What may end a training: a full disk (exit code 2), a loss that is no number, a rank that was killed (1)."""
    from bumblebee.cli.parser import UserError, fail
    from bumblebee.distributed.process_group import OtherRankFailed, is_lost_rank, rank

    try:
        yield
    except OtherRankFailed:
        raise UserError(2) from None  # that rank has told why
    except RuntimeError as error:
        if not is_lost_rank(error) or os.environ.get("BUMBLEBEE_TRACEBACK"):
            raise
        why = "its own message tells why, or the system's log where it was killed, as when memory runs out"
        note = f"bumblebee: another rank has ended ({why}), so rank {rank()} ends: continue with --trainer.resume auto"
        print(note, file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except FloatingPointError as error:  # nobody's mistake, but a traceback would not help
        print(f"bumblebee: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
        if error.errno not in full and "cannot write" not in str(error):
            raise
        fail(told_by(error))


def told_by(error: Exception) -> str:
    """An error's message; the system's begin with the file instead of a number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
