"""The bodies of requests: OpenAI's fields, checked strictly.

Choices made:
- A number is a number and nothing else is: no "1" for 1, no true for 1, no NaN. Bounds are those of OpenAI's reference.
- What OpenAI knows and this server does not do is refused by name (``unsupported``), and so are unknown names. A null is an
  absent field. Fields that only label a request (``user``) are accepted: without them the answer would be the same.
- Beside OpenAI's there are top_k, min_p, repetition_penalty and ignore_eos, which other servers have too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, PlainValidator, ValidationError, model_validator

from bumblebee.inference.sampling_params import BIASES, STOP_LENGTH, STOPS
from serve.api_errors import Fault, invalid, shown
from serve.strict import Strict, as_biases, as_list, as_parts, as_prompts, finite, json_object, only, wrong, wrong_field

INT64 = 2**63
MOST_CHOICES, MOST_TOOLS, MOST_MESSAGES = 128, 128, 2048
FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"

Body = TypeVar("Body", bound=BaseModel)
Bias = Annotated[float, Field(ge=-100, le=100)]
StopText = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
PromptList = Annotated[list[str | list[int]], PlainValidator(as_prompts)]


def parse(model: type[Body], raw: bytes) -> Body:
    """A checked body.

    Raises:
        Fault: 400; no JSON, no object, or something wrong with a field.
    """
    try:
        content = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is no valid JSON: {error}", None, "invalid_json") from None
    try:
        return model.model_validate(content, strict=True)
    except ValidationError as error:
        raise Fault.from_validation(error) from None


class TextPart(Strict):
    """A piece of a message's text."""

    unsupported = dict.fromkeys(("image_url", "input_audio", "file"), "the model reads text")

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(min_length=1)]


class FunctionCall(Strict):
    """What a call calls; the arguments are the JSON text of an object."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: Annotated[str, AfterValidator(json_object)]


class ToolCall(Strict):
    """A call that the assistant has made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn of a conversation."""

    unsupported = {
        "refusal": "there are no refusals, write it as content",
        "audio": "the model reads text",
        "function_call": "it is replaced by tool_calls",
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Parts | None, BeforeValidator(as_parts)] = None
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise wrong_field("wrong", "content", "must be a string or a list of text parts")
        if self.tool_calls and self.role != "assistant":
            raise wrong_field("wrong", "tool_calls", "belong to messages of the assistant")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            belongs = "is missing" if self.role == "tool" else "belongs to messages of a tool"
            raise wrong_field("wrong", "tool_call_id", belongs)
        return self

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return "".join(part.text for part in self.content or ())

    def plain(self) -> dict[str, Any]:
        """The message as chat templates know it; a developer's is the system's."""
        other = self.model_dump(include={"name", "tool_calls", "tool_call_id"}, exclude_none=True)
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text, **other}


def _answered(messages: list[Message]) -> list[Message]:
    """Results of tools belong to calls before them."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called.update(call.id for call in message.tool_calls or ())
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise wrong_field("wrong", (index, "tool_call_id"), f"{shown(message.tool_call_id)} is of no call before it")
    return messages


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES), AfterValidator(_answered)]


class Function(Strict):
    """A function that the model may call; the parameters are a JSON schema."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, AfterValidator(finite)] = None
    strict: Annotated[bool | None, only(False, "arguments are not held to the schema")] = None


class Tool(Strict):
    """What the model may use."""

    type: Literal["function"]
    function: Function


class StreamOptions(Strict):
    """How to stream."""

    unsupported = {"include_obfuscation": "chunks are sent as they are"}

    include_usage: bool | None = None


class TextFormat(Strict):
    """The only format of answers."""

    type: Literal["text"]


def _text_only(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema"):
        raise wrong('must be {"type": "text"}: answers are not held to a format', "unsupported")
    return value


def _auto_or_none(value: Any) -> Any:
    if value == "required" or isinstance(value, dict):
        raise wrong("must be 'auto' or 'none': a model cannot be made to call a tool", "unsupported")
    return value


class Sampling(Strict):
    """What both endpoints know."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT64 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=INT64 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[
        Annotated[dict[int, Bias], Field(max_length=BIASES)] | None,
        BeforeValidator(as_biases),
    ] = None
    stop: Annotated[
        Annotated[list[StopText], Field(max_length=STOPS)] | None,
        BeforeValidator(as_list),
    ] = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64 - 1)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _streams(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise wrong_field("wrong", "stream_options", "is only for requests with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    unsupported = {
        "audio": "answers are text",
        "function_call": "it is replaced by tool_choice",
        "functions": "it is replaced by tools",
        "metadata": "answers are not stored",
        "moderation": "nothing is moderated",
        "prediction": "there is no predicted output",
        "prompt_cache_options": "prompts are cached by their tokens",
        "prompt_cache_retention": "prompts are cached while there is room",
        "reasoning_effort": "models answer as they were trained to",
        "verbosity": "models answer as they were trained to",
        "web_search_options": "there is no search",
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Annotated[Literal["auto", "none"] | None, BeforeValidator(_auto_or_none)] = None
    parallel_tool_calls: Annotated[bool | None, only(True, "a model makes as many calls as it likes")] = None
    response_format: Annotated[TextFormat | None, BeforeValidator(_text_only)] = None
    modalities: list[Literal["text"]] | None = None
    store: Annotated[bool | None, only(False, "answers are not stored")] = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong_field("wrong", "top_logprobs", "is only for requests with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong_field("wrong", "max_tokens", "is the old name of max_completion_tokens: give one of them")
        names = [tool.function.name for tool in self.tools or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise wrong_field("wrong", "tools", f"has two functions named {min(twice)!r}")
        return self

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the model may call in its answer."""
        return [] if self.tool_choice == "none" else self.tools or []


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    unsupported = {"suffix": "models continue texts, they do not fill gaps"}

    prompt: PromptList
    best_of: Annotated[int | None, only(1, "ask for n answers and choose yourself")] = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @model_validator(mode="after")
    def _can_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise wrong_field("unsupported", "echo", "is not supported together with logprobs: prompts get none")
        return self


class TokenizeRequest(Strict):
    """The body of POST /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("must have either a prompt or messages")
        if self.tools and self.messages is None:
            raise wrong_field("wrong", "tools", "belong to messages")
        return self


class DetokenizeRequest(Strict):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, le=INT64 - 1)]]
