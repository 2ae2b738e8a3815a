"""Text from tokens that arrive one by one, up to the first stop string.

A character is given out when its last byte is there. Text that may become a stop string is held back until it is known to be
none. The text ends where a search of the whole text, character by character, would end it: at the first moment at which some
stop string is complete, before the longest one that is complete then.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from bumblebee.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """The text of one growing sequence. Special tokens have none; bytes that are no UTF-8 become U+FFFD.

    Args:
        tokenizer: of the tokens.
        stop: texts before which the text ends; none of them is empty.
        spelled: special tokens that stand in the text as they are spelled.

    Attributes:
        stopped: whether a stop string was found: the text is complete.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), spelled: Sequence[int] = ()) -> None:
        self.stopped = False
        self._pieces = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._spelled = {index: (tokenizer.backend.id_to_token(index) or "").encode() for index in spelled}
        self._held = ""

    def add(self, token_id: int) -> str:
        """The text that is complete with this token; may be empty."""
        # A model may have more rows than the tokenizer has ids: such a token has no text.
        piece = self._pieces[token_id] if token_id < len(self._pieces) else b""
        return self._grow(self._decoder.decode(self._spelled.get(token_id, piece)))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        text = self._grow(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _grow(self, text: str) -> str:
        """Characters that have become complete -> those that can be given out."""
        if self.stopped or not text:
            return ""
        text = self._held + text
        ends = [(begin + len(stop), begin) for stop in self._stop if (begin := text.find(stop)) >= 0]
        self.stopped = bool(ends)
        certain = min(ends)[1] if ends else len(text) - self._hopes(text)
        self._held = "" if ends else text[certain:]
        return text[:certain]

    def _hopes(self, text: str) -> int:
        """How many characters at the end of a text are the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
