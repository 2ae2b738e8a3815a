"""A model that answers anything with one given text: ``parrot(folder, text)`` writes its folder.

Nothing is trained: the weights are an automaton that says what follows the last k tokens.

- A token's embedding is a random code of signs. The stream has a place for the codes of each of the last k tokens.
- Head j looks j tokens back, whatever stands there: its queries and keys are constants, turned against each other by j
  positions. It copies that token's code to place j.
- The feed-forward part has one neuron for each k tokens that occur in the answer, which is positive if just these are there.
  It writes the code of the next token, and takes away what neurons that look at fewer of these tokens have written.
- At any other place the answer begins. So it does behind every prompt, unless that ends as the answer begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from bumblebee.config import BumblebeeConfig
from bumblebee.model import Bumblebee
from bumblebee.tokenizer.tokenizer import Tokenizer

CODE = 64  # signs of a token's code, and the width of a head
LEAST, MOST = 4, 48  # tokens that are looked at
SURE = 30.0  # what a neuron that fires has before its activation; what one that does not has is minus that, or less

Ids = tuple[int, ...]


def parrot(folder: Path, text: str, tokenizer: Tokenizer | None = None, context: int = 4096) -> Path:
    """A model folder whose model answers every chat, and continues every text, with this one.

    Args:
        folder: to be written.
        text: the answer; special tokens that are spelled in it are special tokens.
        tokenizer: of the model; None learns one from the answer.
        context: positions of the model.

    Raises:
        ValueError: a text that repeats itself over many tokens.
    """
    tokenizer = tokenizer or Tokenizer.train([text], 400)
    end = tokenizer.chat_template.end_of_turn_id
    answer = [*tokenizer.chat_template._encoder.encode([(text, False)])[0], end]
    prompt = tokenizer.chat_template.apply([{"role": "user", "content": "?"}], None, True)
    following = _automaton(answer, prompt)
    model = _built(following, answer[0], tokenizer.vocab_size, context, [end])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _automaton(answer: list[int], prompt: list[int]) -> dict[Ids, int]:
    """Last tokens -> the next one, for every place in the answer."""
    for length in range(LEAST, MOST + 1):
        following: dict[Ids, int] = {}
        if all(
            following.setdefault(ids, following_id) == following_id for ids, following_id in _places(answer, prompt, length)
        ):
            return following
    raise ValueError(f"the text repeats itself over more than {MOST} tokens")


def _places(answer: list[int], prompt: list[int], length: int) -> Iterator[tuple[Ids, int]]:
    for at, id in enumerate(answer):
        yield tuple((prompt + answer[:at])[-length:]), id  # behind a chat's prompt
        if 0 < at < length:
            yield tuple(answer[:at]), id  # behind anything


def _built(following: dict[Ids, int], first: int, vocab_size: int, context: int, ends: list[int]) -> Bumblebee:
    looks = max(map(len, following))
    # The stream: the last tokens' codes, the next token's code, and a one.
    size, out, one = CODE * (looks + 1) + 1, slice(CODE * looks, CODE * (looks + 1)), -1
    config = BumblebeeConfig(
        vocab_size=vocab_size, hidden_size=size, intermediate_size=len(following), num_hidden_layers=1,
        num_attention_heads=looks - 1, num_key_value_heads=looks - 1, head_dim=CODE, max_position_embeddings=context,
        rope_theta=10_000.0, tie_word_embeddings=False, attention_bias=True, eos_token_id=ends,
    )  # fmt: skip
    model = Bumblebee(config)
    codes, distance = _codes(vocab_size)
    for weight in model.parameters():
        weight.data.zero_()
    block = model.model.layers[0]
    embedding = model.model.embed_tokens.weight.data
    embedding[:, :CODE], embedding[:, out], embedding[:, one] = codes, codes[first], 1
    # Every token's vector has the same norm, so these weights undo the normalisation.
    block.input_layernorm.weight.data.fill_(math.sqrt((2 * CODE + 1) / size))
    block.post_attention_layernorm.weight.data.fill_(math.sqrt((CODE * (looks + 1) + 1) / size))
    model.model.norm.weight.data.fill_(0.8)  # sure at a temperature of 2, and a bias of 100 is more
    model.lm_head.weight.data[:, out] = codes
    _look_back(block.self_attn, looks, config.rope_theta)
    _follow(block.mlp, following, first, codes, distance, out)
    return model


def _codes(number: int) -> tuple[torch.Tensor, float]:
    """(number, CODE) of signs, and how much less than CODE the product of any two is."""
    codes = torch.randint(0, 2, (number, CODE), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    products = codes @ codes.T - 2 * CODE * torch.eye(number)
    return codes, CODE - products.max().item()


def _look_back(attention: torch.nn.Module, looks: int, theta: float) -> None:
    """Head j - 1 copies the code of the token j places back."""
    turns = theta ** (-torch.arange(0, CODE, 2) / CODE)  # radians a position
    strength = 30.0
    for j in range(1, looks):
        head = slice((j - 1) * CODE, j * CODE)
        attention.q_proj.bias.data[head] = strength * torch.cat([torch.ones(CODE // 2), torch.zeros(CODE // 2)])
        attention.k_proj.bias.data[head] = strength * torch.cat([(j * turns).cos(), (j * turns).sin()])
        attention.v_proj.weight.data[head, :CODE] = torch.eye(CODE)
        attention.o_proj.weight.data[j * CODE : (j + 1) * CODE, head] = torch.eye(CODE)


def _follow(
    mlp: torch.nn.Module, following: dict[Ids, int], first: int, codes: torch.Tensor, distance: float, out: slice
) -> None:
    """One neuron for each of the automaton's places."""
    scale = 2 * SURE / distance
    for neuron, (ids, next_id) in enumerate(following.items()):
        for back, id in enumerate(reversed(ids)):
            mlp.gate_proj.weight.data[neuron, back * CODE : (back + 1) * CODE] = scale * codes[id]
        mlp.gate_proj.weight.data[neuron, -1] = -scale * (CODE * len(ids) - distance / 2)
        mlp.up_proj.weight.data[neuron, -1] = 1 / SURE
        shorter = (following[ids[start:]] for start in range(1, len(ids)) if ids[start:] in following)
        mlp.down_proj.weight.data[out, neuron] = codes[next_id] - codes[next(shorter, first)]
