"""The engine generates the same tokens as a loop without a cache, whatever else runs, and leaks no block."""

from __future__ import annotations

import math
import time
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Bumblebee, SamplingParams, Tokenizer
from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.request import EngineRequest, PromptToken, RequestOutput

V, MAX_POSITIONS = 64, 96
PADDINGS = [0.0, 1.3, math.inf]  # one attention call per decode token; similar lengths share a call; all share one
COMMON = [(7 * n) % V for n in range(40)]  # a prefix of two and a bf16_model blocks


def greedy(new: int = 12, **params) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, temperature=0.0, **params)


def make_model(tiny) -> Bumblebee:
    """A large init std separates the top logits by far more than rounding."""
    torch.manual_seed(0)
    return Bumblebee(tiny(vocab_size=V, initializer_range=0.3, max_position_embeddings=MAX_POSITIONS)).eval()


@pytest.fixture(scope="module")
def model(tiny) -> Bumblebee:
    return make_model(tiny)


@pytest.fixture(scope="module")
def naive(model):
    """Greedy decoding with full forward passes: (prompt, number) -> new tokens."""

    @cache
    @torch.no_grad()
    def continued(prompt: tuple[int, ...], number: int) -> list[int]:
        if number == 0:
            return []
        before = continued(prompt, number - 1)
        return [*before, int(model(torch.tensor([[*prompt, *before]]))[0, -1].argmax())]

    return lambda prompt, number: continued(tuple(prompt), number)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def engine_of(model, tokenizer):
    """Make engines; at the end of the test none of them may have leaked a block or kept a request."""
    engines: list[GenerationEngine] = []

    def make(stop_ids=(), **options) -> GenerationEngine:
        engines.append(GenerationEngine(model, tokenizer, stop_ids, EngineConfig(**options)))
        return engines[-1]

    yield make
    for engine in engines:
        finish(engine)
        check_blocks(engine)
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0) and stats.blocks_free + stats.blocks_cached == stats.blocks_total


def check_blocks(engine: GenerationEngine) -> None:
    pool = engine.block_pool
    assert pool.num_free + pool.num_cached + pool.num_used == pool.num_blocks
    used = {block for sequence in engine.scheduler.running for block in sequence.block_table}
    assert pool.num_used == len(used)


def finish(engine: GenerationEngine, steps: int = 2000) -> dict[str, list[RequestOutput]]:
    """Step until the engine is idle; returns the outputs of each request."""
    results: dict[str, list[RequestOutput]] = {}
    for _ in range(steps):
        if not engine.busy:
            return results
        for output in engine.step():
            results.setdefault(output.id, []).append(output)
        check_blocks(engine)
    raise AssertionError("the engine does not become idle")


def ids(outputs: list[RequestOutput]) -> list[int]:
    return [token.id for output in outputs for token in output.tokens]


