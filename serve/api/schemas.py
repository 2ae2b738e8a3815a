"""Request schemas: OpenAI's fields, strictly validated.

Choices made:
- No type coercion: neither "1" nor true is accepted for 1, and NaN is rejected. Bounds are those of OpenAI's reference.
- OpenAI's fields that this server does not implement are rejected by name (``unsupported``), and so are unknown fields. Null
  means absent, also for unknown fields. Fields that only label a request (``user``) are accepted, because they would not change
  the response.
- An assistant message is accepted as clients return it: what OpenAI's and LiteLLM's clients add to a response (annotations,
  provider_specific_fields, parsed values) is no part of the conversation and is ignored.
- Additional fields, as in other servers: top_k, min_p, repetition_penalty, ignore_eos, min_tokens, stop_token_ids,
  include_stop_str_in_output, add_special_tokens, parse_special and prompt_logprobs.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainValidator, ValidationError, model_validator

from bumblebee.inference.sampling.sampling_params import MAX_BIASES, MAX_STOP_LENGTH, MAX_STOPS
from serve.api.errors import APIError, invalid, quoted
from serve.api.schema_types import (
    StrictModel,
    as_biases,
    as_list,
    as_parts,
    as_prompts,
    field_error,
    finite,
    json_object,
    only,
    value_error,
)

INT64 = 2**63
MAX_CHOICES, MAX_TOOLS, MAX_MESSAGES, MAX_STOP_IDS = 128, 128, 2048, 128
FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
# Fields of messages that only a model writes.
ASSISTANT_FIELDS = (
    "tool_calls", "refusal", "reasoning_content", "reasoning", "annotations", "provider_specific_fields", "parsed",
)  # fmt: skip

Body = TypeVar("Body", bound=BaseModel)
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
PromptList = Annotated[list[str | list[int]], PlainValidator(as_prompts)]


def parse(model: type[Body], raw: bytes) -> Body:
    """Parse and validate a request body.

    Raises:
        APIError: 400; not a JSON object, or an invalid field.
    """
    try:
        content = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The request body is not valid JSON: {error}", None, "invalid_json") from None
    try:
        return model.model_validate(content, strict=True)
    except ValidationError as error:
        raise APIError.from_validation(error) from None


class TextPart(StrictModel):
    """A part of a message's text."""

    unsupported = dict.fromkeys(("image_url", "input_audio", "file"), "only text input is supported")

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1)]


