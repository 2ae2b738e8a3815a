"""From a checked body to what the engine computes: prompts as ids, and how to sample.

Choices made:
- What a request leaves open the server's defaults decide. max_tokens left open is 16 for a text, as in OpenAI's reference, and
  in a chat the rest of the context up to a bound: the cache is reserved for all of it, and others want some too.
- Sample k of a seeded request has a seed made of both, sample 0 the seed itself: asking for more samples changes none.
- tool_choice "none" leaves the tools out of the prompt: the model cannot call what it does not know.
- A chat ends also at its template's end of turn, which the folder of a base model may not name; ignore_eos ignores it too.
- A text of some megabytes takes a second to encode: call this in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bumblebee.inference.sampling_params import SamplingParams
from bumblebee.tokenizer.tokenizer import Tokenizer
from serve.api_errors import invalid, shown
from serve.chats import Chats
from serve.schemas import MOST_CHOICES, ChatRequest, CompletionRequest, Sampling, TokenizeRequest
from serve.tool_call_format import CallFormat

# max_tokens of requests that name none, unless the server has a default of its own.
CHAT_TOKENS, COMPLETION_TOKENS = 2048, 16
SMALLEST_TOP_P = 1e-9  # keeps the most likely token alone, as OpenAI's 0 does
# Fields that a body and SamplingParams both have.
SAME = (
    "temperature", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop",
    "seed", "ignore_eos",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One answer to be generated.

    Args:
        prompt: ids.
        params: how to choose the new ones.
        index: of the choice in the reply.
    """

    prompt: list[int]
    params: SamplingParams
    index: int


class Prompts:
    """Makes jobs of bodies.

    Args:
        tokenizer: the model's.
        context_length: positions of the model.
        vocab_size: rows of the model's embedding; the tokenizer may know fewer ids.
        defaults: for what requests leave open, except max_new_tokens.
        system_prompt: for conversations that bring none.
        max_new_tokens: for requests that do not say; None as described above.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        vocab_size: int,
        defaults: SamplingParams | None = None,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.defaults = defaults or SamplingParams()
        self.chats = Chats(tokenizer, system_prompt)
        self.max_new_tokens = max_new_tokens

    def chat(self, body: ChatRequest) -> list[Job]:
        """The n answers to a conversation.

        Raises:
            Fault: 400; the model cannot chat or cannot call tools, its template refuses the messages, the context is too
                short, an id is unknown.
        """
        ids = self.chats.ids(body.messages, body.callable_tools)
        params = self._params(body, None if not body.logprobs else body.top_logprobs or 0)
        spelled = self.calls.spelled if self.calls and body.callable_tools else ()
        params = params.ending_with(self.tokenizer.end_of_turn_ids)
        params = replace(params, spelled_ids=[*params.spelled_ids, *spelled])
        return self._jobs([ids], params, body, body.max_completion_tokens or body.max_tokens, CHAT_TOKENS)

    def completion(self, body: CompletionRequest) -> list[Job]:
        """The n continuations of each prompt, prompt by prompt.

        Raises:
            Fault: 400; an empty prompt or one that is too long, an id that is unknown, too many continuations.
        """
        if len(body.prompt) * (body.n or 1) > MOST_CHOICES:
            raise invalid(f"{len(body.prompt)} prompts with n = {body.n or 1} are more than {MOST_CHOICES} answers", "n")
        prompts = [self._prompt_ids(prompt) for prompt in body.prompt]
        return self._jobs(prompts, self._params(body, body.logprobs), body, body.max_tokens, COMPLETION_TOKENS)

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """The ids of a text or of a chat, as the model would be given them.

        Raises:
            Fault: 400; the model cannot chat, or its template refuses the messages.
        """
        if body.messages is not None:
            return self.chats.ids(body.messages, body.tools or [])
        assert body.prompt is not None
        return self.tokenizer.prompt_ids(body.prompt)

    def echo(self, prompt: str | list[int]) -> str:
        """The text of a prompt."""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    @property
    def calls(self) -> CallFormat | None:
        """How this model writes calls of tools; None if it does not, or in no way that is known here."""
        return self.chats.calls

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.prompt_ids(prompt)
            if not ids:
                raise invalid("prompt is empty: there is nothing to continue", "prompt")
            return ids
        self._require_known(prompt, "prompt")
        return prompt

    def _require_known(self, ids: Sequence[int], param: str) -> None:
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise invalid(f"{param}: {shown(index)} is no token id of this model, which has {self.vocab_size}", param)

    def _params(self, body: Sampling, logprobs: int | None) -> SamplingParams:
        self._require_known(list(body.logit_bias or ()), "logit_bias")
        given = {name: getattr(body, name) for name in SAME if getattr(body, name) is not None}
        if body.top_p is not None:
            given["top_p"] = max(body.top_p, SMALLEST_TOP_P)
        return replace(self.defaults, **given, logprobs=logprobs)

    def _jobs(
        self, prompts: list[list[int]], params: SamplingParams, body: Sampling, wanted: int | None, usual: int
    ) -> list[Job]:
        jobs: list[Job] = []
        for prompt in prompts:
            room = self._room(len(prompt), wanted, body)
            new = wanted or min(room, self.max_new_tokens or usual)
            for sample in range(body.n or 1):
                own = replace(params, max_new_tokens=new, seed=seed_of(params.seed, sample))
                jobs.append(Job(prompt, own, len(jobs)))
        return jobs

    def _room(self, used: int, wanted: int | None, body: Sampling) -> int:
        """Positions left behind a prompt."""
        room = self.context_length - used
        if room >= (wanted or 1):
            return room
        asked = f"{used} of the prompt and {wanted} new ones" if wanted else f"{used} of the prompt and at least one new one"
        said = f"This model's maximum context length is {self.context_length} tokens; this request has {asked}."
        raise invalid(said, "prompt" if isinstance(body, CompletionRequest) else "messages", "context_length_exceeded")


def seed_of(seed: int | None, sample: int) -> int | None:
    """The seed of one of several samples."""
    if seed is None or sample == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:8], "big") >> 1
