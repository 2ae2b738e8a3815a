"""Measure GRPO on a CPU: our Trainer against TRL's GRPOTrainer with generation by transformers.

    OMP_NUM_THREADS=2 python benchmarks/grpo.py [rounds] [--precision fp32] [--count] [--tiny]

25 M parameters with a vocabulary of 4,096. A step has 8 prompts of about 110 tokens, 8 completions of each of at most 128
tokens, and 4 micro-batches of 16 rows. The weights are random, so completions end by chance: every 48th token ends one, and
their lengths are geometric with a mean of about 45. Both train in the same precision; TRL's default is bf16, in which it keeps
fp32 weights and samples from them. ``--count`` prints the work alone, ``--tiny`` runs everything on a tiny model.

The same rollouts are compared first, in fp32: advantages and gradients must be equal within rounding. Then each trainer runs in
a process of its own, and they take turns step by step, so that other load on the machine affects both. The first step is not
counted. The reported ratios are medians over the rounds; peak memory is that of each process.
"""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import header, median, parser, peak_memory, table

PROMPTS, GROUP, MICRO_BATCHES, ENDS = 8, 8, 4, 48
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
TINY_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY, WORDS, NEW = 4096, 50, 128
TINY_VOCABULARY, TINY_WORDS, TINY_NEW = 600, 8, 12
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def share_of_vowels(
    prompts: Sequence[object], completions: Sequence[object], records: object = None, **_: object
) -> list[float]:
    """The reward of both trainers."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]  # TRL's are messages
    return [sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1) for text in texts]


# -- the model and the prompts -----------------------------------------------------------------------------------------------


def make_folder(folder: Path, steps: int, tiny: bool) -> None:
    """A model folder with prompts.jsonl."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from bumblebee import Tokenizer

    torch.manual_seed(0)
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 7))) for _ in range(20_000)]
    vocabulary = TINY_VOCABULARY if tiny else VOCABULARY
    Tokenizer.train([" ".join(words)], vocabulary).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=vocabulary, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=list(range(ENDS - 1, vocabulary, ENDS)), pad_token_id=0,
        **(TINY_SHAPE if tiny else SHAPE),
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    length = TINY_WORDS if tiny else WORDS
    texts = [" ".join(rng.choices(words, k=rng.randint(length * 3 // 4, length))) for _ in range(steps * PROMPTS)]
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (folder / "prompts.jsonl").write_text("".join(lines))


# -- our trainer and TRL's ---------------------------------------------------------------------------------------------------


class Pace:
    """Makes a trainer wait for a line of standard input before each step, and prints the step's numbers after it."""

    def __init__(self) -> None:
        self.replies, sys.stdout = sys.stdout, sys.stderr  # trainers print, too

    def begin(self) -> None:
        sys.stdin.readline()
        self.rollout, self.tokens, self.began = 0.0, 0, time.perf_counter()

    def timed(self, sample: Callable, count: Callable[[object], int]) -> Callable:
        """``sample``, whose time and tokens are added up."""

        @functools.wraps(sample)
        def run(*args: object, **options: object) -> object:
            began = time.perf_counter()
            result = sample(*args, **options)
            self.rollout += time.perf_counter() - began
            self.tokens += count(result)
            return result

        return run

    def end(self) -> None:
        numbers = {"step": time.perf_counter() - self.began, "rollout": self.rollout, "tokens": self.tokens}
        print(json.dumps({**numbers, "memory": peak_memory()}), file=self.replies, flush=True)


def our_task(folder: Path, options: Namespace):
    from bumblebee import GRPO, Bumblebee

    model = Bumblebee.from_pretrained(folder)
    return GRPO(model, [share_of_vowels], group_size=GROUP, max_new_tokens=new_tokens(options), keep_rollouts=1)


def run_ours(folder: Path, options: Namespace, pace: Pace) -> None:
    """``options.rounds`` steps of our Trainer."""
    import torch

    from bumblebee import Trainer
    from bumblebee.callback import Callback
    from datamodules import Prompts

    class Paced(Callback):
        def on_step_start(self, trainer: Trainer) -> None:
            pace.begin()

        def on_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
            pace.tokens = round(metrics["rl/length"] * PROMPTS * GROUP)
            pace.rollout = pace.tokens / metrics["rl/sampled_tokens_per_second"]
            pace.end()

    trainer = Trainer(
        max_steps=options.rounds, micro_batch_size=PROMPTS // MICRO_BATCHES, accumulate=MICRO_BATCHES,
        precision=options.precision,
    )  # fmt: skip
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-6, fused=True)
    data = Prompts(str(folder / "prompts.jsonl"), str(folder))
    trainer.fit(our_task(folder, options), data, optimizer, callbacks={"paced": Paced()}, output_dir=folder / "ours")


def trl_trainer(folder: Path, options: Namespace, callbacks: list | None = None):
    """TRL's trainer with the same model, prompts, batches and loss."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts])
    config = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=options.rounds, per_device_train_batch_size=PROMPTS * GROUP // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES, num_generations=GROUP, max_completion_length=new_tokens(options),
        loss_type="grpo", scale_rewards="group", beta=0.0, learning_rate=1e-6, lr_scheduler_type="constant", temperature=1.0,
        bf16=options.precision == "bf16", use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return GRPOTrainer(
        str(folder), share_of_vowels, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=callbacks
    )


def run_trl(folder: Path, options: Namespace, pace: Pace) -> None:
    """``options.rounds`` steps of TRL's trainer."""
    from transformers import TrainerCallback

    class Paced(TrainerCallback):
        def on_step_begin(self, *args: object, **options: object) -> None:
            pace.begin()

        def on_step_end(self, *args: object, **options: object) -> None:
            pace.end()

    trainer = trl_trainer(folder, options, [Paced()])
    trainer._generate_single_turn = pace.timed(trainer._generate_single_turn, lambda result: sum(len(ids) for ids in result[0]))
    trainer.train()


def new_tokens(options: Namespace) -> int:
    return TINY_NEW if options.tiny else NEW


# -- comparison on the same rollouts -----------------------------------------------------------------------------------------


@dataclass
class Sampled:
    """A step's micro-batches for training, and the tokens that went through the model to sample them."""

    task: Any
    samples: list[Any]
    batches: list[dict[str, Any]]
    texts: list[str]
    sampling: int


def sample(folder: Path, options: Namespace, micro_batches: int) -> Sampled:
    """Sample completions as our Trainer does before a step."""
    import torch

    from datamodules import Prompts

    data, task = Prompts(str(folder / "prompts.jsonl"), str(folder)), our_task(folder, options)
    data.setup(0)
    task.setup(data)
    engine = SimpleNamespace(whole_model=nullcontext)
    run = SimpleNamespace(
        engine=engine, device=torch.device("cpu"), data=data, seed=0, zero_stage=0, output_dir=folder / "sampled"
    )
    task.begin(run)
    each = PROMPTS // MICRO_BATCHES
    parts = [data.train[at * each : (at + 1) * each] for at in range(micro_batches)]
    with counted(task.model) as work:
        [batches] = task.prepare_windows([[data.collate(part) for part in parts]], 0)
    lines = (folder / "sampled" / "rollouts" / "step-000001.jsonl").read_text().splitlines()
    return Sampled(task, sum(parts, []), batches, [json.loads(line)["completion"] for line in lines], work[0])


def completions(batch: dict[str, Any]) -> list[list[int]]:
    """The tokens of each completion of a micro-batch."""
    from bumblebee.nn import IGNORE_INDEX

    return [row[row != IGNORE_INDEX].tolist() for row in batch["labels"]]


def check(folder: Path, options: Namespace) -> str:
    """Compare advantages and gradients on a micro-batch that our engine has sampled; exits if they are not the same."""
    sampled = sample(folder, options, 1)
    task, [batch] = sampled.task, sampled.batches
    counts = {name: float(count) for name, count in task.counts(batch).items()}
    task.total(task.training_step(task.model, batch), counts).backward()

    trainer = trl_trainer(folder, Namespace(**{**vars(options), "precision": "fp32"}))
    prompts = [sample.ids for sample in sampled.samples]
    texts = [[{"role": "assistant", "content": text}] for text in sampled.texts]
    repeated = [ids for ids in prompts for _ in range(GROUP)]
    trainer._generate = lambda inputs: (repeated, completions(batch), None, texts, None, {}, None, None)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    records = [trainer.train_dataset[at] for at in range(len(prompts))]
    if trainer._tokenize_prompts([record["prompt"] for record in records])[0] != prompts:
        raise SystemExit("the tokens of the prompts differ")
    scored = trainer._generate_and_score_completions([record for record in records for _ in range(GROUP)])
    trainer._compute_loss(model, scored).backward()

    apart = (scored["advantages"].double() - batch["advantages"]).abs().max().item()
    ours, theirs = gradient_of_embeddings(task.model), gradient_of_embeddings(model)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if apart > 1e-4 or error > 1e-3:
        raise SystemExit(f"advantages differ by {apart:.1e}, gradients by {error:.1e}")
    return f"the same rollouts: advantages within {apart:.0e}, gradient of the embeddings within {error:.0e} of its norm"


def gradient_of_embeddings(model):
    return next(weight.grad for name, weight in model.named_parameters() if name.endswith("embed_tokens.weight"))


# -- work and time -----------------------------------------------------------------------------------------------------------


@contextmanager
def counted(model) -> Iterator[list[int]]:
    """Counts [tokens] of the forward passes of a model."""
    work = [0]

    def count(module, args, kwargs, output) -> None:
        work[0] += (args[0] if args else kwargs["input_ids"]).numel()

    handle = model.register_forward_hook(count, with_kwargs=True)
    try:
        yield work
    finally:
        handle.remove()


def count_work(folder: Path, options: Namespace) -> str:
    """Tokens through the layers in a step, padding included, for lengths that our engine has sampled."""
    sampled = sample(folder, options, MICRO_BATCHES)
    lengths = [len(tokens) for batch in sampled.batches for tokens in completions(batch)]
    width = max(len(sample.ids) for sample in sampled.samples)
    trl = len(lengths) * (width + max(lengths))  # both in sampling and in training
    computed = [batch.get("packed_input_ids", batch["input_ids"]) for batch in sampled.batches]
    ours = {"sampling": sampled.sampling, "training": sum(each.numel() for each in computed)}
    rows = [(name, count, trl, f"{trl / count:.2f}") for name, count in ours.items()]
    title = f"{sum(lengths)} tokens in {len(lengths)} completions, the longest of {max(lengths)}"
    return f"{title}\n\n" + table(("tokens of a step", "ours", "TRL", "ratio"), rows)


def start(who: str, folder: Path, options: Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(options.rounds + 1), "--worker", who, "--folder", str(folder)]
    command += ["--precision", options.precision, *(["--tiny"] if options.tiny else [])]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / f"{who}.log", "w"), text=True
    )


def one_step(process: subprocess.Popen[str], log: Path) -> dict[str, float]:
    """Let a worker take a step."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    reply = process.stdout.readline()
    if not reply:
        raise SystemExit(log.read_text()[-3000:])
    return json.loads(reply)


def measure(folder: Path, options: Namespace) -> str:
    """The table of times."""
    workers = {who: start(who, folder, options) for who in ("ours", "TRL")}
    try:
        times = [
            {who: one_step(worker, folder / f"{who}.log") for who, worker in workers.items()} for _ in range(options.rounds + 1)
        ]
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    times = times[1:]

    def of(who: str, value: Callable[[dict[str, float]], float]) -> list[float]:
        return [value(each[who]) for each in times]

    values: dict[str, Callable[[dict[str, float]], float]] = {
        "rollout, tokens/s": lambda each: each["tokens"] / each["rollout"],
        "step, s": lambda each: each["step"],
        "  rollout, s": lambda each: each["rollout"],
        "  training and the rest, s": lambda each: each["step"] - each["rollout"],
        "tokens of a step": lambda each: each["tokens"],
        "peak memory, GB": lambda each: each["memory"],
    }
    rows = []
    for name, value in values.items():
        ours, trl = of("ours", value), of("TRL", value)
        ratio = median([one / other if "/s" in name else other / one for one, other in zip(ours, trl, strict=True)])
        rows.append((name.strip(), f"{median(ours):.2f}", f"{median(trl):.2f}", f"{ratio:.2f}"))
    return table(("", "ours", "TRL", "ratio, median of rounds"), rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("rounds", type=int, nargs="?", default=5)
    options.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    options.add_argument("--count", action="store_true", help="print the work alone")
    options.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    options.add_argument("--worker", choices=("ours", "TRL"), help="of the script itself")
    options.add_argument("--folder", type=Path, help="of the script itself")
    args = options.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if args.worker:
        (run_ours if args.worker == "ours" else run_trl)(args.folder, args, Pace())
        return
    print(header(f"GRPO: our Trainer against TRL's, {args.precision}"), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, args.rounds + 1, args.tiny)
        print(count_work(folder, args), flush=True)
        if not args.count:
            print("\n" + check(folder, args), flush=True)
            print("\n" + measure(folder, args))


if __name__ == "__main__":
    main()
