"""ToolUse: completions of several turns, between which tools are called.

A turn is sampled to its end-of-turn token. If it calls tools, their results are appended as the chat template renders them, and
sampling goes on. What has been sampled is never rendered again: a turn may spell a call differently than the template would.
Only the sampled tokens are trained on. The completion ends with a turn that calls no tool, or that does not end as the template
ends turns. It is truncated after ``max_turns`` turns, at ``max_new_tokens`` sampled tokens, and where results do not fit into
the model's positions.

All turns of a call of ``sample`` run in one engine, whose KV cache holds the turns before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from bumblebee.inference.engine import GenerationEngine
from bumblebee.inference.generator import Completion, Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.rewards.reward import RewardError
from bumblebee.rl.rollout import Question, Rollout
from bumblebee.rl.tool_caller import ToolCaller
from bumblebee.rl.tools import ToolResult
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import Tool
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.tokenizer.tool_call_format import ToolCallFormat
from bumblebee.tokenizer.tool_call_parser import ParsedCall, ToolCallParser

DEFAULTS = (4, 30.0, 4)  # of max_turns, tool_timeout and tool_processes
_PROBE = [{"role": "user", "content": "?"}]


class ToolUse:
    """Samples completions that may call tools.

    Args:
        caller: of the tools.
        max_turns: maximum number of turns of a completion.

    Raises:
        ValueError: ``max_turns`` is less than 2.
    """

    def __init__(self, caller: ToolCaller, max_turns: int) -> None:
        if max_turns < 2:
            raise ValueError(f"max_turns must be at least 2: a turn that calls a tool, and one after it; got {max_turns}")
        self.caller, self.max_turns = caller, max_turns

    def __str__(self) -> str:
        names = ", ".join(str(tool["function"]["name"]) for tool in self.caller.descriptions)
        return f"{names}, in at most {self.max_turns} turns"

    def set_up(self, tokenizer: Tokenizer) -> None:
        """Detect how the model writes calls.

        Raises:
            ValueError: the chat template has no tool calls in a known format, or does not append results.
        """
        format = ToolCallFormat.detect(tokenizer)
        if format is None:
            raise ValueError("task.tools: the chat template does not render tool calls, or in a format that is not known")
        self._tokenizer, self._template, self._format = tokenizer, tokenizer.chat_template, format
        name = str(self.caller.descriptions[0]["function"]["name"])
        try:
            for text in ("", "<think>\n?\n</think>\n\n"):
                turn = _message(text, [ParsedCall(name, "{}")], 0)
                self._continuation([*_PROBE, turn], _results(turn, [ToolResult("?")]), self.caller.descriptions)
        except ValueError as error:
            raise ValueError(f"task.tools: {error}") from error

    def tools_of(self, question: Question) -> list[Tool]:
        """The tools of the record, and those that can be called.

        Raises:
            ValueError: names the record, if it has a tool of the same name.
        """
        own = list(question.tools or ())
        clash = [name for tool in own if (name := str(tool.get("function", tool).get("name"))) in self.caller]
        if clash:
            raise ValueError(f"{question.place}: the record has a tool named {clash[0]!r}, as task.tools has")
        return [*own, *self.caller.descriptions]

    def prompt_ids(self, question: Question) -> list[int]:
        """A prompt with the tools, up to where the completion begins."""
        return self._template.apply(self._format.rewrite(list(question.messages)), self.tools_of(question), True)

    def sample(
        self,
        generator: Generator,
        prompts: Sequence[tuple[Question, list[int]]],
        params: Sequence[Sequence[SamplingParams]],
    ) -> list[list[Rollout]]:
        """Sample completions of each prompt.

        Args:
            generator: the model in training, in evaluation mode.
            prompts: (question, token ids).
            params: for each prompt the parameters of each of its completions.

        Returns:
            For each prompt its group.

        Raises:
            RewardError: a worker process of the tools cannot start.
        """
        groups = [
            [_Conversation.of(question, ids, each, self.tools_of(question)) for each in group]
            for (question, ids), group in zip(prompts, params, strict=True)
        ]
        try:
            self._run(generator, [each for group in groups for each in group])
        except RewardError as failure:
            raise RewardError(f"task.tools: {failure}") from failure
        return [[each.rollout for each in group] for group in groups]

    def _run(self, generator: Generator, active: list[_Conversation]) -> None:
        engine: GenerationEngine | None = None
        for turn in range(self.max_turns):
            requests = [each.request(f"{at}", turn, self._format.marker_ids) for at, each in enumerate(active)]
            if not requests:
                return
            engine = _engine_with_room(generator, requests, engine)
            completions = generator.complete(requests, engine=engine)
            calls = [self._add_turn(each, done, turn) for each, done in zip(active, completions, strict=True)]
            active = self._call(active, calls, generator.model.config.max_position_embeddings)

    def _add_turn(self, conversation: _Conversation, completion: Completion, turn: int) -> list[ParsedCall]:
        """Append what has been sampled; returns the tool calls that are to be made."""
        parser = ToolCallParser(self._format, conversation.tool_names, unknown=True)
        parts = [*parser.feed(completion.text), *parser.finish()]
        calls = [part for part in parts if isinstance(part, ParsedCall)]
        text = "".join(part for part in parts if isinstance(part, str))
        conversation.add(completion, _message(text, calls, conversation.calls))
        conversation.calls += len(calls)
        if not calls or completion.finish_reason != "stop":
            return []
        end, _ = self._continuation(
            conversation.messages, _results(conversation.messages[-1], [ToolResult("")] * len(calls)), conversation.tools
        )
        if completion.token_ids[-1] != end:
            return []
        conversation.rollout.truncated = turn + 1 == self.max_turns or not conversation.budget
        return [] if conversation.rollout.truncated else calls

    def _call(
        self, conversations: Sequence[_Conversation], calls: Sequence[list[ParsedCall]], max_positions: int
    ) -> list[_Conversation]:
        """Call the tools and append their results; returns the conversations that go on."""
        results = self.caller.call([call for each in calls for call in each])
        remaining, going_on = iter(results), []
        for conversation, own in zip(conversations, calls, strict=True):
            if not own:
                continue
            answers = [next(remaining) for _ in own]
            conversation.rollout.tool_errors += sum(answer.is_error for answer in answers)
            messages = _results(conversation.messages[-1], answers)
            _, ids = self._continuation(conversation.messages, messages, conversation.tools)
            if len(conversation.ids) + len(ids) < max_positions:
                conversation.insert(ids, messages)
                going_on.append(conversation)
            else:
                conversation.rollout.truncated = True
        return going_on

    def _continuation(
        self, messages: Sequence[Message], results: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[int, list[int]]:
        rewrite = self._format.rewrite
        return self._template.continuation(rewrite(list(messages)), rewrite(list(results)), tools)


def tool_use_of(
    tools: Sequence[Callable[..., object]] | None, max_turns: int, timeout: float | None, processes: int
) -> ToolUse | None:
    """From the options of a task; None without tools.

    Raises:
        ValueError: see ``ToolUse`` and ``ToolCaller``; or there are options without tools.
    """
    if tools:
        return ToolUse(ToolCaller(tools, timeout, processes), max_turns)
    if (max_turns, timeout, processes) != DEFAULTS:
        raise ValueError("max_turns, tool_timeout and tool_processes have no effect without tools")
    return None


@dataclass
class _Conversation:
    """A completion in the making."""

    rollout: Rollout
    ids: list[int]  # with the prompt
    messages: list[Message]  # with those of the prompt
    tools: list[Tool]
    params: SamplingParams
    calls: int = 0

    @classmethod
    def of(cls, question: Question, ids: list[int], params: SamplingParams, tools: list[Tool]) -> _Conversation:
        return cls(Rollout(question.index), list(ids), list(question.messages), tools, params)

    @property
    def tool_names(self) -> list[str]:
        return [str(tool.get("function", tool)["name"]) for tool in self.tools]

    @property
    def budget(self) -> int:
        """Tokens that may still be sampled."""
        return self.params.max_new_tokens - len(self.rollout.tokens)

    def request(self, id: str, turn: int, spelled: Iterable[int]) -> EngineRequest:
        """Of the next turn."""
        seed = self.params.seed if turn == 0 or self.params.seed is None else turn_seed(self.params.seed, turn)
        spelled = [*self.params.spelled_ids, *spelled]
        return EngineRequest(id, self.ids, replace(self.params, seed=seed, max_new_tokens=self.budget, spelled_ids=spelled))

    def add(self, completion: Completion, message: Message) -> None:
        """Append a turn."""
        self.rollout.tokens += completion.token_ids
        self.rollout.log_probs += [token.logprob or 0.0 for token in completion.tokens]
        self.rollout.text += completion.text
        self.rollout.truncated = completion.finish_reason == "length"
        self.rollout.turns.append(message)
        self.messages.append(message)
        self.ids = [*self.ids, *completion.token_ids]

    def insert(self, ids: list[int], results: Sequence[Message]) -> None:
        """Append tool results and the beginning of the next turn, as ids and as messages."""
        self.rollout.inserted.append((len(self.rollout.tokens), ids))
        self.rollout.text += "".join(f"\n<tool_response>\n{each['content']}\n</tool_response>\n" for each in results)
        self.rollout.turns += results
        self.messages += results
        self.ids = [*self.ids, *ids]


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a later turn of a completion."""
    return int.from_bytes(blake2b(f"{seed} turn {turn}".encode(), digest_size=8).digest(), "little")


def _engine_with_room(
    generator: Generator, requests: Sequence[EngineRequest], engine: GenerationEngine | None
) -> GenerationEngine:
    """The engine, or a new one if a request does not fit into its KV cache, in which later turns are expected to fit."""
    if engine is not None and all(_fits(engine, request) for request in requests):
        return engine
    longer = [replace(each, params=replace(each.params, max_new_tokens=2 * each.params.max_new_tokens)) for each in requests]
    return generator.engine_for(longer)


def _fits(engine: GenerationEngine, request: EngineRequest) -> bool:
    try:
        engine.validate(request)
    except ValueError:
        return False
    return True


def _message(text: str, calls: Sequence[ParsedCall], number: int) -> Message:
    """An assistant message whose calls have ids of nine characters, as Mistral's template requires."""
    made = [
        {"id": f"call{at:05d}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for at, call in enumerate(calls, start=number)
    ]
    return {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}


def _results(message: Message, results: Sequence[ToolResult]) -> list[Message]:
    return [
        {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": result.text}
        for call, result in zip(message["tool_calls"], results, strict=True)
    ]