def run(engine: GenerationEngine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        engine.submit(EngineRequest(str(number), prompt, params))
    results = finish(engine)
    return [ids(results[str(number)]) for number in range(len(prompts))]


PROMPTS = [[5], [1, 2, 3], COMMON, COMMON[:16], COMMON[:17], [*COMMON, 9], [60, 3] * 20]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_single_prompt_matches_loop_without_cache(engine_of, naive, prompt):
    (results,) = run(engine_of(), [prompt], greedy())
    assert results == naive(prompt, 12)
    assert len(set(results)) > 3, "a repeated token would prove little"


@pytest.mark.parametrize("step_tokens", [1, 2, 7, 16, 17, 512])
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_chunked_prefill_of_any_size_matches(engine_of, naive, step_tokens, prefix_reuse):
    engine = engine_of(step_tokens=step_tokens, prefix_reuse=prefix_reuse)
    assert run(engine, PROMPTS, greedy()) == [naive(prompt, 12) for prompt in PROMPTS]
    assert (engine.stats().cached_tokens > 0) == prefix_reuse


@pytest.mark.parametrize("padding", PADDINGS)
def test_decode_in_one_attention_call_or_several(engine_of, naive, padding):
    engine = engine_of(step_tokens=20)
    engine.model_runner.max_padding = padding
    assert run(engine, PROMPTS, greedy()) == [naive(prompt, 12) for prompt in PROMPTS]


def test_requests_join_and_leave_midway(engine_of, naive):
    engine, results = engine_of(), {}
    for number, prompt in enumerate(PROMPTS):
        engine.submit(EngineRequest(str(number), prompt, greedy(3 + 2 * number)))
        for _ in range(3):
            for output in engine.step():
                results.setdefault(output.id, []).append(output)
    for name, outputs in finish(engine).items():
        results.setdefault(name, []).extend(outputs)
    for number, prompt in enumerate(PROMPTS):
        assert ids(results[str(number)]) == naive(prompt, 3 + 2 * number)


def test_cached_prefix_is_not_recomputed(engine_of, naive):
    engine = engine_of()
    engine.submit(EngineRequest("first", COMMON, greedy()))
    finish(engine)
    before = engine.stats().steps
    engine.submit(EngineRequest("second", [*COMMON, 1, 2], greedy()))
    outputs = finish(engine)["second"]
    assert outputs[-1].cached_tokens == 32 and outputs[-1].prompt_tokens == 42
    assert ids(outputs) == naive([*COMMON, 1, 2], 12)
    assert engine.stats().steps - before == 12


def test_next_chat_turn_reuses_the_previous_answer(engine_of, naive):
    engine = engine_of()
    (answer,) = run(engine, [COMMON], greedy(30))
    engine.submit(EngineRequest("next", [*COMMON, *answer, 8, 9], greedy()))
    outputs = finish(engine)["next"]
    assert outputs[0].cached_tokens == 64, "four full blocks of 40 + 30 tokens"
    assert ids(outputs) == naive([*COMMON, *answer, 8, 9], 12)


def test_cancelled_request_frees_its_blocks_at_the_next_step(engine_of, naive):
    engine = engine_of(prefix_reuse=False)
    for name, prompt in (("a", COMMON), ("b", [*COMMON, 1]), ("c", [9, 8, 7])):
        engine.submit(EngineRequest(name, prompt, greedy()))
    seen = [output for _ in range(3) for output in engine.step()]
    engine.cancel("a")
    engine.cancel("unknown")
    used = engine.block_pool.num_used
    after = engine.step()
    (last,) = [output for output in after if output.id == "a"]
    assert last.finish_reason == "cancelled" and last.tokens == [] and engine.block_pool.num_used == used - 4
    seen += after
    engine.cancel("a")  # already finished: ignored
    seen += [output for outputs in finish(engine).values() for output in outputs]
    for name, prompt in (("b", [*COMMON, 1]), ("c", [9, 8, 7])):
        assert ids([output for output in seen if output.id == name]) == naive(prompt, 12)
    assert sum(output.finish_reason is not None for output in seen) == 3


def test_cancel_while_another_waits_for_the_prefix(engine_of, naive):
    engine = engine_of(step_tokens=5)
    engine.submit(EngineRequest("first", COMMON, greedy()))
    engine.submit(EngineRequest("second", [*COMMON, 1], greedy()))
    for _ in range(5):
        assert engine.step() == []
    engine.cancel("first")
    assert ids(finish(engine)["second"]) == naive([*COMMON, 1], 12)


def test_waiting_request_can_be_cancelled(engine_of):
    engine = engine_of(max_running=1)
    engine.submit(EngineRequest("first", [1], greedy()))
    engine.submit(EngineRequest("second", [2], greedy()))
    engine.step()
    engine.cancel("second")
    results = finish(engine)
    assert [output.finish_reason for output in results["second"]] == ["cancelled"] and len(ids(results["first"])) == 11


def test_results_after_evicting_other_blocks(engine_of, naive):
    """In a cache of five blocks each prompt evicts those of earlier ones."""
    engine = engine_of(cache_tokens=80)
    for round_ in range(3):
        for number, prompt in enumerate([COMMON, [1] * 40, [*COMMON, 5], [2, 3] * 20]):
            name = f"{round_} {number}"
            engine.submit(EngineRequest(name, prompt, greedy()))
            assert ids(finish(engine)[name]) == naive(prompt, 12)
    assert engine.stats().cached_tokens > 0


# -- log-probabilities of prompts ------------------------------------------------------------------------------------------


def scoring(name: str, prompt: list[int], count: int = 3, new: int = 4, **fields) -> EngineRequest:
    return EngineRequest(name, prompt, greedy(new), prompt_logprobs=count, **fields)


def scored(outputs: list[RequestOutput]) -> list[PromptToken]:
    """The prompt's tokens, which the first output has."""
    assert [output.prompt_logprobs is not None for output in outputs] == [True] + [False] * (len(outputs) - 1)
    return outputs[0].prompt_logprobs


@torch.no_grad()
def check_scored(model: Bumblebee, prompt: list[int], tokens: list[PromptToken], count: int = 3) -> None:
    """Compare with a plain forward pass."""
    assert [token.id for token in tokens] == prompt
    assert tokens[0] == PromptToken(prompt[0])
    expected = model(torch.tensor([prompt]))[0].log_softmax(dim=-1)
    for row, token in zip(expected, tokens[1:], strict=False):
        ordered = row.argsort(descending=True).tolist()
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert token.rank == ordered.index(token.id) + 1
        assert [id for id, _ in token.top] == ordered[:count]
        assert [value for _, value in token.top] == pytest.approx(row[ordered[:count]].tolist(), abs=1e-4)


@pytest.mark.parametrize("step_tokens", [1, 7, 16, 512])
def test_scored_prompts_match_a_plain_forward_pass(engine_of, model, naive, step_tokens):
    engine = engine_of(step_tokens=step_tokens)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(scoring(f"scored {number}", prompt))
        engine.submit(EngineRequest(f"plain {number}", prompt, greedy(4)))
    results = finish(engine)
    for number, prompt in enumerate(PROMPTS):
        check_scored(model, prompt, scored(results[f"scored {number}"]))
        assert ids(results[f"scored {number}"]) == ids(results[f"plain {number}"]) == naive(prompt, 4)
        assert all(output.prompt_logprobs is None for output in results[f"plain {number}"])


def test_cached_prompts_are_scored_and_reused(engine_of, model):
    engine = engine_of()
    for name in ("first", "second"):
        run(engine, [COMMON], greedy(1))
        engine.submit(scoring(name, COMMON))
        outputs = finish(engine)[name]
        check_scored(model, COMMON, scored(outputs))
        assert outputs[0].cached_tokens == 0
    engine.block_pool.reset()
    engine.submit(scoring("third", COMMON))
    finish(engine)
    engine.submit(EngineRequest("plain", COMMON, greedy(1)))
    assert finish(engine)["plain"][0].cached_tokens == 32, "others reuse the blocks of a scored prompt"


def test_prompt_only_ends_without_a_new_token(engine_of, model):
    engine = engine_of(cache_tokens=MAX_POSITIONS, step_tokens=20)
    whole = [(5 * n) % V for n in range(MAX_POSITIONS)]
    for name, prompt in (("whole", whole), ("one", [5])):
        engine.submit(scoring(name, prompt, prompt_only=True))
    results = finish(engine)
    for name, prompt in (("whole", whole), ("one", [5])):
        [output] = results[name]
        assert (output.tokens, output.text, output.finish_reason) == ([], "", "length")
        check_scored(model, prompt, scored([output]))
    assert engine.stats().prompt_tokens == MAX_POSITIONS + 1 and engine.stats().new_tokens == 0
    with pytest.raises(ValueError, match="the prompt has 97 tokens"):
        engine.submit(scoring("longer", [*whole, 1], prompt_only=True))


def test_only_requested_logits_are_computed(engine_of, model, monkeypatch):
    engine, rows = engine_of(step_tokens=16), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **options: (rows.append(len(options["logits_at"])), forward(*args, **options))[1]
    )
    engine.submit(EngineRequest("plain", COMMON, greedy(2)))
    finish(engine)
    assert rows == [0, 0, 1, 1]
    rows.clear()
    engine.submit(scoring("scored", COMMON, new=2))
    finish(engine)
    assert rows == [16, 16, 8, 1], "39 scored tokens and two sampled ones"


