"""A request on its way through the engine: its tokens, how many of them are computed, and the pages that hold them."""

from __future__ import annotations

from dataclasses import dataclass

from bumblebee.config import BumblebeeConfig
from bumblebee.inference.block_pool import ROOT, Key
from bumblebee.inference.request import Request


def check_prompt(prompt: list[int], config: BumblebeeConfig) -> None:
    """Refuse what a model cannot continue.

    Raises:
        ValueError: an empty prompt, one that leaves no position for a new token, or ids that the model does not have.
    """
    longest = config.max_position_embeddings
    if not prompt:
        raise ValueError("the prompt is empty: there is nothing to continue")
    if len(prompt) >= longest:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model takes {longest}, new ones included")
    for index in (min(prompt), max(prompt)):
        if not 0 <= index < config.vocab_size:
            raise ValueError(f"the prompt has the id {index}; the model's ids go from 0 to {config.vocab_size - 1}")


def limit(request: Request, longest: int) -> int:
    """Tokens that it ends with at the latest, where the model has ``longest`` positions."""
    return min(longest, len(request.prompt) + request.params.max_new_tokens)


def pages_needed(request: Request, longest: int, page_size: int) -> int:
    """Pages for all it can ever hold: the last token's keys are not needed."""
    return -(-(limit(request, longest) - 1) // page_size)


class Sequence:
    """One request's tokens.

    Args:
        request: the request.
        longest: positions that the model has.
        page_size: positions of a page.
    """

    def __init__(self, request: Request, longest: int, page_size: int) -> None:
        self.request, self.page_size = request, page_size
        self.tokens = list(request.prompt)
        self.limit = limit(request, longest)
        self.pages_needed = pages_needed(request, longest, page_size)
        self.pages: list[int] = []
        self.restart()

    def restart(self) -> None:
        """Nothing is computed."""
        self.computed = 0  # tokens whose keys and values are in the pages
        self.kept = 0  # of them, those in pages whose content the pool knows; a multiple of the page size
        self.identity = ROOT  # of the last such page
        self.cached_tokens = 0  # of the prompt, taken from the pool

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens to compute; 1 while the sequence grows by a token at a time."""
        return len(self.tokens) - self.computed

    def next_page(self) -> Key | None:
        """What the first page that the pool does not know will hold, where it lies in the prompt before its last token.

        The last token is always computed, since its logits are what is wanted.
        """
        end = self.kept + self.page_size
        return (self.identity, tuple(self.tokens[self.kept : end])) if end < self.prompt_tokens else None


@dataclass
class Chunk:
    """Some tokens of a sequence that one step computes: the next ``count`` that are not computed."""

    sequence: Sequence
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token can be chosen after it."""
        return self.count == self.sequence.remaining
