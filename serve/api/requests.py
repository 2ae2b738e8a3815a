"""Engine requests from checked bodies: chat rendering, tokenization and sampling parameters.

Choices made:
- The server's defaults apply to everything a request omits. max_tokens defaults to 16 for completions, as in OpenAI's
  reference, and for chats to the rest of the context up to a limit, because the cache is reserved for all of it. A larger one
  than the rest of the context is capped there: the completion ends with finish_reason "length".
- Special tokens that are spelled in a completion's prompt are special tokens, as in vLLM and llama.cpp, so that a rendered
  template can be sent. Those in a chat's messages are text: they come from the users of an application.
- Choice k of a seeded request has a seed derived from both, choice 0 the seed itself: a larger n changes no other choice.
- tool_choice "none" leaves the tools out of the prompt: the model cannot call what it does not see.
- A chat also stops at its template's end of turn, which the folder of a base model may not name, unless ignore_eos is set.
- A tool call that the template does not render is rejected. The name and the reasoning of a message are up to the template:
  agent libraries send both with every message, and most templates render neither.
- Tokenizing megabytes of text takes a second: call this in a thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.tokenizer.chat_template import ChatTemplate, with_system
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.tokenizer.tool_call_format import ToolCallFormat
from serve.api.errors import invalid, quoted
from serve.api.schemas import MAX_CHOICES, ChatRequest, CompletionRequest, GenerationRequest, Message, TokenizeRequest, Tool
from serve.sampling_fields import REQUEST_NAMES

# max_tokens of requests that omit it, unless the server sets max_new_tokens.
CHAT_MAX_TOKENS, COMPLETION_MAX_TOKENS = 2048, 16
MIN_TOP_P = 1e-9  # keeps only the most likely token, like OpenAI's 0
SET_ELSEWHERE = ("max_new_tokens", "logprobs", "spelled_ids")  # depend on more than the field of the request
SAMPLING_FIELDS = {name: field for name, field in REQUEST_NAMES.items() if name not in SET_ELSEWHERE}

TemplateMessage = dict[str, Any]  # a message as chat templates expect it
TemplateTool = dict[str, object]  # a tool as chat templates expect it


@dataclass(frozen=True)
class ChoiceRequest:
    """One choice of a response to generate.

    Args:
        prompt: token ids.
        params: sampling parameters.
        index: of the choice.
        prompt_logprobs: number of most likely tokens to return with the log-probability of each prompt token; None for neither.
        prompt_only: generate no token.
    """

    prompt: list[int]
    params: SamplingParams
    index: int
    prompt_logprobs: int | None = None
    prompt_only: bool = False


class ChatRenderer:
    """Renders conversations to prompt token ids.

    Args:
        tokenizer: the model's.
        system_prompt: for conversations without one.
    """

    def __init__(self, tokenizer: Tokenizer, system_prompt: str | None = None) -> None:
        self.tokenizer, self.system_prompt = tokenizer, system_prompt

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """The prompt for the next assistant message.

        Raises:
            APIError: 400; the model has no chat template or no tool calls, or the template rejects or drops something.
        """
        template = self._template
        if tools and self.tool_call_format is None:
            raise invalid("Tools are not supported: no tool-call format was detected in the model's chat template", "tools")
        tool_dicts = [tool.to_template() for tool in tools] or None
        original = with_system([message.to_template() for message in messages], self.system_prompt)
        rewritten = self.tool_call_format.rewrite(original) if self.tool_call_format else original
        try:
            _check_calls_rendered(template, rewritten, original, tool_dicts)
            return template.apply(rewritten, tool_dicts, True)
        except ValueError as error:
            raise invalid(str(error).removeprefix(f"{template.name_or_path}: "), "messages") from None

    @cached_property
    def tool_call_format(self) -> ToolCallFormat | None:
        """How the template writes tool calls; None if it does not, or in an unknown format."""
        try:
            return ToolCallFormat.detect(self.tokenizer)
        except ValueError:
            return None

    @property
    def _template(self) -> ChatTemplate:
        try:
            return self.tokenizer.chat_template
        except ValueError:
            message = "This model has no chat template; use /v1/completions instead"
            raise invalid(message, "messages", "no_chat_template") from None


def _check_calls_rendered(
    template: ChatTemplate, rewritten: list[TemplateMessage], original: list[TemplateMessage], tools: list[TemplateTool] | None
) -> None:
    """Raise if the template drops tool calls."""
    calls = dict.fromkeys(call["function"]["name"] for message in original for call in message.get("tool_calls", ()))
    if not calls:
        return
    text = template.render(rewritten, tools, True)
    if missing := [name for name in calls if name not in text]:
        raise ValueError(f"the model's chat template does not support tool calls ({missing[0]!r})")


class RequestBuilder:
    """Builds engine requests from request bodies.

    Args:
        tokenizer: the model's.
        context_length: maximum of prompt and completion tokens together.
        vocab_size: rows of the model's embedding; the tokenizer may know fewer ids.
        defaults: sampling defaults, except max_new_tokens.
        system_prompt: for conversations without one.
        max_new_tokens: default of max_tokens; None as described above.
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
        self.renderer = ChatRenderer(tokenizer, system_prompt)
        self.max_new_tokens = max_new_tokens

    @property
    def tool_call_format(self) -> ToolCallFormat | None:
        """How the model writes tool calls; None if it does not, or in an unknown format."""
        return self.renderer.tool_call_format

    def chat(self, body: ChatRequest) -> list[ChoiceRequest]:
        """The n choices of a chat completion.

        Raises:
            APIError: 400; as ``ChatRenderer.render``, the context length is exceeded, or a token id is invalid.
        """
        prompt = self.renderer.render(body.messages, body.callable_tools)
        params = self._params(body, None if not body.logprobs else body.top_logprobs or 0)
        marker_ids = self.tool_call_format.marker_ids if self.tool_call_format and body.callable_tools else ()
        params = params.ending_with(self.tokenizer.end_of_turn_ids)
        params = replace(params, spelled_ids=[*params.spelled_ids, *marker_ids])
        return self._choices([prompt], params, body, body.token_limit, CHAT_MAX_TOKENS)

    def completion(self, body: CompletionRequest) -> list[ChoiceRequest]:
        """The n choices for each prompt, ordered by prompt.

        Raises:
            APIError: 400; an empty or too long prompt, an invalid token id, or too many choices.
        """
        if len(body.prompt) * (body.n or 1) > MAX_CHOICES:
            message = f"Too many choices: {len(body.prompt)} prompts with n = {body.n or 1}, at most {MAX_CHOICES} in total"
            raise invalid(message, "n")
        prompts = [self._prompt_ids(prompt, body) for prompt in body.prompt]
        return self._choices(prompts, self._params(body, body.logprobs), body, body.token_limit, COMPLETION_MAX_TOKENS)

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """The token ids of a text or of a chat, as the model receives them.

        Raises:
            APIError: 400; as ``ChatRenderer.render``.
        """
        if body.messages is not None:
            return self.renderer.render(body.messages, body.tools or [])
        assert body.prompt is not None
        return self._encode(body.prompt, body)

    def echo(self, prompt: str | list[int]) -> str:
        """The text of a prompt, special tokens included."""
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special_tokens=False)

    def _encode(self, text: str, body: CompletionRequest | TokenizeRequest) -> list[int]:
        return self.tokenizer.prompt_ids(text, body.parse_special is not False, body.add_special_tokens is not False)

    def _prompt_ids(self, prompt: str | list[int], body: CompletionRequest) -> list[int]:
        if isinstance(prompt, str):
            ids = self._encode(prompt, body)
            if not ids:
                raise invalid("Invalid value for 'prompt': must not be empty", "prompt")
            return ids
        self._check_token_ids(prompt, "prompt")
        return prompt

    def _check_token_ids(self, ids: Sequence[int], param: str) -> None:
        for id in ids:
            if not 0 <= id < self.vocab_size:
                rule = f"token id {quoted(id)} is not in the vocabulary of {self.vocab_size} tokens"
                raise invalid(f"Invalid value for '{param}': {rule}", param)

    def _params(self, body: GenerationRequest, logprobs: int | None) -> SamplingParams:
        self._check_token_ids(list(body.logit_bias or ()), "logit_bias")
        self._check_token_ids(body.stop_token_ids or (), "stop_token_ids")
        values = {name: getattr(body, field) for name, field in SAMPLING_FIELDS.items()}
        explicit = {name: value for name, value in values.items() if value is not None}
        if body.top_p is not None:
            explicit["top_p"] = max(body.top_p, MIN_TOP_P)
        if body.top_k is not None:
            explicit["top_k"] = max(body.top_k, 0)  # -1 keeps all tokens, as in vLLM
        return replace(self.defaults, **explicit, logprobs=logprobs)

    def _choices(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        body: GenerationRequest,
        max_tokens: int | None,
        default_max_tokens: int,
    ) -> list[ChoiceRequest]:
        choices: list[ChoiceRequest] = []
        prompt_only, scored = max_tokens == 0, _prompt_logprobs(body)
        for prompt in prompts:
            remaining = self._remaining(len(prompt), body, 0 if prompt_only else 1)
            limit = max_tokens or max(self.max_new_tokens or default_max_tokens, params.min_new_tokens)
            new_tokens = min(limit, max(remaining, 1))
            for sample in range(body.n or 1):
                own = replace(params, max_new_tokens=new_tokens, seed=sample_seed(params.seed, sample))
                choices.append(ChoiceRequest(prompt, own, len(choices), scored, prompt_only))
        return choices

    def _remaining(self, prompt_tokens: int, body: GenerationRequest, minimum: int) -> int:
        """Tokens of the context that are left after a prompt, at least ``minimum``."""
        remaining = self.context_length - prompt_tokens
        if remaining >= minimum:
            return remaining
        param = "prompt" if isinstance(body, CompletionRequest) else "messages"
        message = (
            f"This model's maximum context length is {self.context_length} tokens, but you requested at least"
            f" {prompt_tokens + minimum} tokens ({prompt_tokens} in the {param}, at least {minimum} in the completion)"
        )
        raise invalid(message, param, "context_length_exceeded")


def _prompt_logprobs(body: GenerationRequest) -> int | None:
    """Number of most likely tokens to return for each prompt token; None if the prompt needs no log-probabilities."""
    echoed = body.logprobs if isinstance(body, CompletionRequest) and body.echo else None
    counts = [count for count in (body.prompt_logprobs, echoed) if count is not None]
    return max(counts, default=None)


def sample_seed(seed: int | None, sample: int) -> int | None:
    """The seed of choice number ``sample``."""
    if seed is None or sample == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:8], "big") >> 1
