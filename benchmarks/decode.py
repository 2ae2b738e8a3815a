"""How fast do texts grow: the Generator against transformers' generate, one stream and sixteen at a time, on one CPU?

    OMP_NUM_THREADS=2 python benchmarks/decode.py [rounds]     26.7 M parameters, fp32 and bf16; about three minutes

Both read the same folder, and continue prompts of 128 tokens by 128 tokens, the most likely ones. First their tokens are
compared: all must be equal in fp32; in bf16, where sums are rounded in another order, it is told how many begin alike. Then
they take turns, round by round, so that both meet the same neighbours on a shared machine. Times include the prompt. What is
quoted is the median of the ratios of all rounds. The limit is that of reading all weights once for each step.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import header, median, table

PROMPT, NEW, STREAMS = 128, 128, 16


def folder_of_a_model(folder: Path) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from bumblebee import Tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = Qwen2Config(
        vocab_size=8192, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    Tokenizer.train(["The bees of the garden."], 300).save_pretrained(folder)  # prompts are ids: any tokenizer will do
    return folder


def contestants(folder: Path, dtype: str) -> tuple[Callable, Callable, int]:
    """Ours and theirs, prompts -> new tokens, and the model's bytes."""
    import torch
    from transformers import Qwen2ForCausalLM

    from bumblebee import Generator, SamplingParams

    generator = Generator.from_pretrained(folder, device="cpu", dtype=dtype)
    theirs = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)

    def ours(prompts):
        return [generation.token_ids for generation in generator.generate(prompts, params)]

    @torch.inference_mode()
    def transformers(prompts):
        ids = torch.tensor(prompts)
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        return out[:, PROMPT:].tolist()

    return ours, transformers, sum(parameter.nbytes for parameter in theirs.parameters())


def seconds(run: Callable, prompts: list[list[int]]) -> float:
    started = time.perf_counter()
    run(prompts)
    return time.perf_counter() - started


def read_bandwidth() -> float:
    """Bytes a second, from memory that no cache holds."""
    import torch

    numbers = torch.ones(2**28 // 4)
    return numbers.nbytes / min(seconds(torch.sum, numbers) for _ in range(5))


def alike(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many tokens begin alike, over all prompts."""
    same = [next((n for n in range(NEW) if a[n] != b[n]), NEW) for a, b in zip(ours, theirs, strict=True)]
    return f"{sum(same)} of {NEW * len(same)} tokens are equal up to each text's first difference"


def measure(folder: Path, dtype: str, rounds: int) -> None:
    import torch

    ours, theirs, size = contestants(folder, dtype)
    prompts = torch.randint(8192, (STREAMS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    both = ours(prompts), theirs(prompts)
    assert dtype != "float32" or both[0] == both[1], "the tokens differ"
    ways = {
        "transformers, 1 stream": lambda: seconds(theirs, prompts[:1]),
        "Generator, 1 stream": lambda: seconds(ours, prompts[:1]),
        f"transformers, a batch of {STREAMS}": lambda: seconds(theirs, prompts) / STREAMS,
        f"Generator, {STREAMS} streams": lambda: seconds(ours, prompts) / STREAMS,
    }
    times = [{name: way() for name, way in ways.items()} for _ in range(rounds)]

    def ratio(name: str, over: str) -> str:
        return f"{median([each[over] / each[name] for each in times]):.2f}"

    theirs_one, ours_one, *_ = ways
    rows = [
        [name, f"{NEW / median([each[name] for each in times]):.0f}", ratio(name, theirs_one), ratio(name, ours_one)]
        for name in ways
    ]
    print(f"\n## {dtype}: {alike(*both)}\n")
    print(table(["way", "tokens/s", "over transformers, 1 stream", "over Generator, 1 stream"], rows))
    bandwidth = read_bandwidth()
    print(f"\nlimit of one stream: {bandwidth / size:.0f} tokens/s ({size / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s)")


def main(rounds: int) -> None:
    import torch

    print(header(f"Growing texts, {torch.get_num_threads()} threads, {PROMPT} + {NEW} tokens, greedy, 26.7 M parameters"))
    with tempfile.TemporaryDirectory() as name:
        folder = folder_of_a_model(Path(name))
        for dtype in ("float32", "bfloat16"):
            measure(folder, dtype, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
