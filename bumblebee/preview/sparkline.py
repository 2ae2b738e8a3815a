"""A curve as one line of text."""

from __future__ import annotations

from collections.abc import Callable

_LEVELS = " ▁▂▃▄▅▆▇█"


def sparkline(value: Callable[[int], float], count: int, width: int = 60) -> str:
    """Draw value(0) ... value(count - 1), scaled from 0 (blank) to their maximum (full block).

    Each column shows the maximum of a few values in its range.
    """
    width = min(width, count)
    edges = [column * count // width for column in range(width + 1)]
    columns = [
        max(value(index) for index in {begin, (begin + end) // 2, end - 1})
        for begin, end in zip(edges, edges[1:], strict=False)
    ]
    top = max(columns)
    return "".join(_LEVELS[round(height / top * (len(_LEVELS) - 1)) if top > 0 else 0] for height in columns)
