"""How responses write tokens and log-probabilities.

Choices made:
- A special token has an empty text. In logprobs, where it needs a name, it is written as in the vocabulary, with null bytes.
- A token that is not a complete UTF-8 sequence is named as by OpenAI: "bytes:\\xf0\\x9f".
- The log probability of an impossible token is -9999.0, as in OpenAI's API: JSON has no infinity.
"""

from __future__ import annotations

from bumblebee.tokenizer.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0


class TokenNames:
    """Names of tokens in logprobs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes_of(self, index: int) -> bytes | None:
        """The bytes of a token; None for a special token and for an id without a token."""
        table = self._tokenizer.token_bytes
        return None if index in self._tokenizer.special_ids or index >= len(table) else table[index]

    def name(self, index: int) -> str:
        """The text of a token, or its entry in the vocabulary."""
        text = self.bytes_of(index)
        if text is None:
            return self._tokenizer.backend.id_to_token(index) or f"token_id:{index}"
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def finite(logprob: float | None) -> float:
    """A log probability that JSON can represent."""
    assert logprob is not None  # the request asks for logprobs
    return max(logprob, MIN_LOGPROB)
