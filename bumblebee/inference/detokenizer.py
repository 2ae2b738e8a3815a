"""Incremental detokenization with stop strings.

A character is emitted when its last byte has arrived. Text that may become a stop string is held back until it is certain. A
stop string matches as soon as its last character has been decoded, also in the middle of a token. Of several that end at the
same character, the longest matches. The text ends before the match, or after it with ``include_stop``.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from bumblebee.tokenizer.tokenizer import Tokenizer


class Detokenizer:
    """Text of one sequence, token by token. Special tokens have no text; invalid UTF-8 becomes U+FFFD.

    Args:
        tokenizer: of the tokens.
        stop: stop strings, none of them empty.
        spelled: ids of special tokens to emit as they are spelled.
        min_tokens: number of tokens whose text completes no stop string.
        include_stop: emit the stop string.

    Attributes:
        stopped: whether a stop string was found; the text is then complete.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        spelled: Sequence[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self.stopped = False
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop, self._include_stop = tuple(stop), include_stop
        self._spelled = {token_id: (tokenizer.backend.id_to_token(token_id) or "").encode() for token_id in spelled}
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._held_back = ""
        self._unchecked = 0  # characters at the start of the text held back that complete no stop string

    def add(self, token_id: int) -> str:
        """Return the text that this token completes; may be empty."""
        self._num_tokens += 1
        # A padded embedding has more rows than the tokenizer has ids; the extra ids have no text.
        token = self._token_bytes[token_id] if token_id < len(self._token_bytes) else b""
        return self._emit(self._decoder.decode(self._spelled.get(token_id, token)))

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        text = self._emit(self._decoder.decode(b"", final=True)) + self._held_back
        self._held_back = ""
        return text

    def _emit(self, text: str) -> str:
        """Append newly decoded text and return what can be emitted."""
        if self.stopped or not text:
            return ""
        text = self._held_back + text
        if self._num_tokens <= self._min_tokens:
            self._unchecked = len(text)
        matches = [match for stop in self._stop if (match := self._find(text, stop))]
        self.stopped = bool(matches)
        end = min(matches)[0 if self._include_stop else 1] if matches else len(text) - self._partial_stop(text)
        self._held_back = "" if matches else text[end:]
        self._unchecked = max(0, self._unchecked - end)
        return text[:end]

    def _find(self, text: str, stop: str) -> tuple[int, int] | None:
        """(end, begin) of the first occurrence of a stop string that ends after what is unchecked."""
        begin = text.find(stop, max(0, self._unchecked + 1 - len(stop)))
        return None if begin < 0 else (begin + len(stop), begin)

    def _partial_stop(self, text: str) -> int:
        """Length of the longest suffix that is the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(size < len(stop) and stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
