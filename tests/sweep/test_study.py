"""Samplers, pruners and storage: better than random, the same as Optuna, the same after a restart."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest

from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.study import Study, exists, make_pruner
from bumblebee.sweep.trials.trial import best_of

MEMORY = "sqlite:///:memory:"
QUADRATIC = """\
method: {method}
metric: {{name: loss, goal: minimize}}
parameters:
  lr: {{distribution: log_uniform_values, min: 1e-5, max: 1}}
  decay: {{min: 0.0, max: 1.0}}
"""
GRID = """\
method: grid
metric: {name: loss}
parameters: {a: {values: [1, 2, 3]}, b: {values: [x, y]}, c: {distribution: q_uniform, min: 0, max: 1, q: 0.5}}
"""


def objective(values) -> float:
    return (math.log10(values["lr"]) + 2.5) ** 2 + 4 * (values["decay"] - 0.3) ** 2


def search(study: Study, trials: int) -> list[tuple[float, float]]:
    drawn = []
    for _ in range(trials):
        trial = study.ask()
        study.finish(trial.number, "complete", objective(trial.values))
        drawn.append((trial.values["lr"], trial.values["decay"]))
    return drawn


@pytest.mark.slow
def test_tpe_beats_random_search_with_the_same_budget(space):
    def best(method: str, seed: int) -> float:
        study = Study(MEMORY, f"{method}{seed}", space(QUADRATIC.format(method=method)), seed, {})
        search(study, 25)
        return best_of(study.trials(), "minimize").metric

    tpe, random = ([best(method, seed) for seed in range(3)] for method in ("bayes", "random"))
    assert sum(tpe) < 0.5 * sum(random)


@pytest.mark.parametrize(("method", "trials"), [("bayes", 12), pytest.param("gp", 12, marks=pytest.mark.slow), ("qmc", 6)])
def test_restarted_sampler_draws_what_it_would_have_drawn(method, trials, space, tmp_path):
    file = space(QUADRATIC.format(method=method))
    at_once = search(Study(MEMORY, "a", file, 7, {}), trials)
    storage = f"sqlite:///{tmp_path}/study.db"
    restarted = [search(Study(storage, "b", file, 7, {}), part) for part in (4, trials - 5, 1)]
    assert [draw for part in restarted for draw in part] == at_once
    assert len(set(at_once)) == trials


def test_grid_visits_each_point_once(space, tmp_path):
    storage, file = f"sqlite:///{tmp_path}/study.db", space(GRID)
    studies = [Study(storage, "grid", file, 1, {}) for _ in range(2)]  # two workers
    points = [tuple(studies[index % 2].ask().values.values()) for index in range(file.grid_size())]
    assert file.grid_size() == 18 == len(set(points))


CURVES = [[5.0, 4.0, 3.0, 2.0], [5.1, 4.5, 4.4, 4.3], [4.9, 3.5, 2.9, 1.5], [6.0, 5.9, 5.8, 5.7], [4.0, 3.9, 3.8, 3.7],
          [5.5, 3.0, 2.0, 1.0], [3.0, 2.9, 2.8, 2.7], [5.2, 4.1, 3.1, 2.1], [4.8, 4.7, 4.6, 4.5]]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "pruner"),
    [
        ("{type: asha, min_iter: 1, eta: 2}", optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)),
        ("{type: hyperband, min_iter: 1, max_iter: 4, eta: 2}", optuna.pruners.HyperbandPruner(1, 4, 2)),
        ("{type: median, min_iter: 2, min_trials: 3}", optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)),
        ("{type: none}", optuna.pruners.NopPruner()),
    ],
)
def test_pruner_decides_as_optuna_on_recorded_curves(entry, pruner, space):
    file = space(QUADRATIC.format(method="random") + f"early_terminate: {entry}\n")
    ours = Study(MEMORY, "curves", file, 0, {})
    theirs = optuna.create_study(study_name="curves", pruner=pruner)
    ends = []
    for curve in CURVES:
        trial, other = ours.ask(), theirs.ask()
        for index, value in enumerate(curve, start=1):
            other.report(value, index)
            pruned = other.should_prune()
            assert ours.report(trial.number, index, value) == pruned
            if pruned:
                break
        theirs.tell(other, None if pruned else curve[-1], state=optuna.trial.TrialState.PRUNED if pruned else None)
        ours.finish(trial.number, "pruned" if pruned else "complete", curve[index - 1])
        ends.append(index)
    assert type(make_pruner(file)) is type(pruner)
    assert (min(ends) < 4) == (entry != "{type: none}")
    assert [trial.state.name.lower().replace("fail", "failed") for trial in theirs.trials] == [t.state for t in ours.trials()]


def test_start_that_was_cut_off_is_completed(space, tmp_path):
    storage, file = f"sqlite:///{tmp_path}/study.db", space(QUADRATIC.format(method="random"))
    Study(storage, "sweep", file, 5, {})._study._storage.create_new_trial(1)  # killed before anything was drawn
    study = Study(storage, "sweep", file, 5, {})
    assert study.trials()[0].values == {}
    assert study.complete_start(0).values == Study(MEMORY, "sweep", file, 5, {}).ask().values


def test_storage_of_another_sweep_is_refused(space, tmp_path):
    storage, file = f"sqlite:///{tmp_path}/study.db", space()
    first = Study(storage, "sweep", file, 5, {"method": "random", "metric": "loss", "--optimizer.lr": "0.1"})
    with pytest.raises(SweepError, match=r"^--optimizer.lr: sqlite.*study.db holds another sweep, with 0.1 instead of 0.2;"):
        Study(storage, "sweep", file, 5, {"method": "random", "metric": "loss", "--optimizer.lr": "0.2"})
    with pytest.raises(SweepError, match=r"space.yaml:1: method: .* with random instead of tpe"):
        Study(storage, "sweep", file, 5, {"method": "tpe", "metric": "loss", "--optimizer.lr": "0.1"})
    corrected = {"method": "random", "metric": "validation_loss", "--optimizer.lr": "0.1"}
    Study(storage, "sweep", file, 5, corrected)  # no trial has logged the wrong one
    first.report(first.ask().number, 1, 2.0)
    with pytest.raises(SweepError, match="metric: .* with validation_loss instead of loss"):
        Study(storage, "sweep", file, 5, {**corrected, "metric": "loss"})


def test_unusable_storage_is_one_line(space, tmp_path):
    (tmp_path / "text.db").write_text("no database, " * 100)
    for storage in (f"sqlite:///{tmp_path}/text.db", "nonsense", "mysterious://host/name"):
        with pytest.raises(SweepError, match=r"^--storage: cannot use "):
            exists(storage, "sweep")
    assert not exists(f"sqlite:///{tmp_path}/none.db", "sweep") and not Path(tmp_path, "none.db").exists()


def test_importance_finds_the_parameter_that_matters(space):
    study = Study(MEMORY, "importance", space(QUADRATIC.format(method="random")), 0, {})
    assert study.importance() == {}
    for _ in range(16):
        trial = study.ask()
        study.finish(trial.number, "complete", math.log10(trial.values["lr"]))
    importance = study.importance()
    assert importance["lr"] > 0.7 and sum(importance.values()) == pytest.approx(1)