def test_cancelled_prompt_has_no_logprobs(engine_of):
    engine = engine_of(step_tokens=16)
    engine.submit(scoring("a", COMMON))
    engine.step()
    engine.cancel("a")
    assert finish(engine)["a"][0].prompt_logprobs is None


@pytest.fixture(scope="module")
def bf16_model(tiny) -> Bumblebee:
    return make_model(tiny).to(torch.bfloat16)


@pytest.mark.parametrize("padding", PADDINGS)
def test_bf16_logits_match_one_pass_within_rounding(bf16_model, tokenizer, padding, monkeypatch):
    """bf16 is up to 0.5 away from fp32 here; two orders of summation in bf16 may differ by nearly as much."""
    engine = GenerationEngine(bf16_model, tokenizer, (), EngineConfig(step_tokens=11))
    engine.model_runner.max_padding = padding
    logits, run_ = {}, engine.model_runner.run

    def recorded(chunks):
        out = run_(chunks)
        rows = [chunk.sequence for chunk in chunks if chunk.is_last]
        logits.update({(each.request.id, len(each.token_ids)): row for each, row in zip(rows, out[0], strict=True)})
        return out

    monkeypatch.setattr(engine.model_runner, "run", recorded)
    results = run(engine, PROMPTS, greedy())
    assert len(logits) == 12 * len(PROMPTS)
    for (name, length), row in logits.items():
        text = torch.tensor([[*PROMPTS[int(name)], *results[int(name)]][:length]])
        torch.testing.assert_close(row, bf16_model(text)[0, -1], rtol=0, atol=0.3)


