"""Agent and chat libraries against a running server: tools, and conversations continued with the library's own messages.

A library that is not installed is skipped; the extra ``clients`` installs those that work with the versions in constraints.txt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from helpers.echo_model import write_echo_model
from helpers.server_process import Running, events, serving

pytestmark = pytest.mark.slow

CALLS = "".join(f'\n<tool_call>\n{{"name": "fly", "arguments": {{"to": "花", "at": {at}}}}}\n</tool_call>' for at in (3, 4))
ANSWER = f"Bees.{CALLS}"
QUESTION = {"role": "user", "content": "Where to?"}
PARAMETERS = {
    "type": "object",
    "properties": {"to": {"type": "string"}, "at": {"type": "integer"}},
    "required": ["to", "at"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "fly", "strict": True, "parameters": PARAMETERS}}]


def fly(to: str, at: int) -> str:
    """Fly to a flower."""
    return f"landed on {to} at {at}"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model answers everything with two tool calls."""
    with serving(write_echo_model(tmp_path_factory.mktemp("echo"), ANSWER)) as running:
        yield running


@pytest.fixture(scope="module")
def url(running: Running) -> str:
    return f"{running.url}/v1"


def results(calls: Any) -> list[dict[str, Any]]:
    """The results of tool calls, as messages."""
    return [{"role": "tool", "tool_call_id": call.id, "name": "fly", "content": "landed"} for call in calls]


def test_openai_message_dumps_are_taken_back(url):
    create = openai.OpenAI(base_url=url, api_key="none", max_retries=0).chat.completions.create
    answer = create(model="bumblebee", messages=[QUESTION], tools=TOOLS, parallel_tool_calls=False).choices[0].message
    (call,) = answer.tool_calls
    assert json.loads(call.function.arguments) == {"to": "花", "at": 3}
    last = create(model="bumblebee", messages=[QUESTION, answer.model_dump(), *results([call])], tools=TOOLS).choices[0]
    assert (last.finish_reason, last.message.content, len(last.message.tool_calls)) == ("tool_calls", "Bees.", 2)


@pytest.mark.parametrize("streamed", [False, True])
def test_openai_parsed_messages_are_taken_back(url, streamed):
    chat = openai.OpenAI(base_url=url, api_key="none", max_retries=0).chat.completions
    if streamed:
        with chat.stream(model="bumblebee", messages=[QUESTION], tools=TOOLS) as stream:
            answer = stream.get_final_completion().choices[0].message
    else:
        answer = chat.parse(model="bumblebee", messages=[QUESTION], tools=TOOLS).choices[0].message
    assert [call.function.parsed_arguments["at"] for call in answer.tool_calls] == [3, 4]
    for message in (answer, answer.model_dump()):
        again = chat.create(model="bumblebee", messages=[QUESTION, message, *results(answer.tool_calls)])
        assert again.choices[0].message.content == ANSWER


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_round_trip(url, provider, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise the import downloads it
    litellm = pytest.importorskip("litellm", reason="needs litellm: pip install -e '.[clients]'")
    options: Any = {"model": f"{provider}/bumblebee", "api_base": url, "api_key": "none", "tools": TOOLS}
    answer = litellm.completion(messages=[QUESTION], **options).choices[0].message
    chunks = list(litellm.completion(messages=[QUESTION], stream=True, **options))
    streamed = litellm.stream_chunk_builder(chunks).choices[0].message
    for message, dumped in ((answer, answer), (answer, answer.model_dump()), (streamed, streamed.model_dump())):
        assert [json.loads(call.function.arguments)["at"] for call in message.tool_calls] == [3, 4]
        messages = [QUESTION, dumped, *results(message.tool_calls)]
        assert litellm.completion(messages=messages, **options).choices[0].message.content == "Bees."


@pytest.mark.parametrize("strict", [None, True])
def test_langchain_tools(url, strict, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs langchain-openai: pip install -e '.[clients]'")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    options: Any = {"base_url": url, "api_key": "none", "max_retries": 0, "stream_usage": True}
    model = langchain_openai.ChatOpenAI(model="bumblebee", **options)
    bound = model.bind_tools([tool(fly)], strict=strict, parallel_tool_calls=False)
    messages: list[Any] = [HumanMessage("Where to?", name="ada")]
    streamed = None
    for chunk in bound.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    for answer in (bound.invoke(messages), streamed):
        (call,) = answer.tool_calls
        assert call["args"] == {"to": "花", "at": 3} and answer.usage_metadata["output_tokens"] > 0
        result = ToolMessage(tool(fly).invoke(call["args"]), tool_call_id=call["id"])
        assert bound.invoke([*messages, answer, result]).content == "Bees."


def test_pydantic_ai_tools(url):
    pydantic_ai = pytest.importorskip("pydantic_ai", reason="needs pydantic-ai: pip install -e '.[clients]'")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.usage import UsageLimits

    model = OpenAIChatModel("bumblebee", provider=OpenAIProvider(base_url=url, api_key="none"))
    flights: list[int] = []
    agent = pydantic_ai.Agent(model, tools=[pydantic_ai.Tool(lambda to, at: flights.append(at), name="fly")])
    with ThreadPoolExecutor(1) as thread:  # the tests of the page leave a running event loop in this one
        with pytest.raises(pydantic_ai.UsageLimitExceeded):  # the model calls its tools forever
            thread.submit(agent.run_sync, "Where to?", usage_limits=UsageLimits(request_limit=2)).result()
        assert sorted(flights) == [3, 3, 4, 4]
        assert thread.submit(pydantic_ai.Agent(model).run_sync, "Where to?").result().output == ANSWER


def test_openai_agents_function_tools(url):
    agents = pytest.importorskip("agents", reason="needs openai-agents, which may ask for another version of openai")
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    model = agents.OpenAIChatCompletionsModel(model="bumblebee", openai_client=client)
    flights: list[int] = []

    @agents.function_tool(name_override="fly")
    def noted(to: str, at: int) -> str:
        flights.append(at)
        return fly(to, at)

    async def run() -> str:
        with pytest.raises(agents.MaxTurnsExceeded):
            await agents.Runner.run(agents.Agent("a", model=model, tools=[noted]), "Where to?", max_turns=2)
        return (await agents.Runner.run(agents.Agent("a", model=model), "Where to?")).final_output

    assert asyncio.run(run()) == ANSWER
    assert sorted(flights) == [3, 3, 4, 4]


def test_other_apis_are_refused_with_what_there_is(url):
    with pytest.raises(openai.NotFoundError, match="/v1/responses; .* this server has /v1/chat/completions"):
        openai.OpenAI(base_url=url, api_key="none", max_retries=0).responses.create(model="bumblebee", input="Where to?")


def test_guidellm_request_is_generated_to_its_length(running):
    body = {
        "model": "bumblebee", "messages": [{"role": "user", "content": [{"type": "text", "text": "Where to?"}]}],
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 90, "stop": None, "ignore_eos": True,
    }  # fmt: skip
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        *chunks, last = events(response.iter_lines())
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and len(set(counts)) > 40
    assert last["usage"]["completion_tokens"] == counts[-1] == 90
