"""Text from tokens that arrive one by one: a character is given out when its last byte is there."""

from __future__ import annotations

import codecs

from bumblebee.tokenizer import Tokenizer


class Detokenizer:
    """The text of one growing sequence. Special tokens have none; bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The text that is complete with this token; may be empty."""
        # A model may have more rows than the tokenizer has ids: such a token has no text.
        return self._decoder.decode(self._pieces[token_id] if token_id < len(self._pieces) else b"")

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return self._decoder.decode(b"", final=True)
