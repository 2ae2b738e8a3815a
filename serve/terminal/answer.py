"""Answer: what has come of one so far, and how fast."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from serve.terminal.partner import Piece


@dataclass
class Answer:
    """Pieces, put together."""

    text: str = ""
    new_tokens: int | None = None
    finish_reason: str | None = None
    times: list[float] = field(default_factory=list)  # of pieces with text

    def add(self, piece: Piece) -> None:
        """Put a piece behind the others."""
        if piece.text:
            self.times.append(time.monotonic())
        self.text += piece.text
        self.new_tokens = self.new_tokens if piece.new_tokens is None else piece.new_tokens
        self.finish_reason = piece.finish_reason or self.finish_reason

    def speed(self) -> str:
        """Tokens, and tokens a second from the first piece to the last; as far as they are known."""
        if self.new_tokens is None:
            return ""
        seconds = self.times[-1] - self.times[0] if len(self.times) > 1 else 0.0
        rate = f", {(self.new_tokens - 1) / seconds:.1f} tokens/s" if seconds else ""
        return f"{self.new_tokens} tokens{rate}"
