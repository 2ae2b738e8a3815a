"""A curve as one line of text."""

from __future__ import annotations

from collections.abc import Callable

_LEVELS = " ▁▂▃▄▅▆▇█"


def sparkline(value: Callable[[int], float], count: int, width: int = 60) -> str:
    """The values at 0 to count - 1, from 0 (blank) to their largest (a whole block), each column the largest of its share."""
    width = min(width, count)
    edges = [column * count // width for column in range(width + 1)]
    columns = [
        max(value(place) for place in {begin, (begin + end) // 2, end - 1})
        for begin, end in zip(edges, edges[1:], strict=False)
    ]
    top = max(columns)
    return "".join(_LEVELS[round(height / top * (len(_LEVELS) - 1)) if top > 0 else 0] for height in columns)
