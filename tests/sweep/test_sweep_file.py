"""Search spaces in W&B's vocabulary: what a draw means, and the errors of a file."""

from __future__ import annotations

import math

import pytest

from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.parameter import Parameter

HEAD = "method: bayes\nmetric: {name: validation_loss, goal: minimize}\n"


@pytest.mark.parametrize(
    ("entry", "draw", "value"),
    [
        ({"value": "x"}, "x", "x"),
        ({"values": [1, True, None, "1e-3"]}, 0.001, 0.001),
        ({"values": [[0.9, 0.95], {"a": 1}]}, "[0.9, 0.95]", [0.9, 0.95]),
        ({"values": [8, 16], "probabilities": [0.25, 0.75]}, 0.3, 16),
        ({"min": 1, "max": 4}, 3, 3),
        ({"min": 0, "max": 1.5}, 0.25, 0.25),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.1}, 0.34, 0.3),
        ({"min": 0, "max": 100, "q": 8}, 18.3, 16),
        ({"distribution": "q_log_uniform_values", "min": 1, "max": 1000}, 12.6, 13),
        ({"distribution": "normal", "mu": 2, "sigma": 3}, 0.5, 2.0),
        ({"distribution": "log_normal", "mu": 1}, 0.5, math.e),
    ],
)  # fmt: skip
def test_draw_becomes_the_options_value(entry, draw, value):
    read = Parameter.read("key", entry).value(draw)
    assert read == pytest.approx(value) and type(read) is type(value)


def test_log_uniform_takes_exponents_of_e_as_in_wandb():
    one = Parameter.read("lr", {"distribution": "log_uniform", "min": -9, "max": -2})
    other = Parameter.read("lr", {"distribution": "log_uniform_values", "min": math.exp(-9), "max": math.exp(-2)})
    assert (one.low, one.high, one.log) == (other.low, other.high, True)


def test_nested_parameters_are_joined(space):
    file = space(
        HEAD
        + "parameters:\n  task: {parameters: {transforms.rank: {values: [8, 64]}}}\n  optimizer.lr: {min: 1e-4, max: 1e-2}\n"
    )
    assert [parameter.key for parameter in file.parameters] == ["task.transforms.rank", "optimizer.lr"]
    assert file.method == "tpe" and file.parameters[1].distribution == "uniform"


SPACE = HEAD + "parameters:\n  lr: "  # an entry follows, on line 4
LADDER = "metric: {name: loss}\nladder: "
ONE = HEAD + "parameters: {lr: {value: 1}}\n"
GRID = "method: grid\nmetric: {name: loss}\nparameters:\n  lr: {min: 0.0, max: 1.0}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "space.yaml: parameters: the search space is empty"),
        (HEAD + "parameters: {}\n", "space.yaml:3: parameters: the search space is empty"),
        (SPACE + "{values: []}", "space.yaml:4: parameters.lr: values: expected a list with at least one value, got []"),
        (SPACE + "{distribution: log_unifrm, min: 1, max: 2}",
         "parameters.lr: distribution: unknown distribution 'log_unifrm' (did you mean 'log_uniform'"),
        (SPACE + "{distribution: beta}", "unknown distribution 'beta'"),
        (SPACE + "{min: 2, max: 1}", "space.yaml:4: parameters.lr: min: 2 is greater than max, 1"),
        (SPACE + "{min: 1}", "parameters.lr: expected value, values, or min and max"),
        (SPACE + "{distribution: uniform, min: low, max: 2}", "min: expected a number, got 'low'"),
        (SPACE + "{distribution: log_uniform_values, min: 0, max: 2}", "needs values greater than 0, got 0"),
        (SPACE + "{values: [1, 1]}", "values: 1 occurs more than once"),
        (SPACE + "{value: 1, step: 2}", "unknown key 'step'"),
        (HEAD + "parameters:\n  output_dir: {value: x}\n", "parameters.output_dir: is set by the sweep"),
        (HEAD + "program: train.py\n", "space.yaml:3: unknown key 'program': the recipe is an option of the command"),
        (HEAD + "parameter: {}\n", "unknown key 'parameter' (did you mean 'parameters'?)"),
        (ONE + "early_terminate: {type: hyperbnd}\n",
         "space.yaml:4: early_terminate.type: unknown type 'hyperbnd' (did you mean 'hyperband'?)"),
        (ONE + "early_terminate: {type: asha, min_iter: 0}\n", "expected an integer of at least 1, got 0"),
        (ONE + "run_cap: many\n", "space.yaml:4: run_cap: expected an integer of at least 1, got 'many'"),
        ("parameters: {lr: {value: 1}}\n", "space.yaml: metric: expected the metric's name"),
        (GRID, "space.yaml:4: parameters.lr: a grid needs values, or min and max with q; uniform is continuous"),
        (GRID.replace("max: 1.0", "max: 1000000, q: 1"), "a grid of 1,000,001 values; at most 10,000 are possible"),
        (ONE.replace("bayes", "bays"), "space.yaml:1: method: unknown method 'bays'"),
        (ONE.replace("minimize", "min"), "space.yaml:2: metric.goal: unknown goal 'min'"),
        (ONE + "ladder: {}\n", "space.yaml:3: parameters: has no meaning beside ladder"),
        (LADDER + "{sizes: [{a: 1}, {a: 2}]}", "space.yaml:2: ladder.sizes: expected at least three sizes, got 2"),
        (LADDER + "{size: []}", "unknown key 'size' (did you mean 'sizes'?)"),
        (LADDER + "{tokens_per_parameter: many}", "expected a number greater than 0, or several, got 'many'"),
        ("a: [\n", "space.yaml:2: invalid YAML"),
        ("a: 1\na: 2\n", "space.yaml:2: duplicate key 'a'"),
        ("text", "expected 'method:', 'metric:' and 'parameters:'"),
    ],
)  # fmt: skip
def test_bad_file_is_refused_by_line_key_and_value(text, message, space):
    with pytest.raises(SweepError) as refused:
        space(text)
    assert message in str(refused.value) and "\n" not in str(refused.value)
