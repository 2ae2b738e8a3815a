"""Measure the cost of a mixture of experts against a dense layer of equal active width, and against transformers' block.

    python benchmarks/moe.py [fp32|bf16]

8 experts 704 wide, top-2 routing, hidden size 512, 2048 tokens, forward and backward. Takes half a minute.

The dense layer multiplies as many weights per token, so the difference is the price of routing: the router, sorting, and
smaller matmuls. Outputs and gradients are compared with transformers' first. The variants run in turn, and CPU time is
measured, which other load on the machine disturbs least. Ratios are medians over the rounds. Each round has new tokens, as in
training: the number of rows per expert changes, and in bf16 oneDNN compiles a kernel for each number.
"""

from __future__ import annotations

import time

from common import header, median, parser, table

TOKENS, HIDDEN, EXPERT_WIDTH, EXPERTS, TOP_K, ROUNDS = 2048, 512, 704, 8, 2, 15


def make_modules(dtype: str) -> dict:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from bumblebee.nn.mlp import GatedMLP
    from bumblebee.nn.moe import mixture_of_experts

    torch.manual_seed(0)
    ours = mixture_of_experts(HIDDEN, EXPERT_WIDTH, EXPERTS, TOP_K)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": EXPERT_WIDTH,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
    }
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
    modules = {"dense": GatedMLP(HIDDEN, TOP_K * EXPERT_WIDTH), "Bumblebee": ours, **blocks}
    return {name: module.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]) for name, module in modules.items()}


def make_batch(dtype: str, seed: int):
    """Input and output gradient."""
    import torch

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    torch.manual_seed(seed)
    x, grad = torch.randn(1, TOKENS, HIDDEN).to(torch_dtype).requires_grad_(), torch.randn(1, TOKENS, HIDDEN).to(torch_dtype)
    return x, grad


def max_difference(ours, theirs) -> float:
    """The largest difference of outputs and gradients, each relative to its own maximum."""
    results = []
    for module in (ours, theirs):
        x, grad = make_batch("fp32", seed=0)
        module.zero_grad()
        out = module(x)
        out.backward(grad)
        results.append([out.detach(), x.grad, *(parameter.grad for _, parameter in sorted(module.named_parameters()))])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def cpu_seconds(module, dtype: str, seed: int) -> float:
    x, grad = make_batch(dtype, seed)
    module.zero_grad()
    started = time.process_time()
    module(x).backward(grad)
    return time.process_time() - started


def main(dtype: str) -> None:
    print(header(f"{EXPERTS} experts, top-{TOP_K} routing of {TOKENS} tokens, {dtype}"))
    modules = make_modules(dtype)
    if dtype == "fp32":  # in bf16 transformers rounds the router, so routing may differ
        peers = [module for name, module in modules.items() if name.startswith("transformers")]
        worst = max(max_difference(modules["Bumblebee"], peer) for peer in peers)
        print(f"Outputs and gradients differ from transformers' by at most {worst:.1e}.\n")
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for number in range(1 + ROUNDS):
        for name, module in modules.items():
            elapsed = cpu_seconds(module, dtype, number)
            if number:  # the first round is a warm-up
                seconds[name].append(elapsed)
    rows = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["dense"], strict=True)]
        rows.append([name, f"{1e3 * median(times):.0f}", f"{median(ratios):.2f}"])
    print(table(["MLP", "forward + backward, CPU ms", "vs dense"], rows))


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("dtype", nargs="?", choices=["fp32", "bf16"], default="fp32")
    main(arguments.parse_args().dtype)
