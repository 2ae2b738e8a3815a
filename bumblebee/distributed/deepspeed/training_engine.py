"""Engine: the model, the optimizer and DeepSpeed. The only file that imports deepspeed.

What is particular about DeepSpeed is dealt with here, so that the loop is forward, backward, step:

- ``managed_gradient_accumulation`` is off: ``backward`` only adds up, ``step`` reduces and updates. DeepSpeed's own counter
  would divide by the accumulation and never apply a partial window.
- bf16 on stage 0 keeps no fp32 weights for the optimizer and trains wrongly: there fp32 weights run under autocast instead.
- Gradients are added up in fp32: in bf16 many micro-batches lose bits.
- Stage 0 measures the gradient's norm only where it clips, and in another function.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.sharded_state import PieceReader, write_buffers, write_pieces
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.ds_config import EngineOptions, deepspeed_config, on_nvme
from bumblebee.distributed.deepspeed.zero_shards import Span, pieces, restore, spans
from bumblebee.hardware.flops import numel_of


class Engine:
    """A DeepSpeed engine with a plain face.

    Args:
        model: on the CPU or already on the device.
        optimizer: from parameter groups to an optimizer.
        groups: its parameter groups.
        device: where to train.
        options: see EngineOptions.

    Raises:
        ValueError: overrides that contradict the trainer's options, or fp16 on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Any],
        groups: list[dict[str, Any]],
        device: torch.device,
        options: EngineOptions,
    ) -> None:
        if options.precision == "fp16" and device.type == "cpu":
            raise ValueError("trainer.precision fp16 needs a GPU; on a CPU take bf16 or fp32")
        deepspeed = import_deepspeed(device)
        self.options = options
        self.device = device
        self.group_sizes = [sum(numel_of(p) for p in group["params"]) for group in groups]  # DeepSpeed flattens or shards them
        # Weights from a folder come in the file's dtype. For bf16 on stages 1 to 3 DeepSpeed casts, and keeps fp32 beside.
        model.to(device=device, dtype=torch.float32 if options.weights_dtype == torch.float32 else None)
        config = _config(options)
        with _no_compiler_needed(deepspeed), _operators_compiled(), redirect_stdout(io.StringIO()):  # it prints its memory
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer(groups), config=config, dist_init_required=False
            )
        if options.zero_stage == 3:
            for module in model.modules():  # one that looks at another's weights says so in ``reads``
                for parameter in (p for other in getattr(module, "reads", ()) for p in other.parameters(recurse=False)):
                    deepspeed.zero.register_external_parameter(module, parameter)
        if options.zero_stage == 0:
            self._engine.clip_fp32_gradients = self._clip_at_stage_0
        self.model: nn.Module = self._engine.module

    # -- one step ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss to the window's."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Average the window's gradient over ranks, clip, update, clear."""
        self._engine.step()

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Evaluation mode: no dropout."""
        self._engine.eval()

    @property
    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; ``lr`` set here counts from the next step on."""
        return self._optimizer.param_groups

    @property
    def dtype(self) -> str:
        """Name of the trained weights' dtype, e.g. "bfloat16"."""
        return str(next(p for p in self.model.parameters() if p.requires_grad).dtype).removeprefix("torch.")

    @property
    def optimizer_name(self) -> str:
        """The class of the optimizer, without DeepSpeed's wrapping."""
        return type(getattr(self._optimizer, "optimizer", self._optimizer)).__name__

    def gradient_norm(self) -> float:
        """The last step's gradient norm before clipping. The GPU is waited for."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def loss_scale(self) -> dict[str, float]:
        """With fp16 the scale that losses are multiplied with, and the steps skipped so far because it was too large."""
        if self.options.precision != "fp16":
            return {}
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        scale = scaler.get_scale() if scaler else self._optimizer.cur_scale
        return {"loss_scale": float(scale), "skipped_steps": float(self._engine.skipped_steps)}

    def scaler_state(self) -> dict[str, Any]:
        """With fp16, what the loss scaler remembers, as JSON values."""
        if self.options.precision != "fp16":
            return {}
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        state = scaler.state_dict() if scaler else vars(self._optimizer.loss_scaler)
        return {name: value for name, value in state.items() if isinstance(value, int | float | bool)}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Take back what ``scaler_state`` gave; nothing where another precision wrote it."""
        if self.options.precision != "fp16" or not state:
            return
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None)
        if scaler:
            scaler.load_state_dict(state)
        else:
            vars(self._optimizer.loss_scaler).update(state)

    def _clip_at_stage_0(self) -> None:
        limit = self.options.gradient_clip or float("inf")
        self._engine._global_grad_norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit)

    # -- state ---------------------------------------------------------------------------------------------------------

    def full_tensors(self, wanted: Callable[[str], bool] = lambda key: True) -> Iterator[tuple[str, Tensor]]:
        """Every (key, whole tensor) of the model that is wanted, one by one. Collective: all ranks go through it together."""
        from deepspeed.runtime.zero import GatheredParameters

        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            if not wanted(key):
                continue
            if key in parameters and self.options.zero_stage == 3:
                with GatheredParameters([parameters[key]]):
                    yield key, tensor.detach().cpu().clone()
            else:
                yield key, tensor.detach()

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """The model, to be called outside of training as if there were no ZeRO. Collective.

        At stage 3 every device holds all weights meanwhile, and the hooks that fetch and drop them are set aside: a rank may
        then call the model alone, or not at all.
        """
        if self.options.zero_stage < 3:
            yield self.model
            return
        from deepspeed.runtime.zero import GatheredParameters

        offload = self._optimizer.parameter_offload
        handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
        tables = {id(table): table for handle in handles if (table := handle.hooks_dict_ref()) is not None}
        before = [(table, dict(table)) for table in tables.values()]
        with GatheredParameters(list(self.model.parameters())):
            for handle in handles:
                handle.hooks_dict_ref().pop(handle.id, None)
            try:
                yield self.model
            finally:
                for table, hooks in before:  # in their old order
                    table.clear()
                    table.update(hooks)

    def save(self, folder: Path) -> None:
        """Write this rank's pieces of weights and optimizer state into an existing folder.

        Raises:
            OSError: they cannot be written.
        """
        rank, ranks = process_group.rank(), process_group.world_size()
        if rank == 0 or self.options.zero_stage > 0:  # at stage 0 every rank has everything
            count = ranks if self.options.zero_stage > 0 else 1
            write_pieces(folder, f"optimizer-{rank:05d}-of-{count:05d}", pieces(self._spans(), self._optimizer))
        if rank == 0:
            write_buffers(folder, self._buffers())

    def load(self, folder: Path) -> None:
        """Take back what ``save`` wrote, by whatever number of ranks at whatever stage. Collective.

        Raises:
            ValueError: the pieces are not there, or are those of another model.
        """
        from deepspeed.runtime.zero import GatheredParameters

        with PieceReader(folder) as reader:
            named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named.items()}
            buffers = self._buffers()
            shapes.update((name, tuple(buffer.shape)) for name, buffer in buffers.items())
            theirs = {**reader.shapes, **{name: tuple(buffer.shape) for name, buffer in reader.buffers.items()}}
            if wrong := sorted(set(shapes.items()) ^ set(theirs.items())):
                raise ValueError(f"{folder} holds another model: {wrong[0][0]} differs, and {len(wrong) - 1} more")
            for name, buffer in buffers.items():
                buffer.copy_(reader.buffers[name])
            restore(self._spans(), self._optimizer, reader)
            for name, parameter in named.items():
                if self.options.zero_stage == 3:
                    with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
                        if process_group.is_main():
                            parameter.copy_(reader.whole(name))
                elif self.options.zero_stage > 0:
                    parameter.data.copy_(reader.whole(name))

    def _buffers(self) -> dict[str, Tensor]:
        """What model folders hold beside parameters: the same on all ranks."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {key: tensor for key, tensor in self.model.state_dict().items() if key not in parameters}

    def _spans(self) -> list[Span]:
        return spans(self.model, self._optimizer, self.options.zero_stage, process_group.rank())

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers, and of the groups it would hand to this process's next engine."""
        from deepspeed.utils import groups

        self._engine.destroy()
        groups._release_process_group_references()
        del self._engine, self._optimizer, self.model