@settings(max_examples=30)
@given(data=st.data())
def test_any_schedule(data, model, tokenizer, naive):
    """Random prompts over a few tokens, options, arrival times and cancellations."""
    options = EngineConfig(
        cache_tokens=data.draw(st.sampled_from([96, 160, 400])),
        max_running=data.draw(st.integers(1, 5)),
        step_tokens=data.draw(st.sampled_from([1, 3, 8, 20, 64])),
        prefix_reuse=data.draw(st.booleans()),
    )
    engine = GenerationEngine(model, tokenizer, (), options)
    prompt = st.builds(
        lambda cut, rest: COMMON[:cut] + rest, st.sampled_from([0, 16, 33]), st.lists(st.integers(0, 2), max_size=6)
    )
    prompts = data.draw(st.lists(prompt.filter(bool), min_size=1, max_size=6))
    lengths = [data.draw(st.integers(1, 12)) for _ in prompts]
    engine.model_runner.max_padding = data.draw(st.sampled_from(PADDINGS))
    results: dict[str, list[RequestOutput]] = {str(number): [] for number in range(len(prompts))}
    cancelled = set()
    for number, prompt in enumerate(prompts):
        engine.submit(EngineRequest(str(number), prompt, greedy(lengths[number])))
        for _ in range(data.draw(st.integers(0, 4))):
            for output in engine.step():
                results[output.id].append(output)
            check_blocks(engine)
        if data.draw(st.integers(0, 4)) == 0:
            cancelled.add(str(name := data.draw(st.integers(0, number))))
            engine.cancel(str(name))
    for name, outputs in finish(engine).items():
        results[name] += outputs
    for number, prompt in enumerate(prompts):
        expected, outputs = naive(prompt, lengths[number]), results[str(number)]
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert ids(outputs) == expected[: len(ids(outputs))]
        assert outputs[-1].finish_reason == "length" and ids(outputs) == expected or str(number) in cancelled
    assert engine.block_pool.num_free + engine.block_pool.num_cached == engine.block_pool.num_blocks


