"""Measure weight-only quantization: single-stream speed, memory and perplexity of bf16, int8 and int4.

    OMP_NUM_THREADS=2 python benchmarks/quantize.py [rounds] [--shape 0.5b] [--device cpu]

The shape has random weights, for speed and memory; takes about five minutes for 0.5b on two cores. Perplexity is that of a
small model, trained first for a few seconds on the sample texts, on texts that it has not seen.

Equality comes first: the logits of each quantized model are compared with those of the ordinary model with its dequantized
weights. Then the models decode in turn, round by round, so that other load on the machine affects all. Tokens per second and
ratios are medians over the rounds; prefill of a short prompt is included. Memory is measured in a process of its own for each:
the peak while loading and one token are computed, and what is resident then.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path

from common import header, median, parser, peak_memory, run_in_subprocess, table

PROMPT, NEW, STREAMS = 16, 32, 8
SCHEMES = (None, "int8", "int4")
ROOT = Path(__file__).resolve().parent.parent


def make_folder(shape: str, folder: Path) -> Path:
    """A model folder in bf16 with random weights."""
    import torch

    from bumblebee import Bumblebee, BumblebeeConfig, Tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Bumblebee(BumblebeeConfig.preset(shape)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    Tokenizer.train(["The bees of the garden."], 300).save_pretrained(folder)  # prompts are ids: any tokenizer will do
    return folder


def memory_of(folder: str, device: str, scheme: str) -> None:
    """Print peak and resident memory in GB; run in a process of its own."""
    import psutil

    from bumblebee import Generator, SamplingParams

    generator = Generator.from_pretrained(folder, device, "bfloat16", quantize=None if scheme == "bf16" else scheme)
    generator.generate([[1] * PROMPT], SamplingParams(max_new_tokens=1, temperature=0.0))
    gc.collect()
    print(peak_memory(), psutil.Process().memory_info().rss / 1e9)


# -- quality ---------------------------------------------------------------------------------------------------------------


def train(folder: Path):
    """Train a model of 0.3 M parameters on the sample texts; returns the held-out rows of ids."""
    import torch

    from bumblebee import Bumblebee, BumblebeeConfig, Tokenizer
    from datamodules import record_files

    texts = [record_files.text_of(record) for record in record_files.read(str(ROOT / "recipes/samples/pretrain.jsonl"))]
    tokenizer = Tokenizer.train(texts, 400)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
    rows = ids[: len(ids) // 65 * 65].view(-1, 65)
    torch.manual_seed(0)
    config = BumblebeeConfig.preset("tiny", vocab_size=400, hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    model = Bumblebee(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        batch = rows[:-16][torch.arange(8 * step, 8 * step + 8) % (len(rows) - 16)]
        model(batch[:, :-1], labels=batch[:, 1:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return rows[-16:]


def quality(device: str) -> list[list[object]]:
    """Rows of scheme, largest error of the logits, and perplexity with its loss."""
    import torch

    from bumblebee import Bumblebee, Generator
    from bumblebee.nn.quantized import token_losses

    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        with torch.inference_mode(False):
            held_out = train(Path(name)).to(device)
        own = None
        for scheme in SCHEMES:
            model = Generator.from_pretrained(name, device, "bfloat16", quantize=scheme).model
            reference = Bumblebee.from_pretrained(name, device=device, dtype=torch.bfloat16).eval()
            reference.load_state_dict(model.state_dict())
            logits, expected = model(held_out[:, :-1]), reference(held_out[:, :-1])
            error = ((logits - expected).norm() / expected.norm()).item()
            assert error < 0.03, f"{scheme}: logits differ from those of the dequantized weights by {error:.1%}"
            perplexity = token_losses(torch.nn.Identity(), logits, held_out[:, 1:]).mean().exp().item()
            own = own or perplexity
            rows.append([scheme or "bf16", f"{error:.2%}", f"{perplexity:.2f}", f"{perplexity / own - 1:+.2%}"])
    return rows


# -- speed -----------------------------------------------------------------------------------------------------------------


def speed(folder: Path, device: str, rounds: int) -> list[list[object]]:
    """Rows of scheme, tokens per second of one and of several streams, and their ratios to bf16."""
    from bumblebee import Generator, SamplingParams

    generators = {scheme: Generator.from_pretrained(folder, device, "bfloat16", quantize=scheme) for scheme in SCHEMES}
    params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)

    def rate(scheme: str | None, streams: int) -> float:
        prompts = [[stream + 1] * PROMPT for stream in range(streams)]
        started = time.perf_counter()
        generators[scheme].generate(prompts, params)
        return streams * NEW / (time.perf_counter() - started)

    for scheme in SCHEMES:
        rate(scheme, 1)  # kernels are chosen and compiled
    rates = [{(scheme, n): rate(scheme, n) for n in (1, STREAMS) for scheme in SCHEMES} for _ in range(rounds)]
    return [
        [
            scheme or "bf16",
            *(f"{median([each[scheme, n] for each in rates]):.1f}" for n in (1, STREAMS)),
            *(f"{median([each[scheme, n] / each[None, n] for each in rates]):.2f}" for n in (1, STREAMS)),
        ]
        for scheme in SCHEMES
    ]


def main(rounds: int, shape: str, device: str) -> None:
    import torch

    print(header(f"Quantized weights, shape {shape}, {torch.get_num_threads()} threads, {PROMPT} + {NEW} tokens, {device}"))
    columns = ["", "error of logits", "perplexity, held out", "loss"]
    print(table(columns, quality(device)), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = make_folder(shape, Path(name))
        memory = [run_in_subprocess(__file__, "--memory", name, device, scheme or "bf16") for scheme in SCHEMES]
        columns = ["", "tokens/s, 1 stream", f"{STREAMS} streams", "vs bf16, 1 stream", f"{STREAMS} streams"]
        rows = speed(folder, device, rounds)
    rows = [[*row, *(f"{value:.2f} GB" for value in each)] for row, each in zip(rows, memory, strict=True)]
    print("\n" + table([*columns, "peak memory", "resident"], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        memory_of(*sys.argv[2:])
    else:
        arguments = parser(__doc__)
        arguments.add_argument("rounds", nargs="?", type=int, default=5)
        arguments.add_argument("--shape", default="0.5b", help="a preset, such as tiny for a quick look")
        arguments.add_argument("--device", default="cpu")
        main(**vars(arguments.parse_args()))
