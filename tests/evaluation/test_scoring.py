"""score: log-probabilities against whole forward passes in fp64, shared contexts computed once, limits."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from bumblebee import Bumblebee, Generator, Tokenizer
from bumblebee.evaluation.scoring import Continuation, Score, Scorer, score

TEXT = "The bees fly from flower to flower in the garden, and the beekeeper counts them every morning before breakfast."


@pytest.fixture(scope="module")
def generator(tiny, tokenizer_folder) -> Generator:
    """A large init std separates the top logits by far more than rounding."""
    torch.manual_seed(0)
    return Generator(Bumblebee(tiny(initializer_range=0.3)), Tokenizer.from_pretrained(tokenizer_folder))


@torch.no_grad()
def naive(generator: Generator, request: Continuation) -> Score:
    """One forward pass over the request, log-softmax in fp64."""
    context, continuation = request
    ids = torch.tensor([*context, *continuation])[-generator.model.config.max_position_embeddings - 1 :]
    rows = generator.model(ids[None, :-1])[0].double().log_softmax(-1)[-len(continuation) :]
    targets = torch.tensor(continuation)
    log_probs = rows.gather(1, targets[:, None])[:, 0]
    return Score(float(log_probs.sum()), bool((rows.argmax(-1) == targets).all()), log_probs.tolist())


def questions(generator: Generator) -> list[Continuation]:
    """Three questions after common examples, four choices each; one choice begins like another, one is greedy."""
    ids = generator.encode(TEXT)
    requests = []
    for number in range(3):
        context = [*ids, 50 + number, *ids[number : number + 20]]
        for length in (1, 2, 5):
            requests.append(Continuation(context, ids[3 : 3 + length]))
        next_id = int(generator.model(torch.tensor([context]))[0, -1].argmax())
        requests.append(Continuation(context, [next_id]))
    return requests


def assert_close(scores: list[Score], expected: list[Score]) -> None:
    for one, other in zip(scores, expected, strict=True):
        assert one.token_log_probs == pytest.approx(other.token_log_probs, abs=2e-5)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4) and one.is_greedy == other.is_greedy


def test_scores_equal_whole_forward_passes(generator):
    requests = questions(generator)
    requests += [requests[1], Continuation([5], [7]), Continuation([5], list(range(100))), requests[0]]
    done: list[int] = []
    scores = score(generator, requests, done.append)
    assert_close(scores, [naive(generator, request) for request in requests])
    assert sum(done) == len(requests) and [one.is_greedy for one in scores[:12]] == [False, False, False, True] * 3


def test_shared_contexts_go_through_the_model_once(generator):
    requests = questions(generator)
    scorer = Scorer(generator)
    scorer.score(requests)
    prefixes = {(*c, *t)[:end] for c, t in requests for end in range(1, len(c))}  # a token and all before it
    own = sum(len(continuation) for _, continuation in requests)
    assert scorer.stats is not None and scorer.head_rows == own
    assert scorer.stats.prompt_tokens - scorer.stats.cached_tokens == len(prefixes) + own


def test_head_computes_the_continuations_places_only(generator, monkeypatch):
    requests = [*questions(generator), Continuation(list(range(10)), list(range(200)))]
    rows: list[int] = []
    forward = generator.model.forward
    monkeypatch.setattr(generator.model, "forward", lambda *a, **k: rows.append(len(k["logits_at"])) or forward(*a, **k))
    score(generator, requests)
    assert sum(rows) == sum(len(continuation) for _, continuation in requests) and max(rows) <= 512


def test_long_contexts_are_cut_on_the_left(generator, caplog):
    ids = [id % 400 for id in range(500)]
    requests = [Continuation(ids[:253], ids[253:257]), Continuation(ids, [1, 2]), Continuation([3], ids[:256])]
    with caplog.at_level(logging.WARNING):
        assert_close(score(generator, requests), [naive(generator, request) for request in requests])
    assert "1 of 3 contexts are cut on the left" in caplog.text


def test_empty_continuations_score_zero(generator):
    done: list[int] = []
    assert score(generator, [Continuation([1], [])], done.append) == [Score(0.0, True, [])] and done == [1]
    assert score(generator, []) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Continuation([], [1]), "request 2: the context is empty"),
        (Continuation([1], [400]), "request 2: the prompt has token id 400"),
        (Continuation([1], [1] * 257), "request 2: the continuation has 257 tokens; the model has 256 positions"),
    ],
)
def test_unscorable_requests_are_refused(generator, request_, message):
    with pytest.raises(ValueError, match=message):
        score(generator, [Continuation([1], [2]), request_])


def test_sliding_windows_score_like_whole_forward_passes(tiny, generator):
    torch.manual_seed(1)
    config = tiny(initializer_range=0.3, sliding_window=8)
    windowed = Generator(Bumblebee(config), generator.tokenizer)
    requests = questions(windowed)
    assert_close(score(windowed, requests), [naive(windowed, request) for request in requests])
    assert not math.isclose(score(windowed, requests)[0].log_prob, score(generator, requests)[0].log_prob)