def test_seeded_tokens_do_not_depend_on_the_batch(engine_of):
    params = SamplingParams(max_new_tokens=20, seed=7, temperature=1.5)
    alone = [run(engine_of(), [prompt], params)[0] for prompt in PROMPTS]
    assert run(engine_of(), PROMPTS, params) == alone
    assert run(engine_of(step_tokens=9, max_running=3), PROMPTS, params) == alone
    assert run(engine_of(), [COMMON] * 3, params) == [alone[PROMPTS.index(COMMON)]] * 3
    assert len({tuple(tokens) for tokens in run(engine_of(), [COMMON] * 3, SamplingParams(max_new_tokens=20))}) == 3


def test_text_ends_before_stop_ids_and_stop_strings(engine_of, naive, tokenizer):
    tokens = naive(COMMON, 12)
    position = next(position for position in range(3, 12) if tokens[position] not in tokens[:position])
    before = b"".join(tokenizer.token_bytes[token] for token in tokens[:position]).decode(errors="replace")
    for engine, params in (
        (engine_of(), greedy(stop_ids=[tokens[position]])),
        (engine_of(), greedy(stop_ids=[tokens[position]], ignore_eos=True)),
        (engine_of(stop_ids=[tokens[position]]), greedy()),
    ):
        engine.submit(EngineRequest("a", COMMON, params))
        outputs = finish(engine)["a"]
        assert ids(outputs) == tokens[: position + 1] and outputs[-1].finish_reason == "stop"
        assert "".join(output.text for output in outputs) == before
    engine = engine_of(stop_ids=[tokens[position]])
    engine.submit(EngineRequest("a", COMMON, greedy(ignore_eos=True)))
    assert ids(finish(engine)["a"]) == tokens
    letter = next(character for character in before if character.isascii())
    engine.submit(EngineRequest("a", COMMON, greedy(stop=[letter])))
    outputs = finish(engine)["a"]
    assert outputs[-1].finish_reason == "stop"
    assert "".join(output.text for output in outputs) == before[: before.index(letter)]


def test_min_new_tokens_delays_every_kind_of_stop(engine_of, naive, tokenizer):
    tokens = naive(COMMON, 12)
    texts = [tokenizer.token_bytes[token].decode(errors="replace") for token in tokens]
    stops = [text for text in texts[:4] if text]
    engine = engine_of(stop_ids=[tokens[0]])
    engine.submit(EngineRequest("a", COMMON, greedy(stop_ids=tokens[1:3], stop=stops, min_new_tokens=8)))
    outputs = finish(engine)["a"]
    assert len(ids(outputs)) > 8 and not {*tokens[:3]} & {*ids(outputs)[:8]}
    engine.submit(EngineRequest("a", COMMON, greedy(min_new_tokens=20)))
    assert [finish(engine)["a"][-1].finish_reason] == ["length"], "max_new_tokens comes first"


def test_stop_is_included_in_the_text_on_request(engine_of, naive, tokenizer):
    tokens = naive(COMMON, 12)
    texts = [tokenizer.token_bytes[token].decode(errors="replace") for token in tokens]
    position = next(position for position in range(3, 12) if tokens[position] not in tokens[:position] and texts[position])
    engine = engine_of()
    engine.submit(EngineRequest("id", COMMON, greedy(stop_ids=[tokens[position]], include_stop_str_in_output=True)))
    letter = next(character for character in "".join(texts) if character.isascii())
    engine.submit(EngineRequest("text", COMMON, greedy(stop=[letter], include_stop_str_in_output=True)))
    outputs = finish(engine)
    id_text, text = ("".join(output.text for output in outputs[name]) for name in ("id", "text"))
    before = b"".join(tokenizer.token_bytes[token] for token in tokens[: position + 1]).decode(errors="replace")
    assert id_text == before
    assert text.endswith(letter) and text.count(letter) == 1


