"""The key-value cache: keys and values of all layers, in pages, and the attention over them.

A step is one flat row of tokens of several sequences, each sequence's next ones, one or many. What is the same in all layers
(where to write, which pages to read, what a query must not see) is worked out once a step, in a ``Layout``.

A single new token attends with the query heads that share a key-value head as if they were several queries of that head: no
mask, and keys and values are read once. All single tokens share one call, padded to the longest, since a call costs more than
its work. Where lengths differ so much that a CPU would mostly read padding, each sequence has its own.

Shapes: N tokens of the step, S positions of a sequence, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bumblebee.config import BumblebeeConfig


@dataclass
class Span:
    """The tokens of one sequence in the flat row.

    Args:
        begin: where they begin in the row.
        count: how many they are.
        length: positions of the sequence, these included: S.
        pages: (pages,) int64, which hold them.
        seen: (count, S - start) booleans, which positions each token sees; None for a single token, which sees all.
        start: the first position that is seen, counted from the first of the pages, as ``length`` is; 0 without a window.
    """

    begin: int
    count: int
    length: int
    pages: Tensor
    seen: Tensor | None
    start: int = 0

    def narrowed(self, window: int, size: int) -> Span:
        """The same tokens where each sees the last ``window`` positions only; what none sees is not read."""
        start = max(self.length - self.count - window + 1, 0)
        skipped = start // size
        length, start = self.length - skipped * size, start - skipped * size
        seen = None if self.seen is None else self.seen[:, -(length - start) :].triu(length - start - self.count - window + 1)
        return Span(self.begin, self.count, length, self.pages[skipped:], seen, start)


@dataclass
class Layout:
    """What one step's tokens are, for every layer.

    Args:
        slots: (N,) int64, where the keys and values of each token go.
        spans: one for each sequence; those of single tokens come first, in the order of the row.
        together: slots (B, S) of the B single tokens' sequences and booleans (B, S) that are false where a row is padded,
            if they are to share one call; None if each has its own.
        size: positions of a page.
    """

    slots: Tensor
    spans: list[Span]
    together: tuple[Tensor, Tensor] | None
    size: int
    _narrowed: dict[int, Layout] = field(default_factory=dict)

    @classmethod
    def of(
        cls, pages: Several[Several[int]], lengths: Several[int], counts: Several[int], size: int, device: torch.device,
        padding: float,
    ) -> Layout:  # fmt: skip
        """The layout of some sequences, single tokens first.

        Args:
            pages: of each sequence, at least those that its ``length`` positions need.
            lengths: positions of each, the new ones included.
            counts: new positions of each.
            size: positions of a page.
            device: of the cache.
            padding: several single tokens share one call if it reads at most so many times the positions that they have.
        """
        spans, slots, begin = [], [], 0
        for its_pages, length, count in zip(pages, lengths, counts, strict=True):
            held = list(its_pages[: -(-length // size)])
            slots += [held[place // size] * size + place % size for place in range(length - count, length)]
            spans.append(Span(begin, count, length, torch.tensor(held, device=device), _seen(length, count, device)))
            begin += count
        lengths = [span.length for span in spans if span.count == 1]
        together = len(lengths) > 1 and max(lengths) * len(lengths) <= padding * sum(lengths)
        return cls(torch.tensor(slots, device=device), spans, _padded(spans, size) if together else None, size)

    def to(self, device: torch.device) -> Layout:
        """The same for layers on another device."""
        if device == self.slots.device:
            return self
        spans = [replace(span, pages=span.pages.to(device), seen=_moved(span.seen, device)) for span in self.spans]
        together = None if self.together is None else (self.together[0].to(device), self.together[1].to(device))
        return Layout(self.slots.to(device), spans, together, self.size)

    def narrowed(self, window: int | None) -> Layout:
        """As ``Span.narrowed``, once for all layers with this window; None is the layout itself."""
        if window is None:
            return self
        if window not in self._narrowed:
            spans = [span.narrowed(window, self.size) for span in self.spans]
            together = None if self.together is None else _padded(spans, self.size)
            self._narrowed[window] = Layout(self.slots, spans, together, self.size)
        return self._narrowed[window]


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _seen(length: int, count: int, device: torch.device) -> Tensor | None:
    """Lower-right causal: the last of the new positions sees all."""
    if count == 1:
        return None
    return torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)


def _padded(spans: list[Span], size: int) -> tuple[Tensor, Tensor]:
    """Of the single tokens, of which there are some, slots (B, S) and which of them count.

    Padding repeats the sequence's own first slot: no row reads another's numbers.
    """
    singles = [span for span in spans if span.count == 1]
    table = torch.nn.utils.rnn.pad_sequence([span.pages for span in singles], batch_first=True)
    starts = torch.tensor([[span.start] for span in singles], device=table.device)
    lengths = torch.tensor([[span.length] for span in singles], device=table.device)
    places = starts + torch.arange(max(span.length - span.start for span in singles), device=table.device)
    valid = places < lengths
    places = torch.where(valid, places, starts)
    return table.gather(1, places // size) * size + places % size, valid


class LayerCache:
    """Keys and values of one layer, (pages, size, K, D) each."""

    layout: Layout

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        # Not filled: a place is never read before it is written, and on a CPU what is not touched takes no memory.
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Store the step's keys and values; each token attends over its sequence up to itself.

        Args:
            q: (1, N, H, D).
            k: (1, N, K, D).
            v: (1, N, K, D).
            window: how many positions a token sees, its own among them; None for all.

        Returns:
            (1, N, H, D).
        """
        self.keys.flatten(0, 1).index_copy_(0, self.layout.slots, k[0])
        self.values.flatten(0, 1).index_copy_(0, self.layout.slots, v[0])
        layout = self.layout.narrowed(window)
        spans, parts = layout.spans, []
        if layout.together is not None:
            slots, valid = layout.together
            spans = spans[len(slots) :]
            parts.append(self._together(q[0, : len(slots)], slots, valid))
        parts += [self._alone(q[0, span.begin : span.begin + span.count], span) for span in spans]
        return (torch.cat(parts) if len(parts) > 1 else parts[0])[None]

    def _alone(self, q: Tensor, span: Span) -> Tensor:
        """One sequence: ``q`` (count, H, D) -> (count, H, D)."""
        k, v = (x.index_select(0, span.pages).flatten(0, 1)[span.start : span.length] for x in (self.keys, self.values))
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if span.seen is None:
            return scaled_dot_product_attention(q.view(1, len(k), -1, q.shape[-1]), k[None], v[None]).view(q.shape)
        # A group of query heads reads the same keys: repeated as a view, not in memory.
        grouped = q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # (K, H / K, count, D)
        k, v = (x[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=span.seen)
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _together(self, q: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
        """Single tokens of B sequences: ``q`` (B, H, D) -> (B, H, D)."""
        # index_select takes a sixth of the time that indexing with a tensor takes on a CPU.
        k, v = (x.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape) for x in (self.keys, self.values))
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, D)
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, H / K, D)
        return scaled_dot_product_attention(grouped, k, v, attn_mask=valid[:, None, None]).flatten(1, 2)


class KVCache:
    """One LayerCache for each layer of a model.

    Args:
        config: the model's.
        pages: how many.
        page_size: positions of a page.
        dtype: of keys and values: the model's.
        devices: of each layer.
    """

    def __init__(
        self, config: BumblebeeConfig, pages: int, page_size: int, dtype: torch.dtype, devices: Several[torch.device]
    ) -> None:
        assert config.head_dim is not None
        shape = (pages, page_size, config.num_key_value_heads, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for device in devices]
        self.page_size, self.device = page_size, devices[0]

    def at(self, layout: Layout) -> list[LayerCache]:
        """The layer caches, ready for a forward pass over these tokens."""
        layouts = {device: layout.to(device) for device in {layer.keys.device for layer in self.layers}}
        for layer in self.layers:
            layer.layout = layouts[layer.keys.device]
        return self.layers


def bytes_per_position(config: BumblebeeConfig, dtype: torch.dtype) -> int:
    """Memory of one position's keys and values in all layers."""
    assert config.head_dim is not None
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
