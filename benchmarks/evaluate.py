"""Measure evaluation on a CPU: lm-evaluation-harness with our model class against its own ``hf`` model at its best batch size.

    OMP_NUM_THREADS=2 python benchmarks/evaluate.py [rounds] [--count]

25 M parameters with a vocabulary of 16,384, fp32. Takes some minutes; ``--count`` prints the work alone.

Three sets of log-likelihood requests go through the harness's ``loglikelihood``, tokenization included:

    texts       one continuation of 4 to 24 words for each of 64 contexts of 20 to 120 words
    choices     32 questions of 20 to 120 words with 4 choices of 4 to 12 words
    few-shot    32 questions with 4 choices after the same examples of 300 words

The results of both are compared first: log-likelihoods within 1e-4, the same answers to ``is_greedy``. The batch size of ``hf``
is the fastest of 1, 4, 16 and 64, for each set. Then both run in turn, round by round, so that other load on the machine
affects both. The reported ratios are medians over the rounds. The work is the tokens that go through the layers, padding
included, and the rows of logits that are computed.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common import header, median, parser, table

BATCH_SIZES = (1, 4, 16, 64)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_model_folder(folder: Path) -> str:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from bumblebee import Tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    tokenizer = Tokenizer.train([" ".join(words(random.Random(0), 20_000))], 2048)
    config = Qwen2Config(
        vocab_size=16_384, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        initializer_range=0.02, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **shape,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words(rng: random.Random, count: int) -> list[str]:
    """Words of a small vocabulary, most of which are one or two tokens."""
    return ["".join(rng.choices(LETTERS[:8], k=rng.randint(2, 3))) for _ in range(count)]


def requests(kind: str) -> list:
    """The requests of a set, as the harness makes them."""
    from lm_eval.api.instance import Instance

    rng = random.Random(kind)

    def text(low: int, high: int) -> str:
        return " ".join(words(rng, rng.randint(low, high)))

    if kind == "texts":
        pairs = [(text(20, 120), " " + text(4, 24)) for _ in range(64)]
    else:
        examples = text(300, 300) + "\n" if kind == "few-shot" else ""
        questions = [examples + text(20, 120) for _ in range(32)]
        pairs = [(question, " " + text(4, 12)) for question in questions for _ in range(4)]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


@contextmanager
def counted(model) -> Iterator[list[int]]:
    """Counts [tokens, rows of logits] of the forward passes of a model, ours or transformers'."""
    work = [0, 0]

    def count(module, args, kwargs, output) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        logits = output if not hasattr(output, "logits") else output.logits
        work[0] += ids.numel()
        work[1] += logits.shape[:-1].numel()

    handle = model.register_forward_hook(count, with_kwargs=True)
    try:
        yield work
    finally:
        handle.remove()


def check(kind: str, ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> float:
    """The largest difference of two lists of results; exits if they are not the same."""
    largest = max(abs(one[0] - other[0]) for one, other in zip(ours, theirs, strict=True))
    greedy = [one[1] for one in ours] == [other[1] for other in theirs]
    if largest > 1e-4 or not greedy:
        raise SystemExit(f"{kind}: results differ by {largest:.1e}, is_greedy {'equal' if greedy else 'differs'}")
    return largest


def seconds(model, batch: list, batch_size: int | None = None) -> float:
    if batch_size is not None:
        model.batch_size_per_gpu = batch_size
    started = time.perf_counter()
    model.loglikelihood(batch, disable_tqdm=True)
    return time.perf_counter() - started


def main() -> None:
    options = parser(__doc__)
    options.add_argument("rounds", type=int, nargs="?", default=5)
    options.add_argument("--count", action="store_true", help="print the work alone")
    args = options.parse_args()
    from lm_eval.models.huggingface import HFLM

    from bumblebee.evaluation.harness import BumblebeeLM

    print(header("lm-evaluation-harness: our model class against hf"))
    with tempfile.TemporaryDirectory() as folder:
        path = make_model_folder(Path(folder))
        ours, hf = BumblebeeLM(path, device="cpu"), HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=16)
    work_rows, time_rows = [], []
    for kind in ("texts", "choices", "few-shot"):
        batch = requests(kind)
        with counted(ours.generator.model) as own_work, counted(hf.model) as hf_work:
            difference = check(kind, ours.loglikelihood(batch, disable_tqdm=True), hf.loglikelihood(batch, disable_tqdm=True))
        tokens, rows = (f"{theirs / own:.1f}" for own, theirs in zip(own_work, hf_work, strict=True))
        work_rows.append((kind, len(batch), *own_work, *hf_work, tokens, rows, f"{difference:.0e}"))
        if not args.count:
            best = min(BATCH_SIZES, key=lambda size: seconds(hf, batch, size))
            pairs = [(seconds(ours, batch), seconds(hf, batch, best)) for _ in range(args.rounds)]
            own_time, hf_time = (median(times) for times in zip(*pairs, strict=True))
            ratio = median([theirs / own for own, theirs in pairs])
            time_rows.append((kind, f"{own_time:.2f}", f"{hf_time:.2f}", best, f"{ratio:.2f}"))
    columns = ("set", "requests", "tokens", "rows", "hf: tokens", "hf: rows", "tokens ratio", "rows ratio", "difference")
    print(table(columns, work_rows))
    if time_rows:
        print("\n" + table(("set", "ours (s)", "hf (s)", "hf's best batch size", "ratio"), time_rows))


if __name__ == "__main__":
    main()
