"""State of one request inside the engine: its tokens, how many of them are computed, and its block table."""

from __future__ import annotations

from dataclasses import dataclass

from bumblebee.config import BumblebeeConfig
from bumblebee.inference.block_pool import ROOT, BlockKey
from bumblebee.inference.request import EngineRequest


def validate_prompt(prompt: list[int], config: BumblebeeConfig, prompt_only: bool = False) -> None:
    """Check that a model can continue a prompt.

    Args:
        prompt: token ids.
        config: of the model.
        prompt_only: no new token follows, so the prompt may take all positions.

    Raises:
        ValueError: the prompt is empty, leaves no position for a new token, or has an id that is out of the vocabulary.
    """
    max_positions = config.max_position_embeddings
    if not prompt:
        raise ValueError("the prompt is empty: there is nothing to continue")
    if len(prompt) >= max_positions + prompt_only:
        raise ValueError(f"the prompt has {len(prompt)} tokens; the model takes {max_positions}, including new ones")
    for token_id in (min(prompt), max(prompt)):
        if not 0 <= token_id < config.vocab_size:
            raise ValueError(f"the prompt has token id {token_id}; the model's ids are 0 to {config.vocab_size - 1}")


def max_length(request: EngineRequest, max_positions: int) -> int:
    """Length in tokens, prompt included, at which a request ends at the latest."""
    new_tokens = 0 if request.prompt_only else request.params.max_new_tokens
    return min(max_positions, len(request.prompt) + new_tokens)


def blocks_needed(request: EngineRequest, max_positions: int, block_size: int) -> int:
    """Blocks for the longest completion of a request. The last new token's keys and values are never stored."""
    return -(-max(max_length(request, max_positions) - 1, len(request.prompt)) // block_size)


def targets_of(request: EngineRequest) -> tuple[list[int], int]:
    """The tokens that a request scores, and the index of the prompt token that the first of them follows."""
    if request.targets is not None:
        assert 0 < len(request.targets) <= len(request.prompt)
        return request.targets, len(request.prompt) - len(request.targets)
    if request.prompt_logprobs is not None:
        return request.prompt[1:], 0
    return [], len(request.prompt)


class Sequence:
    """Tokens and blocks of one request.

    Args:
        request: the request.
        max_positions: positions of the model.
        block_size: positions per block.
    """

    def __init__(self, request: EngineRequest, max_positions: int, block_size: int) -> None:
        self.request, self.block_size = request, block_size
        self.token_ids = list(request.prompt)
        self.targets, self.first_scored = targets_of(request)
        self.max_length = max_length(request, max_positions)
        self.blocks_needed = blocks_needed(request, max_positions, block_size)
        self.block_table: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Mark every token as not computed."""
        self.num_computed = 0  # tokens whose keys and values are in the blocks
        self.num_registered = 0  # of these, tokens in blocks that the pool knows; a multiple of the block size
        self.content_id = ROOT  # of the last registered block
        self.num_cached = 0  # prompt tokens taken from the prefix cache

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt)

    @property
    def num_reusable(self) -> int:
        """Tokens at the start of the prompt whose logits nobody needs, so that cached keys and values are enough."""
        return min(self.first_scored, self.num_prompt_tokens - 1)

    @property
    def num_remaining(self) -> int:
        """Tokens to compute; 1 in decode."""
        return len(self.token_ids) - self.num_computed

    def next_block_key(self) -> BlockKey | None:
        """Key of the first prompt block that is not registered, or None.

        The block that holds the last prompt token has no key: its logits are needed, so it is always computed.
        """
        end = self.num_registered + self.block_size
        return (self.content_id, tuple(self.token_ids[self.num_registered : end])) if end < self.num_prompt_tokens else None

    def may_reuse_next_block(self) -> bool:
        """Whether the next block may be taken from the cache, or waited for: the logits of none of its tokens are needed."""
        end = self.num_registered + self.block_size
        return self.num_computed == self.num_registered and end <= self.num_reusable


@dataclass
class ScheduledChunk:
    """Part of a sequence that one step computes: its next ``num_tokens`` tokens."""

    sequence: Sequence
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether no token of the sequence remains to be computed after this chunk."""
        return self.num_tokens == self.sequence.num_remaining

    @property
    def samples(self) -> bool:
        """Whether the sequence's next token is sampled after this chunk."""
        return self.is_last and not self.sequence.request.prompt_only

    @property
    def scored(self) -> list[int]:
        """The tokens whose log-probabilities the logits of this chunk give."""
        sequence = self.sequence
        begin = sequence.num_computed - sequence.first_scored
        return sequence.targets[max(begin, 0) : max(begin + self.num_tokens, 0)]

    @property
    def first_scored(self) -> int:
        """Index in the chunk of the token that the first of ``scored`` follows."""
        return max(self.sequence.first_scored - self.sequence.num_computed, 0)
