"""The real Trainer on an engine that computes nothing, for tests of callbacks.

``StubTrainer`` runs the loop of ``bumblebee.trainer.Trainer`` with a loss of 2 / step, 100 target tokens per step and a
constant learning rate of 0.01.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bumblebee.callback import Callback
from bumblebee.config import BumblebeeConfig
from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed.deepspeed.ds_config import EngineOptions
from bumblebee.model import Bumblebee
from bumblebee.tasks.task import ForwardFn, Task
from bumblebee.trainer import Trainer

TOKENS_PER_MICRO_BATCH = 50


class StubEngine:
    """The interface of ``TrainingEngine`` without forward, backward and update."""

    def __init__(
        self, model: nn.Module, optimizer: Callable[..., Any], groups: list[dict[str, Any]], device: torch.device,
        options: EngineOptions,
    ) -> None:  # fmt: skip
        self.options = options
        self.model, self.group_sizes = model, [sum(p.numel() for p in group["params"]) for group in groups]
        self._optimizer = optimizer(groups)
        self.dtype, self.optimizer_name = "float32", type(self._optimizer).__name__
        self.algorithm = self.optimizer_name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        pass

    def step(self) -> bool:
        return True

    def weight_norm(self) -> Tensor:
        return torch.ones(())

    def train(self) -> None:
        self.model.train()

    def eval(self) -> None:
        self.model.eval()

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def gradient_norm(self) -> float:
        return 1.0

    def loss_scale(self) -> dict[str, float]:
        return {}

    def scaler_state(self) -> dict[str, int | float | bool]:
        return {}

    def load_scaler_state(self, state: dict[str, int | float | bool]) -> None:
        pass

    def group_state(self) -> list[dict[str, float]]:
        return []

    def load_group_state(self, state: list[dict[str, float]]) -> None:
        pass

    def full_tensors(self, select: Callable[[str], bool] = lambda key: True) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in self.model.state_dict().items() if select(name))

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.model)

    def save(self, folder: Path, select: Callable[[str], bool] = lambda key: True) -> dict[str, str]:
        return {}

    def load(self, folder: Path) -> None:
        pass

    def close(self) -> None:
        pass


class StubTask(Task):
    """A task with fixed losses and validation metrics."""

    def __init__(self) -> None:
        config = BumblebeeConfig.preset(
            "tiny", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        self.model, self.weights = Bumblebee(config), {"loss": 1.0}
        self.steps = 0
        self.validation = {"validation_loss": 2.5}
        self.extra_metrics: dict[str, float] = {}

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        return {"loss": TOKENS_PER_MICRO_BATCH}

    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        return {"loss": torch.tensor(TOKENS_PER_MICRO_BATCH * 2.0 / (self.steps + 1), dtype=torch.float64)}

    def after_step(self) -> None:
        self.steps += 1

    def metrics(self) -> dict[str, float]:
        return self.extra_metrics

    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        return {"batches": torch.tensor(1.0)}

    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return dict(self.validation)


class StubData(DataModule):
    """22 training samples and two validation samples."""

    def __init__(self, tokenizer: Any = None, num_validation: int = 2) -> None:
        self.tokenizer, self.num_validation = tokenizer, num_validation

    def setup(self, seed: int) -> None:
        self.train, self.validation = range(22), range(self.num_validation)

    def collate(self, samples: list[Any]) -> Batch:
        return {"input_ids": torch.tensor([samples])}


class StubTrainer(Trainer):
    """A trainer that has been set up with stubs and records what callbacks request.

    Args:
        folder: output folder; an earlier run there is left alone.
        callbacks: in order.
        steps: of the run.
        step: number of steps done before, as in a resumed run.
        data: by default a ``StubData`` without a tokenizer.
        options: further options of the trainer.
    """

    def __init__(
        self, folder: Path, callbacks: list[Callback], steps: int = 6, step: int = 0, data: StubData | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        defaults = {"micro_batch_size": 4, "accumulate": 2, "precision": "fp32", "device": "cpu"}
        super().__init__(max_steps=steps, **{**defaults, **options})
        self.events: list[tuple[str, int]] = []  # ("validate", "save" or "save last", step)
        self.logged: dict[str, float] = {}
        named = {f"callback {index}": callback for index, callback in enumerate(callbacks)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bumblebee.training.setup.TrainingEngine", StubEngine)
            patch.setattr("bumblebee.training.setup.check_free", lambda *_: None)
            task = StubTask()
            self.setup(task, data or StubData(), lambda groups: torch.optim.SGD(groups, lr=0.01), None, named, folder)
        self._unlock_folder()  # tests do not close their trainers
        self.step = task.steps = step

    def run(self) -> StubTrainer:
        """Run the loop and return the trainer."""
        super().run()
        return self

    def validate(self) -> dict[str, float]:
        """Record and validate."""
        self.events.append(("validate", self.step))
        return super().validate()

    def save_checkpoint(self, last: bool = False, model: bool = True) -> Path:
        """Record and save."""
        self.events.append(("save last" if last else "save", self.step))
        return super().save_checkpoint(last, model)

    def log(self, name: str, value: float) -> None:
        """Record and log."""
        self.logged[name] = value
        super().log(name, value)
