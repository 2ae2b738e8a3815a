"""Measure time and memory of the loss over a large vocabulary, with full logits and in chunks.

    python benchmarks/cross_entropy.py [fp32|bf16]

Vocabulary 151,936, hidden size 896, 4 x 1024 targets. Takes about two minutes.

Extra memory is the peak above hidden states, weights and their gradients; each variant runs in a process of its own, in turn.
CPU seconds are summed over both cores: on a shared machine they vary less than wall-clock time. The gradients of both variants
are compared first.
"""

from __future__ import annotations

import time

from common import header, median, parser, peak_memory, run_in_subprocess, table

TARGETS, HIDDEN, VOCABULARY, ROUNDS = 4 * 1024, 896, 151_936, 3


def loss_function(variant: str):
    import torch

    from bumblebee.nn.linear_cross_entropy import linear_cross_entropy

    def naive(hidden, weight, labels):
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    return {"naive": naive, "chunked": linear_cross_entropy}[variant]


def make_inputs(dtype: str, targets: int = TARGETS, vocabulary: int = VOCABULARY):
    import torch

    torch.manual_seed(0)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    hidden = torch.randn(targets, HIDDEN).to(torch_dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, HIDDEN)).to(torch_dtype).requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    return hidden, weight, torch.randint(vocabulary, (targets,))


def measure(variant: str, dtype: str) -> None:
    """In a process of its own: print wall-clock seconds, CPU seconds and extra memory."""
    hidden, weight, labels = make_inputs(dtype)
    loss = loss_function(variant)
    (hidden[:1] @ weight[:1].T).sum().item()
    before = peak_memory()
    started, cpu_started = time.perf_counter(), time.process_time()
    (loss(hidden, weight, labels).sum() / TARGETS).backward()
    print(time.perf_counter() - started, time.process_time() - cpu_started, peak_memory() - before)


def gradient_difference(dtype: str) -> float:
    """The largest relative difference between the gradients of both variants, on a smaller problem."""
    gradients = []
    for variant in ("naive", "chunked"):
        hidden, weight, labels = make_inputs(dtype, 256, 20_000)
        (loss_function(variant)(hidden, weight, labels).sum() / 256).backward()
        gradients.append((hidden.grad.float(), weight.grad.float()))
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True))


def main(dtype: str) -> None:
    print(header(f"Cross-entropy of {TARGETS} targets over {VOCABULARY:,} tokens, {dtype}"))
    print(f"The gradients differ by {gradient_difference(dtype):.1e} of their norm.\n")
    results: dict[str, list[list[float]]] = {"naive": [], "chunked": []}
    for _ in range(ROUNDS):
        for variant, runs in results.items():
            runs.append(run_in_subprocess(__file__, "--measure", variant, dtype))
    rows = []
    for variant, runs in results.items():
        pairs = list(zip(runs, results["naive"], strict=True))
        seconds, cpu_seconds = ([median([run[i] for run in runs]), median([a[i] / b[i] for a, b in pairs])] for i in (0, 1))
        memory = median([run[2] for run in runs])
        memory_ratio = memory / median([run[2] for run in results["naive"]])
        figures = (*seconds, *cpu_seconds, memory, memory_ratio)
        rows.append([variant, *(f"{figure:.2f}" for figure in figures)])
    columns = ["loss", "forward + backward, s", "vs naive", "CPU s", "vs naive", "extra memory, GB", "vs naive"]
    print(table(columns, rows))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("dtype", nargs="?", choices=["fp32", "bf16"], default="fp32")
    arguments.add_argument("--measure", nargs=2, metavar=("VARIANT", "DTYPE"), help="used by the script itself")
    options = arguments.parse_args()
    if options.measure:
        measure(*options.measure)
    else:
        main(options.dtype)
