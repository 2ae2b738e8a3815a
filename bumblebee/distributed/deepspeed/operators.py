"""Importing DeepSpeed quietly, and compiling only the operators in use.

DeepSpeed compiles its operators when they are first used. On a CPU it would compile one for shared memory at every first
start, and fail without a C++ compiler; its own optimizers and NVMe offload really need theirs.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import torch
from filelock import FileLock

from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.ds_config import DsConfig, EngineOptions, deepspeed_config, uses_nvme
from bumblebee.utils.formatting import hint

if TYPE_CHECKING:
    from pydantic import ValidationError

logger = logging.getLogger(__name__)
_SECTIONS = {  # the class of DeepSpeed that reads a section of its configuration, and the section
    "DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedZeroOffloadOptimizerConfig": "zero_optimization.offload_optimizer",
    "DeepSpeedZeroOffloadParamConfig": "zero_optimization.offload_param", "DeepSpeedFP16Config": "fp16",
    "DeepSpeedBF16Config": "bf16", "CommsLoggerConfig": "comms_logger",
}  # fmt: skip
SLOW = 3.0  # seconds; a load that takes longer is a compilation


class _OpBuilder(Protocol):
    name: str


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for a type of device, with its log messages below ERROR hidden."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # Its messages are for its developers. What a user must know, we log ourselves.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    return deepspeed


@contextmanager
def quiet_initialization(deepspeed: ModuleType, overrides: DsConfig) -> Iterator[None]:
    """Initialize DeepSpeed inside: nothing is printed, and only operators that are used are compiled.

    Args:
        deepspeed: the package.
        overrides: the user's part of the configuration.

    Raises:
        ValueError: an operator is needed and cannot be compiled, or DeepSpeed refuses the user's configuration.
    """
    quiet = redirect_stdout(io.StringIO())  # it prints its memory
    with _explained_refusals(overrides), _without_shm_operator(deepspeed), reported_compilation(), quiet:
        yield


@contextmanager
def _explained_refusals(overrides: DsConfig) -> Iterator[None]:
    """Turn what DeepSpeed raises about the user's configuration into a ValueError that names trainer.deepspeed."""
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise ValueError(_explain_validation(error)) from error
    except (AssertionError, NotImplementedError, DeepSpeedConfigError) as error:
        if not overrides:
            raise
        raise ValueError(f"trainer.deepspeed: DeepSpeed refuses this configuration: {error}") from error


def _explain_validation(error: ValidationError) -> str:
    """Return one line about the first of pydantic's errors: the option, and what is wrong with it."""
    first = error.errors()[0]
    path = [part for part in [_SECTIONS.get(error.title), *map(str, first["loc"])] if part]
    option = ".".join(["trainer.deepspeed", *path])
    if first["type"] == "extra_forbidden":
        return f"{option} is not an option of DeepSpeed{_similar_option(error.title, path[-1])}"
    return f"{option}: {first['msg']}, got {first['input']!r}"


def _similar_option(title: str, name: str) -> str:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if title != DeepSpeedZeroConfig.__name__:
        return ""
    return hint(name, [field.alias or key for key, field in DeepSpeedZeroConfig.model_fields.items()])


@contextmanager
def _without_shm_operator(deepspeed: ModuleType) -> Iterator[None]:
    """Mark the shared-memory operator as incompatible: gloo does its work, and no compiler is needed."""
    compatible = deepspeed.ops.__compatible_ops__
    before = compatible.get("deepspeed_shm_comm")
    compatible["deepspeed_shm_comm"] = False
    try:
        yield
    finally:
        compatible["deepspeed_shm_comm"] = before


@contextmanager
def reported_compilation() -> Iterator[None]:
    """Log when an operator is being compiled, and turn a failure into a ValueError."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    load = OpBuilder.jit_load
    OpBuilder.jit_load = lambda builder, *args, **kwargs: _compile(load, builder, *args, **kwargs)
    try:
        yield
    finally:
        OpBuilder.jit_load = load


def _compile(load: Callable[..., ModuleType], builder: _OpBuilder, *args: object, **kwargs: object) -> ModuleType:
    timer = threading.Timer(
        SLOW, logger.info, ["compiling DeepSpeed's %s operator, once on this machine; this takes minutes", builder.name]
    )
    if process_group.is_main():
        timer.start()
    try:
        with _only_compilation(builder.name):
            return load(builder, *args, **kwargs)
    except Exception as error:  # of many types: without CUDA's compiler even a TypeError, since the path to it is None
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        from torch.utils import cpp_extension

        if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
            last = "the CUDA toolkit, whose version must be that of torch, was not found (nvcc; CUDA_HOME is not set)."
        raise ValueError(
            f"DeepSpeed's {builder.name} operator cannot be compiled here: {last}"
            " Optimizers of torch.optim and offload to the CPU need no compiler"
        ) from error
    finally:
        timer.cancel()


@contextmanager
def _only_compilation(name: str) -> Iterator[None]:
    """Let one process at a time compile an operator, and delete what a killed one left locked.

    torch waits without end for a file named lock in the operator's folder, which a killed compilation leaves behind. The system
    releases our lock when its process ends in whatever way.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    with FileLock(folder.with_name(f".{name}.bumblebee.lock")):
        if (left := folder / "lock").exists():
            logger.warning("a compilation of DeepSpeed's %s operator was cut off: compiling it again", name)
            left.unlink(missing_ok=True)
        yield


def can_offload_to_nvme() -> bool:
    """Whether the asynchronous I/O operator can be compiled here; it needs libaio and a C++ compiler."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def usable_config(options: EngineOptions) -> DsConfig:
    """DeepSpeed's configuration, checked against what can be compiled on this machine.

    Raises:
        ValueError: offload to NVMe is configured, and its operator cannot be compiled.
    """
    config = deepspeed_config(options)
    if uses_nvme(config) and not can_offload_to_nvme():
        raise ValueError(
            "trainer.deepspeed: device nvme needs libaio (on Debian and Ubuntu: apt install libaio-dev) and a C++ compiler;"
            " use device cpu without them"
        )
    return config
