"""TrainingEngine: the model, the optimizer and DeepSpeed, so that the training loop is forward, backward, step.

What is particular about DeepSpeed is handled here:

- ``managed_gradient_accumulation`` is off: ``backward`` accumulates, ``step`` reduces and updates. DeepSpeed's own counter
  would divide by the accumulation and never apply a partial window.
- bf16 at stage 0 keeps no fp32 weights for the optimizer and trains wrongly: there fp32 weights run under autocast instead.
- Gradients are accumulated in fp32: in bf16, many micro-batches lose bits.
- Gradient clipping: at stages 1 to 3 DeepSpeed's optimizer clips in ``step`` (``gradient_clipping``, set by ds_config.py). At
  stage 0 its clipping function is replaced by ``_clip_at_stage_0``, which also measures the norm if clipping is off.
- A step whose gradient norm is NaN or infinite is skipped: by DeepSpeed at stages 1 to 3, by ``_clip_at_stage_0`` at stage 0.
  Each reads the norm on the host for that, once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed import engine_state
from bumblebee.distributed.deepspeed.compiled_blocks import gather_compiled_blocks_whole
from bumblebee.distributed.deepspeed.ds_config import EngineOptions
from bumblebee.distributed.deepspeed.gathering import gathered_model, iter_full_tensors
from bumblebee.distributed.deepspeed.layer_gathering import gathered_by_layer
from bumblebee.distributed.deepspeed.operators import import_deepspeed, quiet_initialization, usable_config
from bumblebee.distributed.deepspeed.optimizer_types import ParamGroup
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel, iter_local_weights
from bumblebee.distributed.deepspeed.zero_shards import algorithm_of, base_optimizer


class TrainingEngine:
    """A DeepSpeed engine with a plain interface.

    Args:
        model: on the CPU or already on the device.
        optimizer: from parameter groups to an optimizer.
        groups: its parameter groups.
        device: where to train.
        options: see EngineOptions.

    Raises:
        ValueError: overrides contradict the trainer's options, or fp16 on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[ParamGroup]], object],
        groups: list[ParamGroup],
        device: torch.device,
        options: EngineOptions,
    ) -> None:
        if options.precision == "fp16" and device.type == "cpu":
            raise ValueError("trainer.precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
        deepspeed = import_deepspeed(device)
        self.options = options
        self.device = device
        self.group_sizes = [sum(full_numel(p) for p in group["params"]) for group in groups]  # before DeepSpeed flattens them
        # Weights from a folder have the file's dtype. For bf16 at stages 1 to 3 DeepSpeed casts, and keeps an fp32 copy.
        model.to(device=device, dtype=torch.float32 if options.weights_dtype == torch.float32 else None)
        for parameter in model.parameters():
            if not parameter.is_contiguous():  # DeepSpeed broadcasts parameters as bytes; their gradients get the same layout
                parameter.data = parameter.data.contiguous()
        config = usable_config(options)
        if options.zero_stage == 3:
            gather_compiled_blocks_whole(deepspeed, model)
        with quiet_initialization(deepspeed, options.overrides), _globals_reset_on_failure():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer(groups), config=config, dist_init_required=False
            )
        if options.zero_stage == 3:
            _register_external_parameters(deepspeed, model)
        if process_group.world_size() == 1:
            # DeepSpeed would flatten all gradients of stages 0 and 1, reduce them over one rank and copy them back.
            self._engine.allreduce_no_retain = _reduce_nothing
        self._finite_at_stage_0 = True
        if options.zero_stage == 0:
            self._engine.clip_fp32_gradients = self._clip_at_stage_0
        elif options.precision == "fp16":
            self._optimizer.loss_scaler.raise_error_at_min_scale = False  # the trainer counts skipped steps
        self.model: nn.Module = self._engine.module
        self._initial_groups = [_numbers(group) for group in self.parameter_groups]

    # -- one step ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        """The model's forward."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> bool:
        """Average the accumulated gradient over ranks, clip it, update the weights, and zero it.

        Returns:
            Whether the step was taken. If the gradient is NaN or infinite on any rank, every rank skips the step: weights
            and optimizer state are unchanged.
        """
        self._engine.step()
        taken = self._finite_at_stage_0 and self._engine.was_step_applied()
        if not taken and self.options.zero_stage in (1, 2) and self.options.offload:
            # DeepSpeed 0.19.8 keeps the gradient that it skips, and adds those of all later steps to it.
            self._optimizer.averaged_gradients = dict.fromkeys(self._optimizer.averaged_gradients)
        return taken

    def train(self) -> None:
        """Set training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Set evaluation mode, without dropout."""
        self._engine.eval()

    @property
    def parameter_groups(self) -> list[ParamGroup]:
        """The optimizer's groups; a changed ``lr`` takes effect at the next step."""
        return self._optimizer.param_groups

    @property
    def dtype(self) -> str:
        """Name of the trained weights' dtype, e.g. "bfloat16"."""
        return str(next(p for p in self.model.parameters() if p.requires_grad).dtype).removeprefix("torch.")

    @property
    def optimizer_name(self) -> str:
        """Class name of the optimizer that DeepSpeed wraps."""
        return type(base_optimizer(self._optimizer)).__name__

    @property
    def algorithm(self) -> str:
        """Name of what the optimizer computes: classes of torch and DeepSpeed that give the same results have the same."""
        return algorithm_of(base_optimizer(self._optimizer))

    def gradient_norm(self) -> float:
        """The last step's gradient norm before clipping; infinite if the step was skipped. Synchronizes with the GPU."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def _clip_at_stage_0(self) -> None:
        limit = self.options.gradient_clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self._finite_at_stage_0 = bool(norm.isfinite())
        self._engine._global_grad_norm = norm if self._finite_at_stage_0 else float("inf")
        if not self._finite_at_stage_0:  # DeepSpeed calls the optimizer nevertheless, which ignores parameters without gradient
            for parameter in self.model.parameters():
                parameter.grad = None

    def weight_norm(self) -> Tensor:
        """L2 norm of the trainable weights that this rank holds in memory: (). Does not synchronize with the GPU."""
        local = iter_local_weights(self.model, process_group.rank())
        return nn.utils.get_total_norm([weights for _, weights in local]).to(self.device)

    def non_finite_weights(self) -> str | None:
        """Name of the first trainable parameter with a NaN or infinite weight on this rank. Synchronizes with the GPU."""
        local = iter_local_weights(self.model, process_group.rank())
        return next((name for name, weights in local if not weights.isfinite().all()), None)

    # -- loss scaling in fp16 --------------------------------------------------------------------------------------------

    @property
    def _autocast_scaler(self) -> torch.amp.GradScaler | None:
        """torch's scaler at stage 0; None at higher stages, where DeepSpeed's optimizer scales."""
        return getattr(self._engine, "torch_autocast_z0_gradscaler", None)

    def loss_scale(self) -> dict[str, float]:
        """In fp16, the current loss scale; else empty."""
        if self.options.precision != "fp16":
            return {}
        scaler = self._autocast_scaler
        scale = scaler.get_scale() if scaler else self._optimizer.cur_scale
        return {"loss_scale": float(scale)}

    def lowers_loss_scale(self) -> bool:
        """Whether a skipped step lowers fp16's loss scale, which is neither fixed nor at its minimum yet."""
        if self.options.precision != "fp16":
            return False
        if scaler := self._autocast_scaler:
            return scaler.is_enabled() and scaler.get_scale() > 1.0  # torch's has no minimum; DeepSpeed's is 1 by default
        scaler = self._optimizer.loss_scaler
        return scaler.dynamic and scaler.cur_scale > scaler.min_scale

    def scaler_state(self) -> dict[str, int | float | bool]:
        """In fp16, the loss scaler's state as JSON values; else empty."""
        if self.options.precision != "fp16":
            return {}
        scaler = self._autocast_scaler
        state = scaler.state_dict() if scaler else vars(self._optimizer.loss_scaler)
        return {name: value for name, value in state.items() if isinstance(value, int | float | bool)}

    def load_scaler_state(self, state: dict[str, int | float | bool]) -> None:
        """Restore ``scaler_state``; a state saved in another precision is empty and changes nothing."""
        if self.options.precision != "fp16" or not state:
            return
        if scaler := self._autocast_scaler:
            scaler.load_state_dict(state)
        else:
            vars(self._optimizer.loss_scaler).update({**state, "raise_error_at_min_scale": False})

    # -- state in parameter groups -------------------------------------------------------------------------------------

    def group_state(self) -> list[dict[str, float]]:
        """What the optimizer has changed in its parameter groups, such as Prodigy's step size, by group and name."""
        return [
            {name: value for name, value in _numbers(group).items() if value != initial.get(name)}
            for group, initial in zip(self.parameter_groups, self._initial_groups, strict=True)
        ]

    def load_group_state(self, state: Sequence[Mapping[str, float]]) -> None:
        """Restore ``group_state``. Options that the optimizer has not changed keep the values of this run.

        Raises:
            ValueError: the groups are others.
        """
        if any(state) and len(state) != len(self.parameter_groups):
            raise ValueError(f"it is of {len(state)} parameter groups, and this run has {len(self.parameter_groups)}")
        for group, values in zip(self.parameter_groups, state, strict=False):
            group.update(values)  # type: ignore[typeddict-item]

    # -- weights and state -----------------------------------------------------------------------------------------------

    def full_tensors(self, select: Callable[[str], bool] = lambda key: True) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, whole tensor) for every selected key of the state dict. Collective: all ranks iterate together."""
        return iter_full_tensors(self.model, self.options.zero_stage, select)

    def whole_model(self) -> AbstractContextManager[nn.Module]:
        """A context in which the model can be called as if there were no ZeRO, by any rank alone. Collective.

        At stage 3 every device holds all weights meanwhile.
        """
        if self.options.zero_stage < 3:
            return nullcontext(self.model)
        return gathered_model(self.model, self._optimizer)

    def model_by_layer(self) -> AbstractContextManager[nn.Module]:
        """Like ``whole_model``, but at stage 3 a device holds the weights of one transformer block at a time. Collective.

        Inside, ranks may call the model any number of times, under ``torch.no_grad``, and nothing else that is collective.
        """
        if self.options.zero_stage < 3:
            return nullcontext(self.model)
        return gathered_by_layer(self.model, self._optimizer)

    def save(self, folder: Path, select: Callable[[str], bool] = lambda key: True) -> dict[str, str]:
        """Write this rank's shards of weights and optimizer state into an existing folder.

        Args:
            folder: where.
            select: whether a model folder has a parameter that modules share under a further name.

        Returns:
            The SHA-256 of each file that this rank wrote, by name.

        Raises:
            OSError: they cannot be written.
        """
        return engine_state.save(folder, self.model, self._optimizer, self.options.zero_stage, select)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, at any number of ranks and any stage. Collective.

        Raises:
            ValueError: the folder holds no training state, or that of another model.
        """
        engine_state.load(folder, self.model, self._optimizer, self.options.zero_stage)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, and what it would apply to the next engine."""
        self._engine.destroy()
        _reset_globals()
        del self._engine, self._optimizer, self.model


def _reduce_nothing(*args: object, **kwargs: object) -> None:
    """Stands for the reduction of gradients over a single rank."""


def _numbers(group: ParamGroup) -> dict[str, float]:
    """The numbers of a parameter group, which JSON holds exactly, without the learning rates, which the schedule sets."""
    rates = ("lr", "initial_lr")
    return {name: value for name, value in group.items() if isinstance(value, int | float) and name not in rates}


def _reset_globals() -> None:
    """Reset what DeepSpeed keeps in modules and would apply to the next engine: process groups, and stage 0's autocast."""
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    groups._release_process_group_references()
    torch_autocast.TORCH_AUTOCAST_INITIALIZED, torch_autocast.TORCH_AUTOCAST_DTYPE = False, None


@contextmanager
def _globals_reset_on_failure() -> Iterator[None]:
    """An engine that DeepSpeed refuses to build must not affect the next one either."""
    try:
        yield
    except BaseException:
        _reset_globals()
        raise


def _register_external_parameters(deepspeed: ModuleType, model: nn.Module) -> None:
    """Tell DeepSpeed which modules use the weights of others: those that list them in an attribute ``reads``."""
    for module in model.modules():
        for other in getattr(module, "reads", ()):
            for parameter in other.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(module, parameter)
