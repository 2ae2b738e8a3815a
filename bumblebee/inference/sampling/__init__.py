"""From logits to the next token: sampling parameters, penalties and the sampler."""