class FrozenEngine:
    """A model that is only called: without gradients, without dropout, in the arithmetic of the Engine beside it.

    At stage 3 it is cut over the ranks like the trained one; below, it is a plain module on the device.

    Args:
        model: perhaps built in shards, or a deep copy of a model that was; such a copy has no weights yet.
        device: where to run.
        options: those of the Engine.
        copy_of: where the weights of such a copy are.
    """

    def __init__(self, model: nn.Module, device: torch.device, options: EngineOptions, copy_of: nn.Module) -> None:
        self._device = device
        self._autocast = options.half if options.zero_stage == 0 else None
        self._engine: Any = None
        self.model = model.requires_grad_(False)
        if options.zero_stage < 3:
            model.to(device=device, dtype=options.weights_dtype)
        else:
            deepspeed = import_deepspeed(device)
            config = _config(options)
            config["zero_optimization"].pop("offload_optimizer", None)
            with _no_compiler_needed(deepspeed), redirect_stdout(io.StringIO()):
                _copy_shards(model, copy_of, deepspeed.zero.Init(config_dict_or_path=config))
                self._engine = deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]
        model.eval()

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward. At stage 3 collective."""
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            return (self._engine or self.model)(*args, **kwargs)

    def close(self) -> None:
        """Let go of the weights and of DeepSpeed's hooks. Once is enough."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self.model = None  # type: ignore[assignment]


