"""Devices of ranks, and how a failed run on several GPUs ends. NCCL is simulated: only its name is patched."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import engine
from deepspeed.utils import groups
from helpers.training_runs import train

from bumblebee.distributed import process_group


@pytest.fixture
def ranks(monkeypatch):
    """Return a function that sets the launcher's variables."""

    def launched(world_size: int, local_rank: int) -> None:
        for name, value in (("WORLD_SIZE", world_size), ("RANK", local_rank), ("LOCAL_RANK", local_rank)):
            monkeypatch.setenv(name, str(value))

    return launched


def test_each_rank_takes_the_gpu_of_its_local_rank(two_gpus, ranks):
    ranks(2, 1)
    assert process_group.pick_device("cuda") == process_group.pick_device("auto") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device 'cuda:1' is one GPU, and each of 2 ranks needs its own: write cuda$"):
        process_group.pick_device("cuda:1")


def test_deepspeed_takes_the_gpu_that_the_trainer_names(two_gpus, monkeypatch):
    """It takes the GPU whose number is LOCAL_RANK, at stage 3 also in later steps."""
    taken: list[str] = []
    accelerator = SimpleNamespace(
        set_device=lambda index: taken.append(f"cuda:{index}"), device_name=lambda index: f"cuda:{index}"
    )
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(engine, "dist", SimpleNamespace(get_world_size=lambda: 1, get_rank=lambda: 0))

    process_group.start(process_group.pick_device("cuda:1"))
    deepspeed = SimpleNamespace()
    engine.DeepSpeedEngine._configure_with_arguments(deepspeed, None, None)
    engine.DeepSpeedEngine._set_distributed_vars(deepspeed, None)
    assert deepspeed.device == torch.device("cuda", 1) and taken == ["cuda:1", "cuda:1"]
    assert os.environ["LOCAL_RANK"] == "1" and process_group.local_rank() == 0  # the only rank, which reports errors
    assert process_group.pick_device("cuda") == torch.device("cuda", 0)
    process_group.stop(orderly=True)
    assert os.environ["LOCAL_RANK"] == "0"


class Exited(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def nccl(monkeypatch):
    """A group of one gloo rank that passes for one of several NCCL ranks; returns the calls that end it."""
    calls: list[object] = []

    def exit(code: int) -> None:
        calls.append(code)
        raise Exited

    destroy = dist.destroy_process_group
    monkeypatch.setattr(process_group, "is_distributed", dist.is_initialized)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (calls.append("destroy"), destroy()))
    monkeypatch.setattr("os._exit", exit)
    yield calls
    groups._release_process_group_references()  # of engines that were not closed
    if dist.is_initialized():
        destroy()
    process_group._restore_environment()  # an ended process would not need it


FAILING = {"callbacks": {"fail": ["Fail", {"step": 1}]}, "max_steps": 2}


def test_failed_run_on_several_gpus_exits_with_its_error(nccl, tmp_path, capsys):
    with pytest.raises(Exited):
        train(tmp_path / "run", **FAILING)
    assert nccl == [1]  # destroying the group would wait for the other ranks
    assert "RuntimeError: on fire" in capsys.readouterr().err


def test_finished_run_on_several_gpus_destroys_the_group(nccl, tmp_path):
    try:
        raise ValueError("an earlier error, which the caller handles")
    except ValueError:
        train(tmp_path / "run", max_steps=1)
    assert nccl == ["destroy"]


@pytest.mark.parametrize(("error", "code"), [(SystemExit(2), 2), (KeyboardInterrupt(), 130), (OSError("full"), 1)])
def test_exit_code_of_a_failed_run_is_that_of_its_error(nccl, error, code, capsys):
    process_group.start(torch.device("cpu"))
    with pytest.raises(Exited):
        process_group.exit_after_failure(error)
    assert nccl == [code]
    assert ("OSError: full" in capsys.readouterr().err) == (code == 1)


def test_reported_failures_do_not_exit(nccl):
    """``bumblebee verify`` reports them to the other ranks and ends hanging ranks itself."""
    process_group.start(torch.device("cpu"))
    reported: list[BaseException] = []
    with process_group.failures_reported_to(reported.append), pytest.raises(ValueError):
        try:
            raise ValueError("of a check")
        finally:
            process_group.stop(orderly=False)
    assert [str(error) for error in reported] == ["of a check"] and nccl == ["destroy"]


def test_numbers_of_the_host_are_summed_without_nccl(nccl):
    process_group.start(torch.device("cpu"))
    assert process_group.host_sum([1.5, True, 2**53]) == [1.5, 1.0, 2.0**53]
    assert process_group.any_rank(True) and not process_group.any_rank(False)
    group = process_group._host_group
    assert group is not None and group.name() == "gloo" and process_group._group_of_hosts() is group
    process_group.stop(orderly=True)
    assert process_group._host_group is None


ENDS = """
import multiprocessing, sys, threading, time, torch, torch.distributed as dist
from bumblebee.distributed import process_group

process_group.start(torch.device("cpu"))
process_group.is_distributed = lambda: True
dist.get_backend = lambda: "nccl"
dist.destroy_process_group = lambda: time.sleep(60)
threading.Thread(target=time.sleep, args=[60]).start()  # the interpreter would wait for it
multiprocessing.get_context("fork").Process(target=time.sleep, args=[60], daemon=True).start()
try:
    print("not flushed yet", end="")
    raise RuntimeError("on this rank only")
finally:
    process_group.stop(orderly=False)
"""


@pytest.mark.slow
def test_process_that_cannot_unwind_prints_its_error_and_ends():
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (1, "not flushed yet")
    assert done.stderr.rstrip().endswith("RuntimeError: on this rank only")
