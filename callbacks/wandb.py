"""WandB: metrics sent to Weights & Biases, or written to a folder for ``wandb sync``.

The only module that imports wandb. A resumed run continues the same W&B run, whose id is part of the checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bumblebee.callback import Callback
from bumblebee.training.metrics.formatting import strip_validation_prefix
from bumblebee.training.run_summary import summarize

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

_MODEL_FILES = ("config.json", "generation_config.json", "tokenizer*", "chat_template*", "model*.safetensors*", "adapter_*")


class WandB(Callback):
    """Sends metrics to Weights & Biases as ``train/...`` and ``validation/...``.

    Args:
        project: W&B project.
        name: name of the run; null lets W&B choose one.
        offline: write to output_dir/wandb only; needs neither network nor account. WANDB_MODE=offline does the same.
        log_every: optimizer steps between two points, at least trainer.log_every.
        log_model: upload the model folder when the run is complete.
        log_code: upload the Python and YAML files of the working directory.
        watch: also log histograms of gradients, parameters or all (both).
        watch_every: optimizer steps between two histograms.
        tags: tags of the run.

    Raises:
        ValueError: project is empty, watch is unknown, or a number of steps is less than 1.
    """

    def __init__(
        self,
        project: str,
        name: str | None = None,
        offline: bool = False,
        log_every: int = 1,
        log_model: bool = False,
        log_code: bool = False,
        watch: Literal["gradients", "parameters", "all"] | None = None,
        watch_every: int = 100,
        tags: list[str] | None = None,
    ) -> None:
        if not project:
            raise ValueError(f"project must be a name, got {project!r}")
        for option, value in (("log_every", log_every), ("watch_every", watch_every)):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if watch not in (None, "gradients", "parameters", "all"):
            raise ValueError(f"watch must be gradients, parameters, all or null, got {watch!r}")
        self.project, self.name, self.offline, self.tags = project, name, offline, tags
        self.log_every, self.log_model, self.log_code = log_every, log_model, log_code
        self.watch, self.watch_every = watch, watch_every
        self._id: str | None = None
        self._run: Any = None

    def check(self, trainer: Trainer) -> None:
        """Check the installation, the stage and the account.

        Raises:
            ValueError: wandb is not installed, watch is set at ZeRO stage 3, or rank 0 cannot log in.
        """
        if find_spec("wandb") is None:
            raise ValueError("callbacks: WandB needs the wandb package: pip install wandb")
        if self.watch and trainer.zero_stage == 3:
            raise ValueError(f"callbacks: WandB.watch {self.watch!r} sees only shards at trainer.zero_stage 3; set it to null")
        if trainer.is_main and not self.offline:
            _log_in()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Start or resume the W&B run.

        Raises:
            ValueError: wandb cannot start.
        """
        if trainer.step == 0:
            self._id = None
        if not trainer.is_main:
            return
        self._run = self._open(trainer)
        self._id = self._run.id
        if self.watch:
            forward_passes = self.watch_every * trainer.plan.accumulate
            self._run.watch(trainer.engine.model, log=self.watch, log_freq=forward_passes)
        if self.log_code:
            self._run.log_code(".", include_fn=_is_source, exclude_fn=_is_excluded)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log training metrics."""
        if trainer.step % self.log_every == 0 or trainer.step == trainer.plan.max_steps:
            self._add(trainer.step, "train", {name: value for name, value in metrics.items() if name != "step"})

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log validation metrics."""
        self._add(trainer.step, "validation", strip_validation_prefix(metrics))

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Finish the W&B run as failed."""
        self._close(failed=True)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Upload the model if log_model is set, and finish the W&B run."""
        if self._run is not None and self.log_model and not trainer.interrupted:
            self._run.log_artifact(_model_artifact(trainer.output_dir, f"model-{self._id}"))
        self._close(failed=False)

    def state_dict(self) -> dict[str, Any]:
        """The id of the W&B run."""
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the id."""
        self._id = state["id"]

    def _open(self, trainer: Trainer) -> Any:
        import wandb

        with _errors_explained():
            return wandb.init(
                project=self.project, name=self.name, id=self._id, resume="allow", tags=self.tags,
                mode="offline" if self.offline else None,  # None: WANDB_MODE, by default online
                dir=str(trainer.output_dir), config=_configuration(trainer),
            )  # fmt: skip

    def _add(self, step: int, group: str, metrics: Mapping[str, float]) -> None:
        # W&B merges metrics of the same step, and ignores earlier steps, which a resumed run repeats.
        if self._run is not None:
            self._run.log({f"{group}/{name}": value for name, value in metrics.items()}, step=step)

    def _close(self, failed: bool) -> None:
        if self._run is not None:
            if self.watch:
                self._run.unwatch()
            self._run.finish(exit_code=int(failed))
        self._run = None


def _log_in() -> None:
    """Log in, on a terminal also by asking for the API key, unless WANDB_MODE or W&B's settings choose another mode."""
    import wandb

    if wandb.setup().settings.mode not in ("offline", "disabled"):
        with _errors_explained():
            wandb.login()


@contextmanager
def _errors_explained() -> Iterator[None]:
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        reason = str(error).strip().rstrip(".")
        advice = "log in with 'wandb login', or set offline to true"
        raise ValueError(f"callbacks: WandB cannot start: {reason}; {advice}") from error


def _configuration(trainer: Trainer) -> dict[str, Any]:
    """The resolved recipe if there is one, otherwise the run summary."""
    recipe = trainer.output_dir / "recipe.yaml"
    if recipe.is_file():
        import yaml

        return yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return json.loads(json.dumps(summarize(trainer), default=str))


def _model_artifact(folder: Path, name: str) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type="model")
    for path in sorted(path for pattern in _MODEL_FILES for path in folder.glob(pattern)):
        artifact.add_file(str(path), policy="immutable")  # no copy: the file does not change any more
    return artifact


def _is_source(path: str) -> bool:
    return path.endswith((".py", ".yaml"))


def _is_excluded(path: str, root: str) -> bool:
    parts = Path(path).resolve().relative_to(Path(root).resolve()).parts
    return any(part.startswith(".") or part in ("site-packages", "wandb", "__pycache__") for part in parts[:-1])
