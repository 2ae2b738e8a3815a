"""TPE against random search for the learning rate of the quickstart's pretraining: equal numbers of trials, fixed seeds.

    OMP_NUM_THREADS=1 python benchmarks/sweep.py [--seeds 1] [--trials 16] [--steps 240] [--folder FOLDER]

The quickstart's data and recipe with a small model and 240 steps; optimizer.lr is log-uniform from 1e-5 to 1e-1. Real sweeps
first: for each seed ``bumblebee sweep`` with ``method: bayes`` and with ``method: random``, which run at the same time. Then
the loss is measured at 17 learning rates, by trainings in this process; both samplers search the curve through these points,
linear in log(lr), with many seeds. The first 10 trials of TPE are random ones, with the same draws as those of random search:
the two can only differ from the 11th trial on. Takes some minutes on two idle cores. ``--folder`` keeps the runs; what is in it
already is not run again.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from common import BARE, final_validation_loss, header, parser, table

if TYPE_CHECKING:
    from bumblebee.sweep.study import Study
    from bumblebee.sweep.sweep_file import SweepFile

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("bayes", "random")
LOW, HIGH = 1e-5, 1e-1
LR = "optimizer.lr"
VALIDATION_DOCUMENTS = 40


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "bumblebee", *map(str, words)]


def make_data(folder: Path) -> None:
    """The quickstart's documents, a few of those for validation, and a tokenizer of 512 tokens."""
    if (folder / "tokenizer").exists():
        return
    data = folder / "data"
    subprocess.run([sys.executable, ROOT / "recipes/quickstart/make_data.py", "--output", data], stdout=sys.stderr, check=True)
    documents = (data / "documents_validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "validation.jsonl").write_text("".join(documents[:VALIDATION_DOCUMENTS]), encoding="utf-8")
    words = ("tokenizer", "--files", data / "documents.jsonl", "--vocab_size", 512, "--output", folder / "tokenizer")
    subprocess.run(command(*words), stdout=sys.stderr, check=True)


def recipe(folder: Path, steps: int) -> list[str]:
    """The quickstart's recipe, cut short: a small model, few steps, a single validation at the end."""
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
    words = [
        "--config", ROOT / "recipes/quickstart/pretrain.yaml", "--data.files", folder / "data/documents.jsonl",
        "--data.validation_files", folder / "data/validation.jsonl", "--data.tokenizer", folder / "tokenizer",
        *(word for key, value in shape.items() for word in (f"--task.model.config.{key}", value)),
        "--data.max_length", 128, "--trainer.precision", "fp32", "--trainer.max_steps", steps, *BARE,
    ]  # fmt: skip
    return [str(word) for word in words]


def sweep_file(folder: Path, method: str) -> Path:
    """The search space; JSON is YAML."""
    lr = {"distribution": "log_uniform_values", "min": LOW, "max": HIGH}
    content = {"method": method, "metric": {"name": "validation_loss", "goal": "minimize"}, "parameters": {LR: lr}}
    file = folder / f"{method}.yaml"
    file.write_text(json.dumps(content))
    return file


def real_sweeps(folder: Path, seed: int, trials: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(lr, loss) of the trials of a sweep with each method, in order."""
    from bumblebee.sweep.study import Study
    from bumblebee.sweep.sweep_file import SweepFile

    outputs = {method: folder / f"{method}-{seed}" for method in METHODS}
    started = []
    for method, output in outputs.items():
        words = ["--sweep", sweep_file(folder, method), "--count", trials, "--output_dir", output, "--seed", seed]
        words += ["--resume", "true"]
        started.append(subprocess.Popen(command("sweep", *recipe(folder, steps), *words), stdout=sys.stderr))
    if any([process.wait() for process in started]):
        raise SystemExit("a sweep failed; its message is above")
    found = {}
    for method, output in outputs.items():
        file = SweepFile.read(str(folder / f"{method}.yaml"))
        found[method] = trials_of(Study(f"sqlite:///{output}/sweep/study.db", "sweep", file, seed, {}))
    return found


def trials_of(study: Study) -> list[tuple[float, float]]:
    return [(trial.values[LR], math.inf if trial.metric is None else trial.metric) for trial in study.trials()]


def measured_curve(folder: Path, steps: int, points: int) -> list[tuple[float, float]]:
    """(lr, loss) at equal distances of log(lr), by trainings in this process."""
    from bumblebee.cli.main import main as bumblebee

    file = folder / "curve.json"
    curve = json.loads(file.read_text()) if file.exists() else []
    for index in range(len(curve), points):
        lr = LOW * (HIGH / LOW) ** (index / (points - 1))
        output = folder / "curve"
        words = ["--output_dir", str(output), "--overwrite", "--log_level", "error"]
        bumblebee(["fit", *recipe(folder, steps), f"--{LR}", f"{lr:.8g}", *words])
        curve.append((lr, final_validation_loss(output)))
        file.write_text(json.dumps(curve))
    return [(lr, loss) for lr, loss in curve]


def interpolated(curve: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    import numpy as np

    logs, losses = np.log([lr for lr, _ in curve]), [loss for _, loss in curve]
    return lambda lr: float(np.interp(math.log(lr), logs, losses))


def simulate(file: SweepFile, seed: int, trials: int, loss: Callable[[float], float]) -> list[float]:
    """The losses of a sweep over the curve: the samplers of ``bumblebee sweep``, with a storage in memory, which is faster."""
    import optuna

    from bumblebee.sweep.study import make_sampler

    study = optuna.create_study()
    distributions = {LR: optuna.distributions.FloatDistribution(LOW, HIGH, log=True)}
    for number in range(trials):
        study.sampler = make_sampler(file, seed, number)
        trial = study.ask(distributions)
        study.tell(trial, loss(trial.params[LR]))
    return [float(trial.value) for trial in study.trials]


def best_so_far(losses: Sequence[float]) -> list[float]:
    return list(accumulate(losses, min))


def real_rows(folder: Path, args: Namespace, counts: Sequence[int]) -> Iterator[tuple[object, ...]]:
    for seed in range(1, args.seeds + 1):
        for method, trials in real_sweeps(folder, seed, args.trials, args.steps).items():
            best = best_so_far([loss for _, loss in trials])
            lr = min(trials, key=lambda trial: trial[1])[0]
            yield (seed, method, *(f"{best[count - 1]:.4f}" for count in counts), f"{lr:.2g}")


def simulated_rows(folder: Path, args: Namespace, curve: Sequence[tuple[float, float]]) -> Iterator[tuple[object, ...]]:
    from bumblebee.sweep.sweep_file import SweepFile

    loss, least = interpolated(curve), min(loss for _, loss in curve)
    counts = [count for count in (10, 12, 16, 20, 30) if count <= args.simulated_trials]
    files = {method: SweepFile.read(str(sweep_file(folder, method))) for method in METHODS}
    best = {
        method: [best_so_far(simulate(file, seed, max(counts), loss)) for seed in range(1, args.simulated + 1)]
        for method, file in files.items()
    }
    for count in counts:
        tpe, other = ([run[count - 1] for run in best[method]] for method in METHODS)
        means = [sum(losses) / len(losses) for losses in (tpe, other)]
        pairs = list(zip(tpe, other, strict=True))
        share = [f"{sum(one < two for one, two in each) / len(pairs):.0%}" for each in (pairs, [pair[::-1] for pair in pairs])]
        yield (count, *(f"{mean:.4f}" for mean in means), *(f"{mean - least:.4f}" for mean in means), *share)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=1, help="real pairs of sweeps, with the seeds 1, 2, ...; 0 for none")
    options.add_argument("--trials", type=int, default=16, help="of each real sweep")
    options.add_argument("--simulated", type=int, default=100, help="pairs of sweeps over the curve")
    options.add_argument("--simulated_trials", type=int, default=30, help="of each of them")
    options.add_argument("--steps", type=int, default=240, help="of each training")
    options.add_argument("--points", type=int, default=17, help="learning rates of the curve")
    options.add_argument("--folder", type=Path)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_data(folder)
        counts = sorted({min(count, args.trials) for count in (10, 12, 14, args.trials)})
        real = list(real_rows(folder, args, counts))
        curve = measured_curve(folder, args.steps, args.points)
        simulated = list(simulated_rows(folder, args, curve))
    print(header("The quickstart's learning rate: TPE against random search"))
    if real:
        print("Sweeps, best validation loss after n trials (the first 10 of both are the same draws):\n")
        print(table(("seed", "method", *(f"n = {count}" for count in counts), "best lr"), real), end="\n\n")
    print(f"The measured curve, {args.steps} steps:\n")
    print(table(("lr", "validation_loss"), [(f"{lr:.3g}", f"{loss:.4f}") for lr, loss in curve]))
    print(f"\nBoth samplers on that curve, {args.simulated} seeds: mean of the best loss after n trials, its distance from the")
    print("minimum of the curve, and how often one of the two is strictly better than the other:\n")
    columns = ("n", "TPE", "random", "TPE: distance", "random: distance", "TPE better", "random better")
    print(table(columns, simulated))


if __name__ == "__main__":
    main()
