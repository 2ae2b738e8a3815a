"""Study: samplers, pruners and storage of a sweep. The only module that imports Optuna.

The storage is the only state. The sampler of a trial is made when the trial is, with a seed of the sweep's seed and the trial's
number, so that a sweep that was killed draws what it would have drawn. Grid and QMC are sequences with one seed, in which each
trial has its place. Trials are drawn under the caller's lock (``runner``): Optuna lets two workers draw the same point.
"""

from __future__ import annotations

import contextlib
import math
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, GridSampler, QMCSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from bumblebee.sweep.errors import SweepError
from bumblebee.sweep.parameter import Draw, Parameter
from bumblebee.sweep.sweep_file import SweepFile
from bumblebee.sweep.trials.trial import State, Trial

IMPORTANCE = "PED-ANOVA"  # arXiv 2304.10255; needs numpy only
_STARTUP_TRIALS = 10  # random ones, before TPE and GP have something to learn from
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running", TrialState.WAITING: "running", TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}  # fmt: skip
_STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError, RuntimeError)

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Study:
    """The trials of a sweep in a storage.

    Args:
        storage: URL of a database, such as ``sqlite:///study.db``.
        name: of the study in it.
        file: the search space.
        seed: of the sampler.
        identity: what must be equal for a sweep to be the same one, by name; compared with the storage unless it is empty.

    Raises:
        SweepError: the storage cannot be used, or holds another sweep of this name.
    """

    def __init__(self, storage: str, name: str, file: SweepFile, seed: int, identity: Mapping[str, str]) -> None:
        self.file = file
        self._distributions = {parameter.key: _distribution(parameter) for parameter in file.parameters}
        with _storage_errors(storage):
            self._sampler = _SamplerPerTrial(lambda number: make_sampler(file, seed, number))
            self._study = optuna.create_study(
                storage=_open(storage), study_name=name, direction=file.goal, load_if_exists=True, sampler=self._sampler,
                pruner=make_pruner(file),
            )  # fmt: skip
            if identity:
                self._check(storage, dict(identity))

    def _check(self, storage: str, identity: dict[str, str]) -> None:
        known: dict[str, str] = self._study.user_attrs.get("identity", {})
        for key in [*identity, *known] if known else []:
            before, now = known.get(key, "nothing"), identity.get(key, "nothing")
            # A metric that no trial has logged yet may be corrected.
            if before != now and not (key == "metric" and not self._has_values()):
                place = key if key.startswith("--") else self.file.at(key)
                raise SweepError(
                    f"{place}: {storage} holds another sweep, with {before} instead of {now}; continue that one with its own"
                    " file and recipe, or choose another output_dir or storage"
                )
        if known != identity:
            self._study.set_user_attr("identity", identity)

    def _has_values(self) -> bool:
        return any(trial.intermediate_values for trial in self._study.get_trials(deepcopy=False))

    # -- trials --------------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All trials, by number."""
        return [self._trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def ask(self) -> Trial:
        """A new trial with its values."""
        with self._sampler.drawing():
            trial = self._study.ask(self._distributions)
        trial.set_user_attr("host", socket.gethostname())
        return self._trial(self._frozen(trial.number))

    def complete_start(self, number: int) -> Trial:
        """Draw the values that a trial lacks because its start was cut off."""
        with self._sampler.drawing():
            trial = self._handle(number)
            for key, distribution in self._distributions.items():
                trial._suggest(key, distribution)
        if "host" not in trial.user_attrs:
            trial.set_user_attr("host", socket.gethostname())
        return self._trial(self._frozen(number))

    def report(self, number: int, index: int, value: float) -> bool:
        """Add the index-th value of a running trial's metric, counted from 1; returns whether the pruner ends the trial."""
        frozen = self._frozen(number)
        if index in frozen.intermediate_values or not math.isfinite(value):
            return False
        trial = self._handle(number)
        trial.report(value, index)
        return trial.should_prune()

    def finish(self, number: int, state: State, metric: float | None = None, message: str = "") -> None:
        """Record a trial's end. A trial that has ended keeps its state."""
        trial = self._handle(number)
        if self._frozen(number).state.is_finished():
            return
        if message:
            trial.set_user_attr("message", message)
        if metric is not None:
            trial.set_user_attr("metric", metric)
        if state == "complete":
            self._study.tell(number, metric)
        else:
            self._study.tell(number, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)

    def delete(self) -> None:
        """Delete the study from its storage."""
        optuna.delete_study(study_name=self._study.study_name, storage=self._study._storage)

    def importance(self) -> dict[str, float]:
        """Importance of each parameter by ``IMPORTANCE``, adding up to 1; empty with fewer than four complete trials."""
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        varied = [key for key, distribution in self._distributions.items() if not distribution.single()]
        if len(complete) < 4 or not varied:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
            found = optuna.importance.get_param_importances(self._study, evaluator=evaluator, params=varied)
        return dict(found) if sum(found.values()) > 0 else {}

    def _frozen(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _handle(self, number: int) -> optuna.Trial:
        return optuna.Trial(self._study, self._frozen(number)._trial_id)

    def _trial(self, frozen: FrozenTrial) -> Trial:
        draws = frozen.params
        values = {each.key: each.value(draws[each.key]) for each in self.file.parameters if each.key in draws}
        reports = frozen.intermediate_values
        metric = frozen.user_attrs.get("metric", reports[max(reports)] if reports else None)
        return Trial(
            frozen.number, _STATES[frozen.state], values, metric,
            max(reports, default=0), frozen.user_attrs.get("message", ""), frozen.user_attrs.get("host", ""),
            frozen.duration.total_seconds() if frozen.duration else None,
        )  # fmt: skip


def exists(storage: str, name: str) -> bool:
    """Whether a storage holds a study of this name. Creates no SQLite file.

    Raises:
        SweepError: the storage cannot be used.
    """
    file = storage.removeprefix("sqlite:///")
    if file != storage and not Path(file).exists():
        return False
    with _storage_errors(storage):
        return name in optuna.get_all_study_names(_open(storage))


def _open(storage: str) -> optuna.storages.RDBStorage:
    # Workers on one SQLite file wait for each other's transactions.
    options = {"connect_args": {"timeout": 120}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(storage, engine_kwargs=options)


@contextlib.contextmanager
def _storage_errors(storage: str) -> Iterator[None]:
    try:
        yield
    except _STORAGE_ERRORS as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise SweepError(f"--storage: cannot use {storage}: {reason}") from error


# -- samplers and pruners --------------------------------------------------------------------------------------------------


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.draws())
    if parameter.kind == "int":
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def make_sampler(file: SweepFile, seed: int, number: int) -> BaseSampler:
    """The sampler of one trial."""
    own = (seed * 1_000_003 + number) % 2**32
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: TPESampler(seed=own, n_startup_trials=_STARTUP_TRIALS),
        "gp": lambda: GPSampler(seed=own, n_startup_trials=_STARTUP_TRIALS, deterministic_objective=False),
        "random": lambda: RandomSampler(seed=own),
        "grid": lambda: GridSampler({parameter.key: parameter.grid() for parameter in file.parameters}, seed=seed % 2**32),
        "qmc": lambda: QMCSampler(seed=seed % 2**32, scramble=True, warn_independent_sampling=False),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return makers[file.method]()


def make_pruner(file: SweepFile) -> BasePruner:
    """The pruner. Its resource is the number of values of the metric, as in W&B."""
    options = file.pruning
    eta, low = options.get("eta", 3), options.get("min_iter", 1)
    if file.pruner == "median":
        return MedianPruner(n_startup_trials=options.get("min_trials", 5), n_warmup_steps=low - 1)
    if file.pruner == "asha":
        return SuccessiveHalvingPruner(min_resource=low, reduction_factor=eta)
    if file.pruner == "hyperband":
        high = options.get("max_iter")
        if high is not None and "s" in options:
            low = max(1, high // eta ** options["s"])
        return HyperbandPruner(min_resource=low, max_resource="auto" if high is None else high, reduction_factor=eta)
    return NopPruner()


class _SamplerPerTrial(BaseSampler):
    """Delegates to the sampler of the trial that is being started. Optuna also calls it for handles of other trials."""

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make = make
        self._sampler: BaseSampler = RandomSampler()
        self._is_drawing = False

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """A context in which a trial is started."""
        self._is_drawing = True
        try:
            yield
        finally:
            self._is_drawing = False

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if self._is_drawing:
            self._sampler = self._make(trial.number)
            self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Draw:
        draw: Draw = self._sampler.sample_independent(study, trial, param_name, param_distribution)
        return draw

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Nothing: a grid would stop a loop that is not running."""
