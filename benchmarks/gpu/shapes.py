"""Sizes of the GPU benchmark: published ones on a GPU; on a CPU small ones that run the same lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from bumblebee import BumblebeeConfig


@dataclass(frozen=True)
class TrainingShape:
    """Rows of ``length`` tokens in ``documents`` packed documents; ``steps`` optimizer steps, ``warm_up`` of them not timed."""

    rows: int
    length: int
    documents: int
    accumulate: int
    steps: int
    warm_up: int


@dataclass(frozen=True)
class DecodeShape:
    """Prompts of ``context`` tokens, then ``warm_up`` untimed and ``steps`` timed steps of decoding."""

    context: int
    warm_up: int
    steps: int


@dataclass(frozen=True)
class OfflineShape:
    """nano-vllm's benchmark: requests whose prompts and completions have ``shortest`` to ``longest`` tokens at random."""

    requests: int
    shortest: int
    longest: int


@dataclass(frozen=True)
class ServingShape:
    """Requests of ``prompt`` and ``new`` tokens, so many at a time."""

    prompt: int
    new: int
    concurrent: tuple[int, ...]


TRAINING = {"cuda": TrainingShape(8, 2048, 4, 4, 12, 4), "cpu": TrainingShape(2, 32, 2, 1, 4, 2)}
DECODE = {"cuda": DecodeShape(1024, 16, 48), "cpu": DecodeShape(24, 2, 3)}
OFFLINE = {"cuda": OfflineShape(256, 100, 1024), "cpu": OfflineShape(6, 4, 12)}
SERVING = {"cuda": ServingShape(512, 128, (1, 16, 64)), "cpu": ServingShape(8, 4, (1, 3))}
BATCHES = (1, 8, 64)  # of decoding

# nanochat's d20: 561 M parameters with its vocabulary of 65,536.
D20 = {
    "vocab_size": 65536, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 20, "num_attention_heads": 10,
    "num_key_value_heads": 10, "qk_norm": True, "mlp_gated": False, "hidden_act": "relu2", "attention_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
# Qwen3-0.6B, from its config.json.
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "qk_norm": True, "attention_bias": False, "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip


def model_config(name: str, device: str) -> BumblebeeConfig:
    """The config of ``d20``, ``1.5b`` or ``qwen3-0.6b``; on a CPU a small one with the same options.

    Raises:
        ValueError: an unknown name.
    """
    from bumblebee import BumblebeeConfig

    if name == "1.5b":
        return BumblebeeConfig.preset("1.5b") if device == "cuda" else BumblebeeConfig.preset("1.5b", **SMALL)
    options = {"d20": D20, "qwen3-0.6b": QWEN3}.get(name)
    if options is None:
        raise ValueError(f"unknown shape {name!r}; available: d20, 1.5b, qwen3-0.6b")
    small = {**SMALL, "num_key_value_heads": 2} if name == "d20" else SMALL
    config: dict[str, object] = {**options, **({} if device == "cuda" else small)}
    config.setdefault("max_position_embeddings", TRAINING[device].length)
    return BumblebeeConfig(**config)  # type: ignore[arg-type]


def save_model_folder(name: str, device: str, folder: Path) -> BumblebeeConfig:
    """Write a model folder with random bf16 weights, and return its config. Prompts are ids: any tokenizer will do."""
    import torch

    from bumblebee import Bumblebee, Tokenizer

    config = model_config(name, device)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Bumblebee(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    Tokenizer.train(["The bees of the garden."], 300).save_pretrained(folder)
    return config
