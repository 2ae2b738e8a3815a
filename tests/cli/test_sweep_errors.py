"""``bumblebee sweep`` with input that cannot be used: one line that names file, key and value, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HEAD = "method: random\nmetric: {name: loss}\nparameters:\n"


@pytest.mark.parametrize(
    ("space", "words", "message"),
    [
        (HEAD + "  optimizer.lrr: {value: 1}\n", "",
         "space.yaml:4: parameters.optimizer.lrr: unknown option 'optimizer.lrr' (did you mean 'optimizer.lr'?)"),
        (HEAD + "  seed: {value: 3}\n  optimizer.lr: {values: [0.1, high]}\n", "",
         "space.yaml:5: parameters.optimizer.lr: optimizer.lr: expected a number, got 'high'"),
        (HEAD + "  config: {values: [recipe.yml]}\n", "",
         "space.yaml:4: parameters.config: --config: file not found: recipe.yml (did you mean 'recipe.yaml'"),
        (HEAD.replace("loss", "validation_loss") + "  seed: {value: 3}\n", "",
         "space.yaml:2: metric.name: validation_loss needs validations: add --callbacks.validation callbacks.Validation"),
        (HEAD + "  seed: {value: 3}\n", "--count 0", "--count: must be at least 1, got 0"),
        (HEAD + "  seed: {value: 3}\n", "--storage nonsense", "--storage: cannot use nonsense: Could not parse"),
        (HEAD + "  seed: {value: 3}\n", "--devices []", "--devices: expected device numbers such as [0, 1]"),
        ("metric: {name: loss}\nladder: {sizes: [{task.modl: 1}, {a: 2}, {a: 3}]}\n", "",
         "space.yaml:2: ladder.sizes: unknown option 'task.modl'"),
        (HEAD + "  seed: {value: 3}\n", "--sweep spaces.yaml", "--sweep: file not found: spaces.yaml (did you mean"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(space: str, words: str, message: str, workdir: Path, error_line: Callable[..., str]) -> None:
    (workdir / "space.yaml").write_text(space)
    command = ["sweep", "--config", "recipe.yaml", "--sweep", "space.yaml", "--count", "1", *words.split()]
    assert message in error_line(*command)
    assert not (workdir / "out").exists()