class FunctionCall(StrictModel):
    """The name and arguments of a tool call; the arguments are a JSON object encoded as a string."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: Annotated[str, AfterValidator(json_object)]
    parsed_arguments: object = None  # from OpenAI's client
    provider_specific_fields: dict[str, object] | None = None


class ToolCall(StrictModel):
    """A tool call of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Annotated[int, Field(ge=0)] | None = None  # of a call that was streamed
    provider_specific_fields: dict[str, object] | None = None

    def to_template(self) -> dict[str, object]:
        """The call as chat templates expect it."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Message(StrictModel):
    """A message of a conversation. An assistant message may have all fields of a response that a client returns."""

    unsupported = {"audio": "only text input is supported", "function_call": "replaced by tool_calls"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Parts | None, BeforeValidator(as_parts)] = None
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's and OpenRouter's name of reasoning_content
    annotations: list[dict[str, object]] | None = None
    provider_specific_fields: dict[str, object] | None = None  # from LiteLLM
    parsed: object = None  # from OpenAI's client

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.role != "assistant":
            for name in ASSISTANT_FIELDS:
                if getattr(self, name):
                    raise field_error(name, "only allowed in assistant messages")
        if self.content is None and not any((self.tool_calls, self.refusal, self.reasoning_content, self.reasoning)):
            raise field_error("content", "must be a string or a list of text parts")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            rule = "required in tool messages" if self.role == "tool" else "only allowed in tool messages"
            raise field_error("tool_call_id", rule)
        return self

    @property
    def text(self) -> str:
        """The content, its parts joined, or the refusal that stands in its place."""
        return self.refusal or "" if self.content is None else "".join(part.text for part in self.content)

    def to_template(self) -> dict[str, object]:
        """The message as chat templates expect it, with the role developer replaced by system."""
        optional = {
            "name": self.name,
            "tool_calls": [call.to_template() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
        }
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text, **{name: value for name, value in optional.items() if value}}


def _check_tool_results(messages: list[Message]) -> list[Message]:
    """Check that each tool result refers to an earlier tool call."""
    call_ids: set[str] = set()
    for index, message in enumerate(messages):
        call_ids.update(call.id for call in message.tool_calls or ())
        if message.tool_call_id is not None and message.tool_call_id not in call_ids:
            raise field_error((index, "tool_call_id"), f"no earlier tool call has the id {quoted(message.tool_call_id)}")
    return messages


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_check_tool_results)]


class Function(StrictModel):
    """A function that the model may call; its parameters are a JSON schema."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: Annotated[dict[str, object] | None, AfterValidator(finite)] = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def to_template(self) -> dict[str, object]:
        """The tool as chat templates expect it. ``strict`` is left out: it addresses the server, not the model."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[bool | None, only(False, "chunks are not padded")] = None


class TextFormat(StrictModel):
    """The only supported response format."""

    type: Literal["text"]


def _text_only(value: object) -> object:
    if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema"):
        raise value_error('must be {"type": "text"}, because structured output is not supported', "unsupported_value")
    return value


def _auto_or_none(value: object) -> object:
    if value == "required" or isinstance(value, dict):
        raise value_error("must be 'auto' or 'none', because tool calls cannot be forced", "unsupported_value")
    return value


class GenerationRequest(StrictModel):
    """Fields of both endpoints."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[
        Annotated[dict[int, Bias], Field(max_length=MAX_BIASES)] | None,
        BeforeValidator(as_biases),
    ] = None
    stop: Annotated[
        Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None,
        BeforeValidator(as_list),
    ] = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64 - 1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64 - 1)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "only allowed with stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise field_error("prompt_logprobs", "not available in a stream; use echo with logprobs", "unsupported")
        return self

    @model_validator(mode="after")
    def _check_min_tokens(self) -> GenerationRequest:
        if self.min_tokens and self.token_limit is not None and self.min_tokens > self.token_limit:
            raise field_error("min_tokens", f"must be at most max_tokens, {self.token_limit}, got {self.min_tokens}")
        return self

    @property
    def token_limit(self) -> int | None:
        """The maximum number of tokens to generate, if the request sets it."""
        return self.max_tokens

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the token usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    unsupported = {
        "audio": "only text output is supported",
        "function_call": "replaced by tool_choice",
        "functions": "replaced by tools",
        "metadata": "completions are not stored",
        "moderation": "content is not moderated",
        "prediction": "predicted outputs are not supported",
        "prompt_cache_options": "prefix caching needs no options",
        "prompt_cache_retention": "cached prompts are evicted when the cache is full",
        "reasoning_effort": "the reasoning effort cannot be controlled",
        "verbosity": "the verbosity cannot be controlled",
        "web_search_options": "web search is not supported",
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Literal["auto", "none"] | None, BeforeValidator(_auto_or_none)] = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[TextFormat | None, BeforeValidator(_text_only)] = None
    modalities: list[Literal["text"]] | None = None
    store: Annotated[bool | None, only(False, "completions are not stored")] = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check_consistency(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "only allowed with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise field_error("max_tokens", "is the deprecated name of max_completion_tokens; set only one of them")
        names = [tool.function.name for tool in self.tools or ()]
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise field_error("tools", f"duplicate function name {min(duplicates)!r}")
        return self

    @property
    def token_limit(self) -> int | None:
        """The maximum number of tokens to generate, if the request sets it."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model may call in its response."""
        return [] if self.tool_choice == "none" else self.tools or []


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    unsupported = {"suffix": "fill-in-the-middle is not supported"}

    prompt: PromptList
    max_tokens: Annotated[int, Field(ge=0, le=INT64 - 1)] | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    best_of: Annotated[int | None, only(1, "completions are not ranked; use n")] = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class TokenizeRequest(StrictModel):
    """The body of POST /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _check_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise value_error("must have either prompt or messages")
        if self.tools and self.messages is None:
            raise field_error("tools", "only allowed with messages")
        for name in ("add_special_tokens", "parse_special"):
            if getattr(self, name) is not None and self.prompt is None:
                raise field_error(name, "only allowed with prompt: the special tokens of a chat are its template's")
        return self


class DetokenizeRequest(StrictModel):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=INT64 - 1)]]
    skip_special_tokens: bool | None = None
