"""A model that answers everything with one given text: ``write_echo_model(folder, text)`` writes its folder.

Nothing is trained: the weights implement an automaton that maps the last k tokens to the next one.

- The embedding of a token is a random code of signs. The residual stream has a slot for the code of each of the last k tokens.
- Head j attends j tokens back, whatever the token: its queries and keys are constants, rotated against each other by j
  positions. It copies that token's code to slot j.
- The MLP has one neuron for each sequence of k tokens in the answer, which is active for exactly that sequence. It writes the
  code of the next token, and subtracts what neurons for shorter suffixes have written.
- In any other state the answer starts. That is the case after every prompt, unless it ends like the start of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from bumblebee.config import BumblebeeConfig
from bumblebee.model import Bumblebee
from bumblebee.tokenizer.template_tokenizer import TemplateTokenizer
from bumblebee.tokenizer.tokenizer import Tokenizer

CODE = 64  # signs of a token's code, and the width of a head
MIN_LOOKBACK, MAX_LOOKBACK = 4, 48  # tokens
MARGIN = 30.0  # pre-activation of an active neuron; inactive ones have at most minus this

Ids = tuple[int, ...]


def write_echo_model(folder: Path, text: str, tokenizer: Tokenizer | None = None, context: int = 4096) -> Path:
    """Write a model folder whose model answers every chat, and continues every text, with ``text``.

    Args:
        folder: where to write it.
        text: the answer; special tokens in it are encoded as special tokens.
        tokenizer: of the model; None trains one on the answer.
        context: context length in tokens.

    Raises:
        ValueError: a text with a long repetition.
    """
    tokenizer = tokenizer or Tokenizer.train([text], 400)
    end = tokenizer.chat_template.end_of_turn_id
    answer = [*TemplateTokenizer(tokenizer.backend).encode([(text, False)])[0], end]
    prompt = tokenizer.chat_template.apply([{"role": "user", "content": "?"}], None, True)
    following = _automaton(answer, prompt)
    model = _built(following, answer[0], tokenizer.vocab_size, context, [end])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _automaton(answer: list[int], prompt: list[int]) -> dict[Ids, int]:
    """Last tokens -> the next token, for every position in the answer."""
    for length in range(MIN_LOOKBACK, MAX_LOOKBACK + 1):
        following: dict[Ids, int] = {}
        if all(
            following.setdefault(ids, following_id) == following_id for ids, following_id in _states(answer, prompt, length)
        ):
            return following
    raise ValueError(f"the text repeats more than {MAX_LOOKBACK} tokens")


def _states(answer: list[int], prompt: list[int], length: int) -> Iterator[tuple[Ids, int]]:
    for at, id in enumerate(answer):
        yield tuple((prompt + answer[:at])[-length:]), id  # after a chat's prompt
        if 0 < at < length:
            yield tuple(answer[:at]), id  # after any text


def _built(following: dict[Ids, int], first: int, vocab_size: int, context: int, ends: list[int]) -> Bumblebee:
    lookback = max(map(len, following))
    # The residual stream: the codes of the last tokens, the code of the next token, and a constant one.
    size, out, one = CODE * (lookback + 1) + 1, slice(CODE * lookback, CODE * (lookback + 1)), -1
    config = BumblebeeConfig(
        vocab_size=vocab_size, hidden_size=size, intermediate_size=len(following), num_hidden_layers=1,
        num_attention_heads=lookback - 1, num_key_value_heads=lookback - 1, head_dim=CODE, max_position_embeddings=context,
        rope_theta=10_000.0, tie_word_embeddings=False, attention_bias=True, eos_token_id=ends,
    )  # fmt: skip
    model = Bumblebee(config)
    codes, distance = _codes(vocab_size)
    for weight in model.parameters():
        weight.data.zero_()
    block = model.model.layers[0]
    embedding = model.model.embed_tokens.weight.data
    embedding[:, :CODE], embedding[:, out], embedding[:, one] = codes, codes[first], 1
    # All embeddings have the same norm, so these weights undo the normalization.
    block.input_layernorm.weight.data.fill_(math.sqrt((2 * CODE + 1) / size))
    block.post_attention_layernorm.weight.data.fill_(math.sqrt((CODE * (lookback + 1) + 1) / size))
    model.model.norm.weight.data.fill_(0.8)  # confident at a temperature of 2, but weaker than a bias of 100
    model.lm_head.weight.data[:, out] = codes
    _look_back(block.self_attn, lookback, config.rope_theta)
    _follow(block.mlp, following, first, codes, distance, out)
    return model


def _codes(number: int) -> tuple[torch.Tensor, float]:
    """(number, CODE) signs, and the minimum difference between CODE and the product of any two codes."""
    codes = torch.randint(0, 2, (number, CODE), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    products = codes @ codes.T - 2 * CODE * torch.eye(number)
    return codes, CODE - products.max().item()


def _look_back(attention: torch.nn.Module, lookback: int, theta: float) -> None:
    """Head j - 1 copies the code of the token j positions back."""
    frequencies = theta ** (-torch.arange(0, CODE, 2) / CODE)  # radians per position
    strength = 30.0
    for j in range(1, lookback):
        head = slice((j - 1) * CODE, j * CODE)
        attention.q_proj.bias.data[head] = strength * torch.cat([torch.ones(CODE // 2), torch.zeros(CODE // 2)])
        attention.k_proj.bias.data[head] = strength * torch.cat([(j * frequencies).cos(), (j * frequencies).sin()])
        attention.v_proj.weight.data[head, :CODE] = torch.eye(CODE)
        attention.o_proj.weight.data[j * CODE : (j + 1) * CODE, head] = torch.eye(CODE)


def _follow(
    mlp: torch.nn.Module, following: dict[Ids, int], first: int, codes: torch.Tensor, distance: float, out: slice
) -> None:
    """One neuron for each state of the automaton."""
    scale = 2 * MARGIN / distance
    for neuron, (ids, next_id) in enumerate(following.items()):
        for back, id in enumerate(reversed(ids)):
            mlp.gate_proj.weight.data[neuron, back * CODE : (back + 1) * CODE] = scale * codes[id]
        mlp.gate_proj.weight.data[neuron, -1] = -scale * (CODE * len(ids) - distance / 2)
        mlp.up_proj.weight.data[neuron, -1] = 1 / MARGIN
        shorter = (following[ids[start:]] for start in range(1, len(ids)) if ids[start:] in following)
        mlp.down_proj.weight.data[out, neuron] = codes[next_id] - codes[next(shorter, first)]
