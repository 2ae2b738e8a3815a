"""How often an engine step would wait for a GPU: reads by the host and copies that are not asynchronous, by function."""

from __future__ import annotations

import traceback
from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bumblebee.inference.engine import GenerationEngine

READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__"}
WAITING = {"_local_scalar_dense", "nonzero", "unique_consecutive", "bincount", "equal", "is_nonzero"}
ON_THE_HOST = {"uniform"}  # the requests' generators are on the host
ONE_READ = {"transfers.py read_back": 1}


class Reads(TorchFunctionMode):
    """Counts what Python asks of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.by_place: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        moves = name == "to" and any(isinstance(value, torch.device) for value in (*args, *kwargs.values()))
        created = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if name in READS or created or (moves and not kwargs.get("non_blocking")):
            self.add()
        return func(*args, **kwargs)

    def add(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/bumblebee/" in frame.filename]
        if not any(frame.name in ON_THE_HOST for frame in frames):
            self.by_place[f"{frames[-1].filename.rpartition('/')[2]} {frames[-1].name}"] += 1


class Waits(TorchDispatchMode):
    """Counts operators that return values to the host, or whose output shape depends on them."""

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITING or any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks):
            self.reads.add()
        return func(*args, **(kwargs or {}))


def step_waits(engine: GenerationEngine) -> Counter[str]:
    with Reads() as reads, Waits(reads):
        engine.step()
    return reads.by_place
