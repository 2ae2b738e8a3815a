"""score: the log-probabilities of continuations, as multiple choice, perplexity and lm-evaluation-harness need them.

The requests run through the generation engine. Each distinct beginning is computed once: they are sorted by their tokens, so
the choices of a question, and questions after the same few-shot examples, follow each other, and a prefix cache of blocks of
one position shares them token by token. The language model head computes only the places of the continuations' tokens, a few
hundred rows at a time, and their log-softmax is taken in fp32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig, EngineStats
from bumblebee.inference.generator import Generator
from bumblebee.inference.kv_cache import BLOCK_SIZE, num_blocks
from bumblebee.inference.request import EngineRequest, PromptToken
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.inference.sequence import validate_prompt

logger = logging.getLogger(__name__)

GPU_STEP_TOKENS = 4096  # a CPU is busy with the default


class Continuation(NamedTuple):
    """Token ids to score, and those before them."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """What the model says of a continuation.

    Args:
        log_prob: natural logarithm of its probability, the sum of ``token_log_probs``.
        is_greedy: whether each of its tokens is (one of) the most likely in its place.
        token_log_probs: of each token, given all those before it.
    """

    log_prob: float
    is_greedy: bool
    token_log_probs: list[float]


def score(
    generator: Generator, requests: Sequence[Continuation], progress: Callable[[int], object] | None = None
) -> list[Score]:
    """Score continuations; the scores are in the order of the requests.

    A request that is longer than the model's positions loses the beginning of its context, as in lm-evaluation-harness; the
    last token of a continuation is never read by the model and takes no position.

    Args:
        generator: the model.
        requests: contexts of at least one token, such as the begin-of-text token; an empty continuation scores 0.
        progress: called with the number of requests that have just been scored, like ``tqdm.update``.

    Raises:
        ValueError: a context is empty, an id is out of the vocabulary, or a continuation is longer than the model's positions.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    return Scorer(generator).score(requests, progress)


class Scorer:
    """``score`` with a count of its work.

    Args:
        generator: the model.

    Attributes:
        stats: of the engine that served the last call: the tokens that went through the model are ``prompt_tokens -
            cached_tokens``.
        head_rows: places that the language model head computed in the last call.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.stats: EngineStats | None = None
        self.head_rows = 0

    def score(self, requests: Sequence[Continuation], progress: Callable[[int], object] | None = None) -> list[Score]:
        """See the function ``score``."""
        scores = [Score(0.0, True, [])] * len(requests)
        duplicates = self._by_tokens(requests)
        if progress is not None and (empty := len(requests) - sum(map(len, duplicates.values()))):
            progress(empty)
        inputs = sorted(duplicates)
        for index, tokens in self._run(inputs):
            places = duplicates[inputs[index]]
            for place in places:
                scores[place] = _score_of(tokens)
            if progress is not None:
                progress(len(places))
        return scores

    def _by_tokens(self, requests: Sequence[Continuation]) -> dict[tuple[tuple[int, ...], int], list[int]]:
        """The places of the requests by their tokens and the number of these that are scored, the empty ones left out."""
        places: dict[tuple[tuple[int, ...], int], list[int]] = {}
        longest = self.generator.model.config.max_position_embeddings + 1
        truncated = 0
        for place, (context, continuation) in enumerate(requests):
            self._check(place, context, continuation)
            tokens = (*context, *continuation)
            truncated += len(tokens) > longest and bool(continuation)
            if continuation:
                places.setdefault((tokens[-longest:], len(continuation)), []).append(place)
        if truncated:
            logger.warning(
                "%d of %d contexts are cut on the left: with their continuations they exceed the model's %d positions",
                truncated, len(requests), longest - 1,
            )  # fmt: skip
        return places

    def _check(self, place: int, context: list[int], continuation: list[int]) -> None:
        config = self.generator.model.config
        longest = config.max_position_embeddings
        problem = None
        if not context:
            problem = "the context is empty: begin it with a token such as the tokenizer's begin-of-text token"
        elif len(continuation) > longest:
            problem = f"the continuation has {len(continuation)} tokens; the model has {longest} positions"
        if problem is not None:
            raise ValueError(f"request {place + 1}: {problem}")
        try:
            validate_prompt([min(context + continuation), max(context + continuation)], config)
        except ValueError as error:
            raise ValueError(f"request {place + 1}: {error}") from None

    def _run(self, inputs: Sequence[tuple[tuple[int, ...], int]]) -> Iterator[tuple[int, list[PromptToken]]]:
        """The scored tokens of each input with its index, as soon as they are computed."""
        self.stats, self.head_rows = None, sum(count for _, count in inputs)
        if not inputs:
            return
        engine = self._engine(len(tokens) - 1 for tokens, _ in inputs)
        params = SamplingParams(temperature=0.0, seed=0)
        waiting = (
            EngineRequest(str(index), list(tokens[:-1]), params, prompt_only=True, targets=list(tokens[-count:]))
            for index, (tokens, count) in enumerate(inputs)
        )
        for request in islice(waiting, 2 * engine.scheduler.max_running):
            engine.submit(request)
        while engine.busy:
            for output in engine.step():
                assert output.prompt_logprobs is not None
                yield int(output.id), output.prompt_logprobs
                for request in islice(waiting, 1):
                    engine.submit(request)
        self.stats = engine.stats()

    def _engine(self, lengths: Iterable[int]) -> GenerationEngine:
        """An engine whose KV cache is no larger than its running sequences can fill."""
        model, is_gpu = self.generator.model, self.generator.device.type == "cuda"
        config = EngineConfig(step_tokens=GPU_STEP_TOKENS) if is_gpu else EngineConfig()
        longest = sorted(lengths, reverse=True)[: config.max_running]
        needed = sum(-(-length // BLOCK_SIZE) for length in longest)
        blocks = max(min(needed, num_blocks(model, config)), -(-longest[0] // BLOCK_SIZE))
        config = EngineConfig(BLOCK_SIZE * blocks, config.max_running, config.step_tokens)
        return self.generator.engine(config, BLOCK_SIZE if is_gpu else 1)


def _score_of(tokens: Sequence[PromptToken]) -> Score:
    log_probs = [token.logprob for token in tokens if token.logprob is not None]
    return Score(math.fsum(log_probs), all(token.rank == 1 for token in tokens), log_probs)
