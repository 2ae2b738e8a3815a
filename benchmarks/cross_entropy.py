"""How much memory and time does the loss over a large vocabulary take, with full logits and in chunks?

    python benchmarks/cross_entropy.py [bf16]     vocabulary 151,936, hidden size 896, 4 x 1024 targets; about two minutes

Extra memory is the peak above what hidden states, weights and their gradients take, each variant in a process of its own; the
two take turns. Processor seconds are those of both cores: on a shared machine they vary less than seconds by the clock. Before
anything is measured the gradients of both are compared.
"""

from __future__ import annotations

import sys
import time

from common import header, in_a_process, median, peak_memory, table

TARGETS, HIDDEN, VOCABULARY, ROUNDS = 4 * 1024, 896, 151_936, 3


def losses(variant: str):
    import torch

    from bumblebee.nn.linear_cross_entropy import linear_cross_entropy

    def naive(hidden, weight, labels):
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="none")

    return {"naive": naive, "chunked": linear_cross_entropy}[variant]


def parts(dtype: str, targets: int = TARGETS, vocabulary: int = VOCABULARY):
    import torch

    torch.manual_seed(0)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    hidden = torch.randn(targets, HIDDEN).to(kind).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, HIDDEN)).to(kind).requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    return hidden, weight, torch.randint(vocabulary, (targets,))


def measure(variant: str, dtype: str) -> None:
    hidden, weight, labels = parts(dtype)
    loss = losses(variant)
    (hidden[:1] @ weight[:1].T).sum().item()
    before = peak_memory()
    started, busy = time.perf_counter(), time.process_time()
    (loss(hidden, weight, labels).sum() / TARGETS).backward()
    print(time.perf_counter() - started, time.process_time() - busy, peak_memory() - before)


def check(dtype: str) -> float:
    """The largest relative difference between both variants' gradients, on a smaller problem."""
    gradients = []
    for variant in ("naive", "chunked"):
        hidden, weight, labels = parts(dtype, 256, 20_000)
        (losses(variant)(hidden, weight, labels).sum() / 256).backward()
        gradients.append((hidden.grad.float(), weight.grad.float()))
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True))


def main(dtype: str) -> None:
    print(header(f"Cross-entropy of {TARGETS} targets over {VOCABULARY:,} tokens, {dtype}"))
    print(f"gradients differ by {check(dtype):.1e} of their norm\n")
    results = {"naive": [], "chunked": []}
    for _ in range(ROUNDS):
        for variant, found in results.items():
            found.append(in_a_process(__file__, "--measure", variant, dtype))
    rows = []
    for variant, found in results.items():
        pairs = list(zip(found, results["naive"], strict=True))
        seconds, busy = ([median([run[i] for run in found]), median([a[i] / b[i] for a, b in pairs])] for i in (0, 1))
        memory = median([run[2] for run in found])
        share = memory / median([run[2] for run in results["naive"]])
        figures = (*seconds, *busy, memory, share)
        rows.append([variant, *(f"{figure:.2f}" for figure in figures)])
    names = ["loss", "forward and backward, s", "of naive", "processor s", "of naive", "extra memory, GB", "of naive"]
    print(table(names, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "fp32")
