"""What do 8 experts, 2 for each token, cost beside one dense layer as wide as two of them, and beside transformers' block?

    python benchmarks/moe.py [bf16]     hidden size 512, experts 704 wide, 2048 tokens, forward and backward; half a minute

The dense layer multiplies as many weights for each token, so what is above its time is the price of routing: the router,
sorting, and smaller matrix products. Before anything is measured, outputs and gradients of ours and transformers' are compared.
All take turns, and processor time is what is told: a busy machine disturbs it least. Ratios are medians of the turns' own.
Each turn has other tokens, as in training: experts then have other numbers of rows, and in bf16 the CPU's library makes a
kernel for each number that it meets.
"""

from __future__ import annotations

import sys
import time

from common import header, median, table

TOKENS, HIDDEN, INNER, EXPERTS, CHOSEN, ROUNDS = 2048, 512, 704, 8, 2, 15


def parts(dtype: str) -> dict:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from bumblebee.nn.mlp import GatedMLP
    from bumblebee.nn.moe import mixture_of_experts

    torch.manual_seed(0)
    ours = mixture_of_experts(HIDDEN, INNER, EXPERTS, CHOSEN)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
    blocks = {}
    for name in ("eager", "grouped_mm"):
        config = MixtralConfig(**sizes)
        config._experts_implementation = name
        blocks[f"transformers, {name}"] = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.02)
    for block in blocks.values():
        block.load_state_dict(ours.state_dict())
    found = {"dense": GatedMLP(HIDDEN, CHOSEN * INNER), "ours": ours, **blocks}
    return {name: part.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]) for name, part in found.items()}


def batch(dtype: str, seed: int):
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    torch.manual_seed(seed)
    x, slopes = torch.randn(1, TOKENS, HIDDEN).to(kind).requires_grad_(), torch.randn(1, TOKENS, HIDDEN).to(kind)
    return x, slopes


def difference(ours, theirs) -> float:
    """The largest difference of outputs and gradients, each over its own largest number."""
    results = []
    for part in (ours, theirs):
        x, slopes = batch("fp32", seed=0)
        part.zero_grad()
        out = part(x)
        out.backward(slopes)
        results.append([out.detach(), x.grad, *(parameter.grad for _, parameter in sorted(part.named_parameters()))])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def timed(part, dtype: str, seed: int) -> float:
    x, slopes = batch(dtype, seed)
    part.zero_grad()
    started = time.process_time()
    part(x).backward(slopes)
    return time.process_time() - started


def main(dtype: str) -> None:
    print(header(f"{EXPERTS} experts, {CHOSEN} for each of {TOKENS} tokens, {dtype}"))
    found = parts(dtype)
    theirs = [name for name in found if name.startswith("transformers")]
    if dtype == "fp32":  # in bf16 a choice may fall differently: their router is rounded
        worst = max(difference(found["ours"], found[name]) for name in theirs)
        print(f"outputs and gradients differ from transformers' by {worst:.1e} at most\n")
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(1 + ROUNDS):
        for name, part in found.items():
            taken = timed(part, dtype, turn)
            if turn:  # the first warms up
                seconds[name].append(taken)
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["dense"], strict=True)]
        rows.append([name, f"{1e3 * median(times):.0f}", f"{median(ratios):.2f}"])
    print(table(["feed-forward part", "forward and backward, processor ms", "of dense"], rows))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "fp32")