def test_deadline_ends_running_and_waiting_requests(engine_of, monkeypatch):
    now = time.monotonic()
    engine = engine_of(max_running=1)
    for name, deadline in (("running", now + 50), ("waiting", now + 50), ("free", None), ("later", now + 500)):
        engine.submit(EngineRequest(name, [1, 2], greedy(), deadline))
    assert [output.id for output in engine.step()] == ["running"]
    monkeypatch.setattr(time, "monotonic", lambda: now + 100)
    results = finish(engine)
    assert [output.finish_reason for output in results["running"]] == ["timeout"]
    assert [output.finish_reason for output in results["waiting"]] == ["timeout"]
    assert len(ids(results["free"])) == len(ids(results["later"])) == 12


def test_first_tokens_come_in_order_of_submission(engine_of):
    engine = engine_of(max_running=2, cache_tokens=96, step_tokens=8)
    for number in range(8):
        engine.submit(EngineRequest(str(number), [number] * (30 if number % 3 == 0 else 4), greedy(3)))
    first: list[str] = []
    while engine.busy:
        first += [output.id for output in engine.step() if output.id not in first]
    assert set(first) == set(map(str, range(8)))
    assert all(abs(position - int(name)) <= 1 for position, name in enumerate(first)), "two run at the same time"


def test_logprobs_are_the_models(engine_of, model):
    engine = engine_of()
    engine.submit(EngineRequest("a", COMMON, greedy(4, logprobs=3)))
    tokens = [token for output in finish(engine)["a"] for token in output.tokens]
    text = [*COMMON, *(token.id for token in tokens)]
    with torch.no_grad():
        expected = model(torch.tensor([text]))[0].log_softmax(-1)
    for position, token in enumerate(tokens, start=len(COMMON) - 1):
        assert token.logprob == pytest.approx(float(expected[position, token.id]), abs=1e-4)
        values, indices = expected[position].topk(3)
        assert [index for index, _ in token.top] == indices.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(), "the prompt is empty: there is nothing to continue"),
        ([1] * 96, greedy(), "the prompt has 96 tokens; the model takes 96, including new ones"),
        ([1, 64], greedy(), "the prompt has token id 64; the model's ids are 0 to 63"),
        ([1, -1], greedy(), "the prompt has token id -1; the model's ids are 0 to 63"),
        ([1], greedy(stop_ids=[64]), "stop_ids: token id 64 is out of the vocabulary; the model's ids are 0 to 63"),
        (
            [1] * 40, greedy(50),
            "the prompt's 40 tokens and 50 new ones need 96 positions of the KV cache, which has 64:"
            " set a smaller max_new_tokens or a larger cache_tokens",
        ),
    ],
)  # fmt: skip
def test_requests_that_can_never_run_raise(engine_of, prompt, params, message):
    engine = engine_of(cache_tokens=60)
    with pytest.raises(ValueError) as caught:
        engine.submit(EngineRequest("a", prompt, params))
    assert str(caught.value) == message
    assert not engine.busy and engine.step() == []


def test_duplicate_id_raises(engine_of):
    engine = engine_of()
    engine.submit(EngineRequest("a", [1], greedy(1)))
    with pytest.raises(ValueError, match="duplicate request id 'a'"):
        engine.submit(EngineRequest("a", [2], greedy(1)))
    finish(engine)
    engine.submit(EngineRequest("a", [2], greedy(1)))


