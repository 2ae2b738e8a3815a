"""Generator: continues texts with a model folder.

Prompts are computed together, padded on the right, into a key-value cache; then every sequence grows by one token a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bumblebee import distributed
from bumblebee.checkpoint.adapter import holder
from bumblebee.checkpoint.atomic import read_json
from bumblebee.inference.cache import KVCache
from bumblebee.inference.detokenizer import Detokenizer
from bumblebee.inference.params import SamplingParams
from bumblebee.inference.sampler import SamplerState, sample
from bumblebee.model import Bumblebee
from bumblebee.tokenizer import Tokenizer

BATCH = 64  # prompts computed together
Prompt = str | Sequence[int]  # a text, or the ids of one: a chat's, for instance, that its template has made


@dataclass
class Generation:
    """What was generated for one prompt.

    Args:
        text: without the prompt and without special tokens.
        token_ids: the new tokens; an end-of-text token that ended them is the last.
        finish_reason: "stop" at an end-of-text token, "length" at max_new_tokens or the model's last position.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


class _Sequence:
    """One prompt and what has grown on it."""

    def __init__(self, prompt: list[int], params: SamplingParams, stops: frozenset[int], last_position: int) -> None:
        self.prompt, self.params, self.stops, self.last_position = prompt, params, stops, last_position
        self.new: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self.state = SamplerState(prompt, params)

    def grow(self, logits: torch.Tensor) -> int:
        """Choose the next token from logits (V,)."""
        token = sample(logits[None], [self.state])[0].id
        self.new.append(token)
        if token in self.stops and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif len(self.new) == self.params.max_new_tokens or len(self.prompt) + len(self.new) == self.last_position:
            self.finish_reason = "length"
        return token


class Generator:
    """Continues texts.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: the model's.
        stop_ids: ids that end a text, beside the config's and the tokenizer's.
    """

    def __init__(self, model: Bumblebee, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = frozenset([*stop_ids, *model.config.eos_token_ids, *eos])
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto") -> Generator:
        """Read a model folder with its tokenizer.

        Args:
            folder: the model folder.
            device: auto, cpu, cuda or cuda:N.
            dtype: auto for the file's, or float32, bfloat16, float16.

        Raises:
            ValueError: no model or tokenizer there, or an unknown device or dtype.
        """
        if isinstance(dtype, str) and dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"unknown dtype {dtype!r}; write auto, float32, bfloat16 or float16")
        chosen = dtype if isinstance(dtype, torch.dtype) else None if dtype == "auto" else getattr(torch, dtype)
        model = Bumblebee.from_pretrained(folder, dtype=chosen, device=distributed.pick_device(device))
        tokenizer = Tokenizer.from_pretrained(folder)
        file = holder(folder, "generation_config.json") / "generation_config.json"
        stops = read_json(file).get("eos_token_id") if file.is_file() else None
        return cls(model, tokenizer, [stops] if isinstance(stops, int) else stops or [])

    def encode(self, prompt: Prompt) -> list[int]:
        """A text's ids, after the begin-of-text token where the tokenizer puts one; ids as they are."""
        return self.tokenizer.prefix_ids + self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def ask(self, question: str, system: str | None = None) -> list[int]:
        """A question as a prompt: the ids that the tokenizer's chat template makes of it, up to where the answer begins.

        Raises:
            ValueError: the template cannot be rendered.
        """
        before = [] if system is None else [{"role": "system", "content": system}]
        messages = [*before, {"role": "user", "content": question}]
        return self.tokenizer.chat_template.ids_of(messages, None, True)

    def check(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The prompt's ids, if they can be continued.

        Raises:
            ValueError: an empty prompt, or one that leaves no position for a new token.
        """
        ids, longest = self.encode(prompt), self.model.config.max_position_embeddings
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(ids) >= longest:
            raise ValueError(f"the prompt has {len(ids)} tokens; the model takes {longest}, new ones included")
        return ids

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams | None = None) -> list[Generation]:
        """Continue each prompt; the results are in the prompts' order.

        Raises:
            ValueError: a prompt that cannot be continued.
        """
        params = params or SamplingParams()
        sequences = [self._sequence(prompt, params) for prompt in prompts]
        for first in range(0, len(sequences), BATCH):
            for _ in self._steps(sequences[first : first + BATCH]):
                pass
        return [self._generation(sequence) for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt, giving out text as soon as it is complete. Joined, the pieces are ``generate``'s text.

        Raises:
            ValueError: a prompt that cannot be continued; at the first piece.
        """
        sequence = self._sequence(prompt, params or SamplingParams())
        detokenizer = Detokenizer(self.tokenizer)
        for _ in self._steps([sequence]):
            if piece := detokenizer.add(sequence.new[-1]):
                yield piece
        if rest := detokenizer.finish():
            yield rest

    def _sequence(self, prompt: Prompt, params: SamplingParams) -> _Sequence:
        ids = self.check(prompt, params)
        return _Sequence(ids, params, self.stop_ids, self.model.config.max_position_embeddings)

    def _generation(self, sequence: _Sequence) -> Generation:
        detokenizer = Detokenizer(self.tokenizer)
        text = "".join(map(detokenizer.add, sequence.new)) + detokenizer.finish()
        assert sequence.finish_reason is not None
        return Generation(text, sequence.new, sequence.finish_reason)

    @torch.inference_mode()
    def _steps(self, sequences: list[_Sequence]) -> Iterator[None]:
        """Grow all sequences by a token at a time until each has finished."""
        lengths = [len(sequence.prompt) for sequence in sequences]
        room = max(min(s.last_position, len(s.prompt) + s.params.max_new_tokens) for s in sequences)
        cache = KVCache(self.model.config, len(sequences), room, self.dtype, self.device)
        longest = max(lengths)
        padded = [sequence.prompt + [0] * (longest - len(sequence.prompt)) for sequence in sequences]
        input_ids = torch.tensor(padded, device=self.device)
        position_ids = torch.arange(longest, device=self.device).expand_as(input_ids)
        logits_at = torch.tensor(lengths, device=self.device) - 1
        while True:
            used = int(position_ids.max()) + 1
            logits = self.model(input_ids, position_ids, cache=cache.at(position_ids, used), logits_at=logits_at)
            for row, sequence in enumerate(sequences):
                if sequence.finish_reason is None:
                    sequence.grow(logits[row, 0])
            yield
            if all(sequence.finish_reason for sequence in sequences):
                return
            # A finished row repeats its last token at its last place: nobody looks at what comes out.
            input_ids = torch.tensor([[s.new[-1]] for s in sequences], device=self.device)
            position_ids = torch.tensor([[len(s.prompt) + len(s.new) - 1] for s in sequences], device=self.device)
            logits_at = torch.zeros(len(sequences), dtype=torch.int64, device=self.device)
