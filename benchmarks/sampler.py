"""Measure sampling the next token of 16 requests, against transformers' logits processors and ``multinomial``.

    python benchmarks/sampler.py

Vocabularies of 8,192 and 151,936, fp32. Takes about half a minute.

Milliseconds per step, the median of several; both run in turn. Token probabilities fall with rank to the power of 1.8, so that
the 24 most likely tokens hold 95 %, about as in a trained model; "untrained" are normal logits, where top-p 0.95 keeps three
quarters of the vocabulary. transformers' ``generate`` has one set of options per batch, so all requests have the same; "all
options" is repetition penalty 1.1 over 500 ids, temperature 0.8, top-k 50, top-p 0.95, min-p 0.05. First, both must choose the
same tokens about equally often.
"""

from __future__ import annotations

import time

from common import header, median, parser, table

REQUESTS, ROUNDS, PROMPT = 16, 7, 500
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.95, untrained": {"top_p": 0.95},
    "all options": {"repetition_penalty": 1.1, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def make_logits(vocabulary: int, trained: bool):
    """(16, V)."""
    import torch

    torch.manual_seed(0)
    if not trained:
        return torch.randn(REQUESTS, vocabulary)
    ranks = torch.stack([torch.randperm(vocabulary) for _ in range(REQUESTS)])
    return -1.8 * (ranks + 1).log()


def bumblebee_step(logits, prompts, options):
    """A function that samples one step."""
    from bumblebee.inference.sampling.sampler import SamplerState, sample
    from bumblebee.inference.sampling.sampling_params import SamplingParams

    states = [SamplerState(prompt, SamplingParams(seed=row, **options)) for row, prompt in enumerate(prompts.tolist())]
    return lambda: [token.id for token in sample(logits, states)]


def transformers_step(logits, prompts, options):
    """A function that samples one step as ``generate`` does: logits processors, softmax, multinomial."""
    import torch
    from transformers.generation import logits_process

    processors = logits_process.LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    warpers = {"temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper"}
    for name, warper in {**warpers, "min_p": "MinPLogitsWarper"}.items():
        if options.get(name):
            processors.append(getattr(logits_process, warper)(options[name]))

    def step():
        scores = processors(prompts, logits.clone())  # the repetition penalty works in place
        if options.get("temperature") == 0:
            return scores.argmax(-1).tolist()
        return torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()

    return step


SAMPLERS = (bumblebee_step, transformers_step)


def check(logits, prompts, options) -> None:
    """Assert that over many draws from one row of logits, both choose the same tokens about equally often."""
    import torch

    row, ids = logits[:1].expand(2000, -1), prompts[:1].expand(2000, -1)
    counts = [torch.bincount(torch.tensor(make(row, ids, options)()), minlength=row.shape[1]) for make in SAMPLERS]
    difference = (counts[0] - counts[1]).abs().sum() / 2 / len(row)
    assert difference < 0.15, f"{options}: {difference:.2f} of the draws differ"


def milliseconds(step) -> float:
    started = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - started)


def measure(logits, prompts, options) -> tuple[float, float]:
    """Median milliseconds of our step and transformers'."""
    steps = [make(logits, prompts, options) for make in SAMPLERS]
    for step in steps:
        step()
    rounds = [[milliseconds(step) for step in steps] for _ in range(ROUNDS)]
    ours, theirs = zip(*rounds, strict=True)
    return median(ours), median(theirs)


def main() -> None:
    import torch
    import transformers

    print(header(f"Sampling the next token of {REQUESTS} requests"))
    print(f"transformers {transformers.__version__}, {torch.get_num_threads()} threads\n")
    rows = []
    for vocabulary in (8_192, 151_936):
        prompts = torch.randint(vocabulary, (REQUESTS, PROMPT))
        for name, options in OPTIONS.items():
            logits = make_logits(vocabulary, "untrained" not in name)
            if vocabulary == 8_192:
                check(logits[:, :50], prompts % 50, options)
            ours, theirs = measure(logits, prompts, options)
            rows.append([f"{vocabulary:,}", name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}"])
    print(table(["vocabulary", "options", "Bumblebee, ms", "transformers, ms", "speedup"], rows))


if __name__ == "__main__":
    parser(__doc__).parse_args()
    main()
