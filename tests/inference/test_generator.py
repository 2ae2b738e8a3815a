"""Generator: the same tokens as a loop without a cache, stop conditions, streaming, and defaults."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from bumblebee import Bumblebee, Generator, SamplingParams, Tokenizer
from bumblebee.inference import engine as module
from bumblebee.inference import generator as generators
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.kv_cache import bytes_per_position
from bumblebee.inference.request import SampledToken

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = ["The bee", "A", "In the garden there are many flowers, and the bees", "Ünïcödé 🐝", "x y"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def generator(tiny, tokenizer) -> Generator:
    """A large init std separates the top logits by far more than rounding."""
    torch.manual_seed(0)
    return Generator(Bumblebee(tiny(initializer_range=0.3)), tokenizer)


def with_stops(generator: Generator, stop_ids: list[int]) -> Generator:
    return Generator(generator.model, generator.tokenizer, stop_ids)


@torch.no_grad()
def naive(generator: Generator, prompt: str, number: int) -> list[int]:
    """Greedy decoding with full forward passes, ``number`` times."""
    ids = generator.encode(prompt)
    for _ in range(number):
        ids = [*ids, int(generator.model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-number:]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_matches_loop_without_cache(generator, prompt):
    (out,) = generator.generate([prompt], GREEDY)
    assert out.token_ids == naive(generator, prompt, 12)
    assert len(set(out.token_ids)) > 3, "a repeated token would prove little"


def test_ragged_batch_matches_loop_without_cache(generator):
    outs = generator.generate(PROMPTS, GREEDY)
    assert [out.token_ids for out in outs] == [naive(generator, prompt, 12) for prompt in PROMPTS]


def test_completions_are_in_the_order_of_the_prompts(generator, monkeypatch):
    monkeypatch.setattr(generators, "EngineConfig", lambda **limits: EngineConfig(max_running=2, **limits))
    outs = generator.generate(PROMPTS, GREEDY)
    assert [out.token_ids for out in outs] == [naive(generator, prompt, 12) for prompt in PROMPTS]


def test_no_prompts_give_no_completions(generator):
    assert generator.generate([], GREEDY) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_stream_joins_to_the_text_of_generate(generator, temperature):
    """Random tokens of a byte-level vocabulary: most non-ASCII characters are split or invalid."""
    for seed in range(8):
        params = SamplingParams(max_new_tokens=40, temperature=temperature, seed=seed)
        (out,) = generator.generate(["The bee"], params)
        assert "".join(generator.stream("The bee", params)) == out.text
        expected = b"".join(generator.tokenizer.token_bytes[token] for token in out.token_ids)
        assert out.text == expected.decode("utf-8", errors="replace")


def test_character_split_across_tokens_is_streamed_whole(generator, monkeypatch):
    """Scripted tokens: 🐝, one byte per token."""
    pieces = generator.tokenizer.token_bytes
    script = iter([pieces.index(bytes([byte])) for byte in "a🐝b".encode()])
    monkeypatch.setattr(module.Sampling, "tokens", lambda *args: [SampledToken(next(script))])
    assert list(generator.stream("x", SamplingParams(max_new_tokens=6))) == ["a", "🐝", "b"]


def test_stream_starts_before_all_is_computed(generator, monkeypatch):
    steps = []
    original = module.Sampling.tokens
    monkeypatch.setattr(module.Sampling, "tokens", lambda *args: steps.append(1) or original(*args))
    stream = generator.stream("The bee", SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True))
    next(stream)
    assert len(steps) < 30


def test_same_seed_gives_same_text_alone_and_in_a_batch(generator):
    params = SamplingParams(max_new_tokens=10, seed=7)
    first, second = generator.generate(PROMPTS, params), generator.generate(PROMPTS, params)
    assert first == second
    assert [generator.generate([prompt], params)[0] for prompt in PROMPTS] == first
    assert generator.generate(PROMPTS, SamplingParams(max_new_tokens=10, seed=8)) != first


def test_results_differ_without_a_seed(generator):
    params = SamplingParams(max_new_tokens=20)
    texts = [out.text for out in generator.generate(["The bee"] * 3, params)]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("number", [1, 5])
def test_max_new_tokens_ends_with_length(generator, number):
    outs = generator.generate(PROMPTS, SamplingParams(max_new_tokens=number, temperature=0.0, ignore_eos=True))
    assert [(len(out.token_ids), out.finish_reason) for out in outs] == [(number, "length")] * len(PROMPTS)


def test_last_position_ends_with_length(tiny, tokenizer):
    torch.manual_seed(0)
    generator = Generator(Bumblebee(tiny(initializer_range=0.3, max_position_embeddings=20)), tokenizer)
    params = SamplingParams(max_new_tokens=100, temperature=0.0, ignore_eos=True)
    for out, prompt in zip(generator.generate(["x", "x y z"], params), ["x", "x y z"], strict=True):
        assert out.finish_reason == "length"
        assert len(generator.encode(prompt)) + len(out.token_ids) == 20
        assert out.token_ids == naive(generator, prompt, len(out.token_ids))


def test_stop_ids_end_with_stop_and_have_no_text(generator):
    tokens = naive(generator, "The bee", 12)
    position = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    stopped = with_stops(generator, [399, tokens[position]])
    (out,) = stopped.generate(["The bee"], SamplingParams(max_new_tokens=12, temperature=0.0))
    assert out.token_ids == tokens[: position + 1] and out.finish_reason == "stop"
    assert "".join(stopped.stream("The bee", SamplingParams(max_new_tokens=12, temperature=0.0))) == out.text


def test_rows_of_a_batch_end_independently(generator):
    """The first row stops early; the others are unaffected."""
    alone = {prompt: naive(generator, prompt, 12) for prompt in PROMPTS}
    rest = {token for prompt in PROMPTS[1:] for token in alone[prompt]}
    stop = next(token for token in alone[PROMPTS[0]] if token not in rest)
    outs = with_stops(generator, [stop]).generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=0.0))
    assert outs[0].finish_reason == "stop" and outs[0].token_ids[-1] == stop
    assert [out.token_ids for out in outs[1:]] == [alone[prompt] for prompt in PROMPTS[1:]]
    assert [out.finish_reason for out in outs[1:]] == ["length"] * 4


def test_ignore_eos_continues(generator):
    tokens = naive(generator, "The bee", 12)
    (out,) = with_stops(generator, tokens).generate(["The bee"], GREEDY)
    assert out.token_ids == tokens and out.finish_reason == "length"


def test_stop_ids_come_from_all_configs(tiny, tokenizer, tmp_path):
    Bumblebee(tiny(eos_token_id=[5, 6])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert Generator.from_pretrained(tmp_path, device="cpu").stop_ids == {0, 5, 6}
    for stops, expected in (([7, 8], {0, 5, 6, 7, 8}), (9, {0, 5, 6, 9}), (None, {0, 5, 6})):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        assert Generator.from_pretrained(tmp_path, device="cpu").stop_ids == expected
    (tmp_path / "generation_config.json").unlink()
    assert Generator.from_pretrained(tmp_path, device="cpu").stop_ids == {0, 5, 6}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json"):
        Generator.from_pretrained(tmp_path, device="cpu")


def test_saved_folder_generates_the_same_text(generator, tmp_path):
    generator.model.save_pretrained(tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    assert Generator.from_pretrained(tmp_path, device="cpu").generate(PROMPTS, GREEDY) == generator.generate(PROMPTS, GREEDY)


def test_dtype_option(generator, tmp_path):
    generator.model.save_pretrained(tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    half = Generator.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert len(half.generate(["x"], GREEDY)[0].token_ids) == 12
    with pytest.raises(ValueError, match="unknown dtype 'float8'; write auto, float32, bfloat16 or float16"):
        Generator.from_pretrained(tmp_path, dtype="float8")


@pytest.mark.parametrize("run", [lambda g, p: g.generate(["x", p]), lambda g, p: next(g.stream(p))], ids=["generate", "stream"])
def test_empty_and_too_long_prompts_raise(generator, run):
    with pytest.raises(ValueError, match="the prompt is empty"):
        run(generator, "")
    long = "q" * 256
    assert len(generator.encode(long)) == 256
    with pytest.raises(ValueError, match="the prompt has 256 tokens; the model takes 256, including new ones"):
        run(generator, long)


def test_prompt_leaving_one_position_gets_one_token(generator):
    (out,) = generator.generate(["q" * 255], GREEDY)
    assert len(out.token_ids) == 1 and out.finish_reason == "length"


def test_spelled_special_token_in_a_prompt_is_text(generator):
    assert not generator.tokenizer.special_ids.intersection(generator.prepare("<|im_end|>", GREEDY))


def test_token_ids_as_prompt_equal_the_text(generator):
    for prompt in PROMPTS:
        (text,), (ids,) = (generator.generate([each], GREEDY) for each in (prompt, generator.encode(prompt)))
        assert text == ids


def test_encode_chat_applies_the_chat_template(generator, tokenizer):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": "Who lays <|im_end|> eggs?"}]
    assert generator.encode_chat("Who lays <|im_end|> eggs?", system="Be brief.") == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True
    )
    assert generator.encode_chat("Who?") == tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], None, True)


def test_params_per_prompt(generator):
    numbers = dict(zip(PROMPTS[:3], (3, 1, 5), strict=True))
    params = [SamplingParams(max_new_tokens=number, temperature=0.0, ignore_eos=True) for number in numbers.values()]
    outs = generator.generate(list(numbers), params)
    assert [out.token_ids for out in outs] == [naive(generator, *each) for each in numbers.items()]
    with pytest.raises(ValueError, match="params has 3 entries for 2 prompts: give one for each, or one for all"):
        generator.generate(PROMPTS[:2], params)


def test_error_names_the_invalid_prompt(generator):
    with pytest.raises(ValueError, match="^prompt 2 of 3: the prompt is empty"):
        generator.generate(["a", "", "b"], GREEDY)
    with pytest.raises(ValueError, match="^prompt 3 of 3: the prompt has token id 400; the model's ids are 0 to 399"):
        generator.generate(["a", "b", [400]], GREEDY)


def test_tokens_have_logprobs(generator):
    (out,) = generator.generate(["The bee"], SamplingParams(max_new_tokens=3, temperature=0.0, logprobs=2))
    for token in out.tokens:
        assert token.top[0] == (token.id, token.logprob) and len(token.top) == 2 and token.logprob < 0


def test_cache_is_sized_for_the_batch(generator, monkeypatch):
    """A few blocks, not the thousands of positions of a long-lived engine."""
    engines = []
    original = generator.engine
    monkeypatch.setattr(generator, "engine", lambda options=None: engines.append(original(options)) or engines[-1])
    generator.generate(PROMPTS, GREEDY)
    assert engines[0].block_pool.num_blocks == sum(-(-(len(generator.encode(prompt)) + 11) // 16) for prompt in PROMPTS)
    config = generator.model.config
    assert original().block_pool.num_blocks == config.max_position_embeddings * 64 // 16  # for max_running sequences
    big = EngineConfig(max_running=10**6)
    assert original(big).block_pool.num_blocks == 2**29 // (bytes_per_position(config, generator.dtype) * 16)


def test_uninitialised_cache_memory_is_never_read(generator, monkeypatch):
    """Prompts of several lengths, alone and padded, in a cache filled with NaN."""
    engines = []
    original = generator.engine

    def full_of_nan(options=None):
        engines.append(original(options))
        for layer in engines[-1].model_runner.kv_cache.layers:
            layer.keys.fill_(float("nan"))
            layer.values.fill_(float("nan"))
        return engines[-1]

    plain = generator.generate(PROMPTS, GREEDY)
    monkeypatch.setattr(generator, "engine", full_of_nan)
    assert [out.token_ids for out in generator.generate(PROMPTS, GREEDY)] == [out.token_ids for out in plain]
    assert engines


def test_closing_a_stream_frees_its_engine(generator, monkeypatch):
    engines = []
    original = generator.engine

    def engine(options):
        new = original(options)
        engines.append(weakref.ref(new))
        return new

    monkeypatch.setattr(generator, "engine", engine)
    stream = generator.stream("The bee", SamplingParams(max_new_tokens=100, temperature=0.0, ignore_eos=True))
    next(stream)
    assert engines[0]() is not None
    stream.close()
    gc.collect()
    assert engines[0]() is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, SamplingParams(temperature=0.0)),
        ({}, SamplingParams(temperature=0.0)),
        ({"temperature": 0.7, "top_k": 20}, SamplingParams(temperature=0.0)),
        ({"do_sample": False, "repetition_penalty": 1.1}, SamplingParams(temperature=0.0, repetition_penalty=1.1)),
        ({"do_sample": True}, SamplingParams(top_k=50)),
        ({"do_sample": True, "top_k": None, "top_p": 0.8}, SamplingParams(top_k=50, top_p=0.8)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 0, "min_p": 0.1, "max_new_tokens": 9},
            SamplingParams(max_new_tokens=9, temperature=0.7, min_p=0.1),
        ),
    ],
)
def test_sampling_defaults_match_transformers(tiny, tokenizer, tmp_path, settings, expected):
    Bumblebee(tiny()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.unlink(missing_ok=True)
    if settings is not None:
        file.write_text(json.dumps(settings))
    generator = Generator.from_pretrained(tmp_path, device="cpu")
    assert generator.defaults == expected
    if expected.temperature == 0:
        assert generator.generate(["x"]) == generator.generate(["x"], expected)
    file.write_text('{"do_sample": true, "top_p": 2}')
    with pytest.raises(ValueError, match="generation_config.json: top_p must be more than 0 and at most 1, got 2"):
        Generator.from_pretrained(tmp_path, device="cpu")
