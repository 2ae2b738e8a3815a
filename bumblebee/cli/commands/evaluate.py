"""``bumblebee evaluate``: evaluate a model on a recipe's data by exact match of its greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from bumblebee.cli.errors.value_errors import user_errors
from bumblebee.cli.parser import Parser
from bumblebee.cli.recipe_options import recipe_command_parser, require_validation, use_tokenizer_of

if TYPE_CHECKING:
    from bumblebee.evaluation.exact_match import Answer


def parser() -> Parser:
    """Return the options of the command."""
    options = recipe_command_parser("evaluate")
    options.add_argument("--model", type=str | None, default=None, help="model folder; null: the recipe's output_dir")
    options.add_argument("--split", type=Literal["train", "validation"], default="train", help="samples of the recipe's data")
    options.add_argument("--limit", type=int | None, default=None, help="maximum number of questions; null: all")
    options.add_argument("--show", type=int, default=10, help="number of answers to print")
    options.add_argument("--trust_remote_code", type=bool, default=False, help="run code that the model folder names or holds")
    return options


def run(words: Sequence[str]) -> None:
    """Execute the command."""
    options = parser()
    cfg = options.parse(words)
    folder, split, limit, show, trust = (cfg.pop(name) for name in ("model", "split", "limit", "show", "trust_remote_code"))
    with user_errors(cfg, options.words):
        from bumblebee.evaluation.exact_match import answer, questions
        from bumblebee.inference.generator import Generator
        from bumblebee.recipe import build_data

        use_tokenizer_of(cfg, folder or cfg.output_dir)
        data = build_data(cfg)
        if not data.has_prompts:
            raise ValueError(
                f"data: {type(data).__name__} has no questions to evaluate: use bumblebee validate, or a recipe with"
                " datamodules.SFT"
            )
        data.setup(cfg.seed)
        samples = data.train if split == "train" else require_validation(data.validation)
        generator = Generator.from_pretrained(folder or cfg.output_dir, cfg.trainer.device, trust_remote_code=trust)
        answers = answer(generator, questions(data, samples), limit)
    _print(answers, show)


def _print(answers: Sequence[Answer], show: int) -> None:
    """Print some of the answers, evenly spread, and the share of exact matches."""
    for each in answers[:: max(1, len(answers) // max(show, 1))][:show]:
        turn = f"(turn {each.turn}) " if each.turn > 1 else ""
        expected = "" if each.is_match else f"\n   (expected: {each.expected})"
        print(f"{turn}{each.question.strip()}\n-> {each.text.strip()}{expected}\n")
    matches = sum(each.is_match for each in answers)
    print(f"exact match: {matches} of {len(answers)} ({matches / len(answers):.1%})")
