"""Measure decode throughput on a CPU: the Generator against transformers' ``generate``, with one stream and with sixteen.

    OMP_NUM_THREADS=2 python benchmarks/decode.py [rounds]

26.7 M parameters, fp32 and bf16. Takes about three minutes.

Both load the same folder and continue prompts of 128 tokens by 128 tokens, greedily. Their tokens are compared first: in fp32
all must be equal; in bf16, where rounding differs, the length of the common prefixes is reported. Then they run in turn, round
by round, so that other load on the machine affects both. Times include prefill. The reported ratios are medians over the
rounds. The upper bound is the time to read all weights once per step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import header, median, parser, table

PROMPT, NEW, STREAMS = 128, 128, 16


def make_model_folder(folder: Path) -> Path:
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


def generators(folder: Path, dtype: str) -> tuple[Callable, Callable, int]:
    """Functions from prompts to new tokens, ours and transformers', and the bytes of the model."""
    import torch
    from transformers import Qwen2ForCausalLM

    from bumblebee import Generator, SamplingParams

    generator = Generator.from_pretrained(folder, device="cpu", dtype=dtype)
    hf_model = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)

    def generate(prompts):
        return [completion.token_ids for completion in generator.generate(prompts, params)]

    @torch.inference_mode()
    def hf_generate(prompts):
        ids = torch.tensor(prompts)
        out = hf_model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
        return out[:, PROMPT:].tolist()

    return generate, hf_generate, sum(parameter.nbytes for parameter in hf_model.parameters())


def seconds(function: Callable, argument: object) -> float:
    started = time.perf_counter()
    function(argument)
    return time.perf_counter() - started


def read_bandwidth() -> float:
    """Bytes per second read from memory, on a tensor that does not fit a cache."""
    import torch

    tensor = torch.ones(2**28 // 4)
    return tensor.nbytes / min(seconds(torch.sum, tensor) for _ in range(5))


def describe_agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Number of equal tokens before each completion's first difference."""
    equal = [next((n for n in range(NEW) if a[n] != b[n]), NEW) for a, b in zip(ours, theirs, strict=True)]
    return f"{sum(equal)} of {NEW * len(equal)} tokens are equal up to each completion's first difference"


def measure(folder: Path, dtype: str, rounds: int) -> None:
    import torch

    generate, hf_generate, size = generators(folder, dtype)
    prompts = torch.randint(8192, (STREAMS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = generate(prompts), hf_generate(prompts)
    assert dtype != "float32" or tokens[0] == tokens[1], "the tokens differ"
    variants = {
        "transformers, 1 stream": lambda: seconds(hf_generate, prompts[:1]),
        "Generator, 1 stream": lambda: seconds(generate, prompts[:1]),
        f"transformers, batch of {STREAMS}": lambda: seconds(hf_generate, prompts) / STREAMS,
        f"Generator, {STREAMS} streams": lambda: seconds(generate, prompts) / STREAMS,
    }
    times = [{name: run() for name, run in variants.items()} for _ in range(rounds)]

    def speedup(name: str, over: str) -> str:
        return f"{median([each[over] / each[name] for each in times]):.2f}"

    hf_single, single, *_ = variants
    rows = [
        [name, f"{NEW / median([each[name] for each in times]):.0f}", speedup(name, hf_single), speedup(name, single)]
        for name in variants
    ]
    print(f"\n## {dtype}: {describe_agreement(*tokens)}\n")
    print(table(["", "tokens/s", "vs transformers, 1 stream", "vs Generator, 1 stream"], rows))
    bandwidth = read_bandwidth()
    print(f"\nUpper bound of one stream: {bandwidth / size:.0f} tokens/s ({size / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s)")


def main(rounds: int) -> None:
    import torch

    print(header(f"Decode, {torch.get_num_threads()} threads, {PROMPT} + {NEW} tokens, greedy, 26.7 M parameters"))
    with tempfile.TemporaryDirectory() as name:
        folder = make_model_folder(Path(name))
        for dtype in ("float32", "bfloat16"):
            measure(folder, dtype, rounds)


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("rounds", nargs="?", type=int, default=3)
    main(arguments.parse_args().rounds)
