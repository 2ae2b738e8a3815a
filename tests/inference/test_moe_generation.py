"""Mixture-of-experts models generate the same tokens with the KV cache and ragged batches as without."""

from __future__ import annotations

import pytest
import torch

from bumblebee import Bumblebee, Generator, SamplingParams, Tokenizer

PROMPTS = ["The bee", "A", "In the garden there are many flowers, and the bees", "x y"]


@pytest.mark.parametrize(
    "options", [{}, {"router_bias_update_rate": 0.0, "n_shared_experts": 1, "mlp_only_layers": [0]}], ids=str
)
def test_greedy_moe_batch_matches_loop_without_cache(tiny, tokenizer_folder, options):
    torch.manual_seed(0)
    config = tiny(initializer_range=0.3, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, **options)
    model = Bumblebee(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    generator = Generator(model, Tokenizer.from_pretrained(tokenizer_folder))
    outs = generator.generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True))
    seen: set[int] = set()
    for prompt, out in zip(PROMPTS, outs, strict=True):
        ids = generator.encode(prompt)
        with torch.no_grad():
            for _ in range(12):
                ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
        assert out.token_ids == ids[-12:]
        seen.update(out.token_ids)
    assert len(seen) > 6, "a repeated token would prove little"
