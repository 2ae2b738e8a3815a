"""One forward pass over a step's chunks: a flat row of tokens in, logits out, for those sequences that are to grow."""

from __future__ import annotations

import math
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from bumblebee.inference.device_map import layer_devices
from bumblebee.inference.kv_cache import KVCache, Layout
from bumblebee.inference.sequence import Chunk
from bumblebee.models.base import LanguageModel

PADDING = 2.0  # positions that a CPU may read for each that is there, so that single tokens share a call


class Runner:
    """The model with its cache.

    Args:
        model: in evaluation mode.
        pages: pages of the cache.
        page_size: positions of a page.
    """

    def __init__(self, model: LanguageModel, pages: int, page_size: int) -> None:
        self.model = model
        weight = next(model.parameters())
        self.cache = KVCache(model.config, pages, page_size, weight.dtype, layer_devices(model))
        self.padding = PADDING if weight.device.type == "cpu" else math.inf  # see Layout.of

    @torch.inference_mode()
    def run(self, chunks: Several[Chunk]) -> Tensor:
        """Compute the chunks, single tokens first; logits (n, V) of the n that are their sequence's last, in their order."""
        ids: list[int] = []
        places: list[int] = []
        last: list[int] = []
        for chunk in chunks:
            done, end = chunk.sequence.computed, chunk.sequence.computed + chunk.count
            ids += chunk.sequence.tokens[done:end]
            places += range(done, end)
            if chunk.is_last:
                last.append(len(ids) - 1)
        input_ids, position_ids, logits_at = (torch.tensor(x, device=self.cache.device) for x in (ids, places, last))
        layers = self.cache.at(self._layout(chunks))
        return self.model(input_ids[None], position_ids[None], cache=layers, logits_at=logits_at.long())

    def _layout(self, chunks: Several[Chunk]) -> Layout:
        return Layout.of(
            [chunk.sequence.pages for chunk in chunks],
            [chunk.sequence.computed + chunk.count for chunk in chunks],
            [chunk.count for chunk in chunks],
            self.cache.page_size,
            self.cache.device,
            self.padding,
        )
