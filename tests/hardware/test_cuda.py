"""What holds wherever a GPU is taken, with torch's answers about GPUs simulated."""

from __future__ import annotations

import pytest
import torch

from bumblebee import Bumblebee
from bumblebee.distributed.process_group import pick_device
from bumblebee.hardware import memory_stats
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.kv_cache import num_blocks
from bumblebee.inference.placement.device_map import available_devices
from bumblebee.models.loading import load_model

GB = 10**9
GPU = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def cudnn_attention():
    """Leave torch's setting as it was."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def load(folder, loader):
    with pytest.raises((RuntimeError, AssertionError)):  # this build of torch has no CUDA
        loader(folder, device="cuda")


@pytest.mark.parametrize(
    "take",
    [
        lambda folder: pick_device("cuda"),
        lambda folder: available_devices("auto", "auto"),
        lambda folder: load(folder, load_model),
        lambda folder: load(folder, Bumblebee.from_pretrained),
    ],
    ids=["pick_device", "device_map", "load_model", "from_pretrained"],
)
def test_cudnn_attention_is_off_wherever_a_gpu_is_taken(take, two_gpus, tiny, tmp_path):
    Bumblebee(tiny()).save_pretrained(tmp_path)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    take(tmp_path)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_cpu_leaves_cudnn_attention_as_it_is():
    pick_device("cpu")
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_free_gpu_memory_includes_what_torch_holds_unused(two_gpus, monkeypatch, tiny):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * GB)  # after a model was deleted
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15 * GB)
    assert memory_stats.free_gpu_memory(GPU) == 55 * GB
    assert available_devices("auto", "auto")[1] == [55 * GB] * 2
    assert memory_stats.memory_available(GPU) == 10 * GB  # to another process

    model = Bumblebee(tiny())
    monkeypatch.setattr("bumblebee.inference.kv_cache.layer_devices", lambda model: [GPU] * 2)
    tokens = 20 * GB // 256  # more than the 10 GB that are free
    assert num_blocks(model, EngineConfig(cache_tokens=tokens)) == -(-tokens // 16)
    with pytest.raises(ValueError, match=r"which has 51\.2 GiB"):
        num_blocks(model, EngineConfig(cache_tokens=10 * tokens))


def test_peak_memory_is_reset_after_cuda_is_initialized(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(f"reset {device}"))
    memory_stats.reset_peak_memory_stats(GPU)
    assert calls == ["init", "reset cuda:1"]
