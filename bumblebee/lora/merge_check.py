"""Comparing a merged model with its base model and unmerged adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from bumblebee.checkpoint.adapters.folder import adapter_chain
from bumblebee.checkpoint.weight_reader import read_tensors
from bumblebee.lora.attach import attach
from bumblebee.models.loading import load_model


def logit_differences(
    merged: str | Path, adapter: str | Path, base: str | Path | None = None, trust_remote_code: bool = False
) -> dict[str, tuple[float, float]]:
    """Compare the logits of a merged model with those of its base model with the adapter attached.

    Args:
        merged: the merged model's folder.
        adapter: the adapter folder that was merged.
        base: base model, instead of the one that the adapter's config names.
        trust_remote_code: run code that the folders name or contain.

    Returns:
        For float32 and for the folder's own dtype, by name: the maximum difference and the maximum logit over a few random
        tokens.
    """
    own = next(iter(read_tensors(merged)))[1].dtype
    base_folder = adapter_chain(adapter, base)[-2]
    return {
        str(dtype).removeprefix("torch."): _difference(merged, Path(adapter), base_folder, dtype, trust_remote_code)
        for dtype in dict.fromkeys([torch.float32, own])
    }


@torch.inference_mode()
def _difference(
    merged: str | Path, adapter: Path, base: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[float, float]:
    model = load_model(base, dtype, trust_remote_code=trust_remote_code)
    generator = torch.Generator().manual_seed(0)
    length = min(32, model.config.max_position_embeddings)
    input_ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    attach(model, adapter)
    expected = model.eval()(input_ids).float()
    del model  # only one model in memory at a time
    logits = load_model(merged, dtype, trust_remote_code=trust_remote_code).eval()(input_ids).float()
    return float((logits - expected).abs().max()), float(expected.abs().max())