def _copy_shards(copy: nn.Module, original: nn.Module, building: Any) -> None:
    """Fill a deep copy of a model in shards: copy.deepcopy took what a parameter seems to hold, which is nothing there.

    One whole parameter is there at a time.
    """
    from deepspeed.runtime.zero import GatheredParameters

    sources = dict(original.named_parameters())
    for name, parameter in copy.named_parameters():
        if hasattr(parameter, "ds_tensor") or parameter.numel() > 0:
            continue
        with GatheredParameters([sources[name]]):
            parameter.data = sources[name].detach().clone()
        building._convert_to_zero_parameters([parameter])


@contextmanager
def built_in_shards(device: torch.device, options: EngineOptions) -> Iterator[None]:
    """Modules made inside are cut over the ranks at once, parameter by parameter: no rank ever holds a whole model."""
    import_module("torch._dynamo")  # it compares functions of torch that are replaced below, so it cannot be imported later
    deepspeed = import_deepspeed(device)
    with _no_compiler_needed(deepspeed), _operators_compiled(), redirect_stdout(io.StringIO()):
        building = deepspeed.zero.Init(config_dict_or_path=_config(options))
    process_group.building_in_shards = True
    try:
        with building:
            yield
    finally:
        process_group.building_in_shards = False


@contextmanager
def built_whole() -> Iterator[None]:
    """Inside of ``built_in_shards``: modules made here are whole on every rank. They are cut when training begins."""
    from deepspeed.runtime.zero import partition_parameters

    partition_parameters.shutdown_init_context()
    try:
        yield
    finally:
        partition_parameters.restore_init_context()


# -- keeping deepspeed quiet and free of compilers -----------------------------------------------------------------------


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for a kind of device, quiet."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # Its notes are for its developers. Errors pass; what a user must know we say ourselves.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    return deepspeed


@contextmanager
def _operators_compiled() -> Iterator[None]:
    """DeepSpeed's own optimizers and its asynchronous I/O are compiled when they are first used: tell why nothing happens.

    Raises:
        ValueError: they cannot be compiled.
    """
    from deepspeed.ops.op_builder.builder import OpBuilder

    load = OpBuilder.jit_load

    def told(builder: Any, *args: Any, **kwargs: Any) -> Any:
        note = f"DeepSpeed compiles its {builder.name} operator, once on this machine; that takes minutes"
        timer = threading.Timer(3.0, print, [note], {"file": sys.stderr, "flush": True})
        if process_group.is_main():
            timer.start()
        try:
            return load(builder, *args, **kwargs)
        except (RuntimeError, OSError, CalledProcessError) as error:
            last = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"DeepSpeed's {builder.name} operator cannot be compiled here: {last}"
                " An optimizer of torch.optim, and offload to the cpu, need no compiler"
            ) from error
        finally:
            timer.cancel()

    OpBuilder.jit_load = told
    try:
        yield
    finally:
        OpBuilder.jit_load = load


def _config(options: EngineOptions) -> dict[str, Any]:
    """What ``deepspeed_config`` gives, where it can be had here.

    Raises:
        ValueError: NVMe is asked for, and the operator for it cannot be compiled.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    config = deepspeed_config(options)
    if on_nvme(config) and not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "trainer.deepspeed: device nvme needs libaio (on Debian and Ubuntu: apt install libaio-dev) and a C++ compiler;"
            " without them take cpu"
        )
    return config


class _no_compiler_needed:  # noqa: N801  (used like a function)
    """On a CPU DeepSpeed would compile a shared-memory operator at the first start, and die without a C++ compiler."""

    def __init__(self, deepspeed: Any) -> None:
        self._table = deepspeed.ops.__compatible_ops__

    def __enter__(self) -> None:
        self._before = self._table.get("deepspeed_shm_comm")
        self._table["deepspeed_shm_comm"] = False

    def __exit__(self, *_: object) -> None:
        self._table["deepspeed_shm_comm"] = self._before