def test_failed_step_changes_nothing_and_can_be_retried(engine_of, naive, monkeypatch):
    engine = engine_of(step_tokens=20)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(EngineRequest(str(number), prompt, greedy()))
    engine.submit(EngineRequest("late", [1], greedy()))
    results: dict[str, list[RequestOutput]] = {}
    forward, failures = engine.model_runner.model.forward, 0
    while engine.busy:
        monkeypatch.setattr(engine.model_runner.model, "forward", fail_after_first_layer(engine.model_runner.model))
        engine.cancel("late")
        with pytest.raises(MemoryError):
            engine.step()
        failures += 1
        monkeypatch.setattr(engine.model_runner.model, "forward", forward)
        check_blocks(engine)
        for output in engine.step():
            results.setdefault(output.id, []).append(output)
    assert failures > 12
    assert [output.finish_reason for output in results["late"]] == ["cancelled"], "reported by the next step that succeeds"
    assert [ids(results[str(number)]) for number in range(len(PROMPTS))] == [naive(prompt, 12) for prompt in PROMPTS]


def fail_after_first_layer(model: Bumblebee):
    def forward(input_ids, position_ids, cache, logits_at):
        noise = torch.randn(1, input_ids.shape[1], 4, 8)
        cache[0].attend(noise, noise[:, :, :2], noise[:, :, :2])
        raise MemoryError("no memory left")

    return forward


def test_text_made_during_the_next_step_is_the_same(engine_of, naive):
    """As on a GPU; outputs come a step later, except those of requests with stop strings."""

    def outputs(defers_text: bool) -> dict[str, tuple[list[int], str, list[str]]]:
        engine, results = engine_of(stop_ids=(47,), step_tokens=20), {}
        engine.defers_text = defers_text
        for number, prompt in enumerate(PROMPTS):
            stop = ["M"] if number % 3 == 2 else []
            engine.submit(EngineRequest(str(number), prompt, greedy(6 + number, stop=stop, ignore_eos=number % 2 == 0)))
        engine.submit(EngineRequest("stopped", [1], greedy(40)))
        engine.submit(EngineRequest("cancelled", [1], greedy(40, ignore_eos=True)))
        steps = 0
        while engine.busy:
            if (steps := steps + 1) == 9:
                engine.cancel("cancelled")
            for output in engine.step():
                results.setdefault(output.id, []).append(output)
            check_blocks(engine)
        return {
            id: (ids(parts), "".join(part.text for part in parts), [part.finish_reason for part in parts if part.finish_reason])
            for id, parts in results.items()
        }

    at_once, deferred = outputs(False), outputs(True)
    assert deferred == at_once
    assert {reason for _, _, reasons in deferred.values() for reason in reasons} == {"stop", "length", "cancelled"}


def test_reset_drops_all_requests_and_blocks(engine_of, naive):
    engine = engine_of()
    for number, prompt in enumerate(PROMPTS):
        engine.submit(EngineRequest(str(number), prompt, greedy()))
    engine.step()
    engine.cancel("1")
    engine.reset()
    assert not engine.busy and engine.step() == []
    assert engine.block_pool.num_free == engine.block_pool.num_blocks
    assert run(engine, [COMMON], greedy()) == [naive(COMMON, 12)]


def test_stats_count_tokens_steps_and_blocks(engine_of):
    engine = engine_of(max_running=1, cache_tokens=100)
    stats = engine.stats()
    assert (stats.blocks_total, stats.blocks_free, stats.steps) == (7, 7, 0)
    engine.submit(EngineRequest("a", COMMON, greedy(5)))
    engine.submit(EngineRequest("b", COMMON, greedy(5)))
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (1, 1)
    finish(engine)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.new_tokens, stats.steps) == (80, 32, 10, 10)
    assert (stats.blocks_free, stats.blocks_cached) == (5, 2)


def test_cache_larger_than_memory_raises(engine_of):
    with pytest.raises(
        ValueError, match=r"^cache_tokens: 1,000,000,000,000,000 positions take .* GiB on cpu, which has .*: at most"
    ):
        engine_of(cache_tokens=10**15)


@pytest.mark.parametrize("name", ["cache_tokens", "max_running", "step_tokens"])
def test_limit_below_one_raises(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EngineConfig(**{name: 0})
