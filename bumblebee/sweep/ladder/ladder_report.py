"""The results of a size ladder: ladder.json, ladder.md and ladder.png."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bumblebee.plotting.ladder_plot import LadderData, plot_ladder, save
from bumblebee.sweep.ladder.rungs import Ladder, Rung
from bumblebee.sweep.ladder.scaling_law import SAME_RATIO, ScalingLaw, TrainedSize, fit, is_one_ratio, standard_error
from bumblebee.sweep.recipe import SweepRecipe
from bumblebee.sweep.study import Study
from bumblebee.utils.formatting import duration, short
from bumblebee.utils.json_files import write_json
from bumblebee.utils.text_files import write_text

BAND = 2.0  # standard errors, about 95 %


@dataclass(frozen=True)
class Prediction:
    """The predicted loss of a size.

    Args:
        rung: the size.
        loss: by the law.
        low: lower end of the band.
        high: upper end of the band.
    """

    rung: Rung
    loss: float
    low: float
    high: float


class LadderReport:
    """Fits a law to the trained sizes and predicts others.

    Args:
        study: of the sweep.
        ladder: its rungs.
        folder: of the sweep.
        recipe: that trials change.
    """

    def __init__(self, study: Study, ladder: Ladder, folder: Path, recipe: SweepRecipe) -> None:
        self.study, self.ladder, self.folder, self.recipe = study, ladder, folder, recipe
        self.runs: list[TrainedSize] = []
        self.seconds: list[float] = []

    def write(self) -> tuple[ScalingLaw, list[Prediction]] | None:
        """Write the files; None as long as too few sizes have been trained for a fit."""
        self._read_runs()
        fewest = 3 if self.runs and is_one_ratio(self.runs) else 6
        if len(self.runs) < fewest:
            return None
        law = fit(self.runs)
        predictions = [self._predict(law, rung) for rung in self.ladder.predicted]
        write_json(self.folder / "ladder.json", self._json(law, predictions))
        write_text(self.folder / "ladder.md", self._markdown(law, predictions))
        save(plot_ladder(self._plot_data(law, predictions)), self.folder / "ladder.png")
        return law, predictions

    def _read_runs(self) -> None:
        self.runs, self.seconds = [], []
        for trial in self.study.trials():
            rung = self.ladder.rung(trial.values)
            if rung is not None and trial.state == "complete" and trial.metric is not None:
                self.runs.append(TrainedSize(rung.parameters, rung.tokens, trial.metric))
                self.seconds.append(_seconds(self.folder / trial.name / self.recipe.metrics_file()))
        order = sorted(range(len(self.runs)), key=lambda index: (self.runs[index].parameters, self.runs[index].tokens))
        self.runs, self.seconds = [self.runs[index] for index in order], [self.seconds[index] for index in order]

    def _predict(self, law: ScalingLaw, rung: Rung) -> Prediction:
        loss, error = law.loss(rung.parameters, rung.tokens), standard_error(self.runs, rung.parameters, rung.tokens)
        return Prediction(rung, loss, loss - BAND * error, loss + BAND * error)

    def _json(self, law: ScalingLaw, predictions: list[Prediction]) -> dict[str, object]:
        return {
            "metric": self.study.file.metric,
            "law": {**asdict(law), "formula": law.formula()},
            "runs": [{**asdict(run), "seconds": seconds} for run, seconds in zip(self.runs, self.seconds, strict=True)],
            "predictions": [asdict(each) for each in predictions],
            "band": "two standard errors of the jackknife over the runs",
        }

    def _markdown(self, law: ScalingLaw, predictions: list[Prediction]) -> str:
        metric = self.study.file.metric
        lines = [
            f"{metric} = {law.formula()}",
            "",
            f"| N | D | {metric} | law | FLOPs (6 N D) | time |",
            "|---|---|---|---|---|---|",
        ]
        for run, seconds in zip(self.runs, self.seconds, strict=True):
            fitted = law.loss(run.parameters, run.tokens)
            cells = [short(run.parameters), short(run.tokens), f"{run.loss:.4f}", f"{fitted:.4f}"]
            lines.append(f"| {' | '.join(cells)} | {6 * run.parameters * run.tokens:.3g} | {duration(seconds)} |")
        for each in predictions:
            band = f"{each.loss:.4f} ({each.low:.4f} to {each.high:.4f})"
            cells = [short(each.rung.parameters), short(each.rung.tokens), "predicted", band]
            lines.append(f"| {' | '.join(cells)} | {6 * each.rung.parameters * each.rung.tokens:.3g} | |")
        return "\n".join(lines) + "\n"

    def _plot_data(self, law: ScalingLaw, predictions: list[Prediction]) -> LadderData:
        """Curves along each ratio of tokens to parameters, from the smallest run to the largest prediction."""
        ratios = [self.runs[0].tokens / self.runs[0].parameters]
        for run in self.runs:
            if all(abs(run.tokens / run.parameters / ratio - 1) > SAME_RATIO for ratio in ratios):
                ratios.append(run.tokens / run.parameters)
        largest = max(each.rung.parameters for each in predictions)
        smallest = self.runs[0].parameters
        sizes = [smallest * (largest / smallest) ** (index / 24) for index in range(25)]
        bands = {}
        for ratio in ratios:
            losses = [law.loss(size, ratio * size) for size in sizes]
            errors = [BAND * standard_error(self.runs, size, ratio * size) for size in sizes[::6]]
            bands[ratio] = (losses, _interpolated(errors, len(sizes)))
        return LadderData(
            self.study.file.metric, law.formula(), sizes, bands,
            [(run.parameters, run.tokens, run.loss) for run in self.runs], self.seconds,
            [(each.rung.parameters, each.rung.tokens, each.loss) for each in predictions],
        )  # fmt: skip


def _interpolated(values: list[float], count: int) -> list[float]:
    """Values at ``count`` points, linear between the given ones."""
    step = (count - 1) / (len(values) - 1)
    return [
        values[int(index / step)]
        + (index / step % 1) * (values[min(int(index / step) + 1, len(values) - 1)] - values[int(index / step)])
        for index in range(count)
    ]


def _seconds(file: Path) -> float:
    """Seconds of training, from the last line of a run's metrics."""
    try:
        line = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(line.get("seconds", 0.0))
