"""How long does it take to choose the next token of 16 requests, next to transformers' logits processors and multinomial?

    python benchmarks/sampler.py        vocabularies of 8,192 and 151,936, fp32; about half a minute

Milliseconds of one step, the median of several; both take turns. The probability of a token falls with its rank to the power
of 1.8, so that the most likely 24 hold 95 %, about as those of a trained model; "untrained" are normal logits, of which three
quarters of the vocabulary are needed. transformers' generate has one set of options for a batch, so all requests have the same;
"all options" is repetition penalty 1.1 over 500 ids, temperature 0.8, top-k 50, top-p 0.95, min-p 0.05. Before anything is
measured it is checked that both choose the same tokens about as often.
"""

from __future__ import annotations

import time

from common import header, median, table

REQUESTS, ROUNDS, PROMPT = 16, 7, 500
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 50": {"top_k": 50},
    "top-p 0.95": {"top_p": 0.95},
    "top-p 0.95, untrained": {"top_p": 0.95},
    "all options": {"repetition_penalty": 1.1, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05},
}


def logits_of(vocabulary: int, trained: bool):
    """(16, V)."""
    import torch

    torch.manual_seed(0)
    if not trained:
        return torch.randn(REQUESTS, vocabulary)
    ranks = torch.stack([torch.randperm(vocabulary) for _ in range(REQUESTS)])
    return -1.8 * (ranks + 1).log()


def ours(logits, prompts, options):
    """A function that takes one step."""
    from bumblebee.inference.sampler import SamplerState, sample
    from bumblebee.inference.sampling_params import SamplingParams

    states = [SamplerState(prompt, SamplingParams(seed=row, **options)) for row, prompt in enumerate(prompts.tolist())]
    return lambda: [token.id for token in sample(logits, states)]


def theirs(logits, prompts, options):
    """As generate does it: a list of processors, softmax, multinomial."""
    import torch
    from transformers.generation import logits_process

    processors = logits_process.LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(logits_process.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    kinds = {"temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper"}
    for name, kind in {**kinds, "min_p": "MinPLogitsWarper"}.items():
        if options.get(name):
            processors.append(getattr(logits_process, kind)(options[name]))

    def step():
        scores = processors(prompts, logits.clone())  # the repetition penalty works in place
        if options.get("temperature") == 0:
            return scores.argmax(-1).tolist()
        return torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()

    return step


def check(logits, prompts, options) -> None:
    """Over many draws from one row of logits, both choose the same tokens about as often."""
    import torch

    row, ids = logits[:1].expand(2000, -1), prompts[:1].expand(2000, -1)
    counts = [torch.bincount(torch.tensor(way(row, ids, options)()), minlength=row.shape[1]) for way in (ours, theirs)]
    difference = (counts[0] - counts[1]).abs().sum() / 2 / len(row)
    assert difference < 0.15, f"{options}: {difference:.2f} of the draws differ"


def milliseconds(step) -> float:
    started = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - started)


def measure(logits, prompts, options) -> tuple[float, float]:
    """Medians of our and their steps."""
    steps = [way(logits, prompts, options) for way in (ours, theirs)]
    for step in steps:
        step()
    pairs = [[milliseconds(step) for step in steps] for _ in range(ROUNDS)]
    mine, other = ([pair[place] for pair in pairs] for place in (0, 1))
    return median(mine), median(other)


def main() -> None:
    import torch
    import transformers

    print(header(f"The next token of {REQUESTS} requests"))
    print(f"transformers {transformers.__version__}, {torch.get_num_threads()} threads\n")
    rows = []
    for vocabulary in (8_192, 151_936):
        prompts = torch.randint(vocabulary, (REQUESTS, PROMPT))
        for name, options in OPTIONS.items():
            logits = logits_of(vocabulary, "untrained" not in name)
            if vocabulary == 8_192:
                check(logits[:, :50], prompts % 50, options)
            mine, other = measure(logits, prompts, options)
            rows.append([f"{vocabulary:,}", name, f"{mine:.2f}", f"{other:.2f}", f"{other / mine:.1f}"])
    print(table(["vocabulary", "options", "bumblebee, ms", "transformers, ms", "times as fast"], rows))


if __name__ == "__main__":
    main()
