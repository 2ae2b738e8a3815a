"""Completions with tools: what is between sampled turns is the chat template's, and is not trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers.processes import ROOT, run_jobs
from helpers.tool_call_templates import tokenizer_of
from helpers.tool_functions import add, by_name
from helpers.training_runs import ToolGRPO, ToolQuestions, small_model, train, weight_bytes
from jsonargparse import ArgumentParser

from bumblebee.inference.detokenizer import Detokenizer
from bumblebee.inference.generator import Completion
from bumblebee.inference.request import EngineRequest, SampledToken
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.nn import IGNORE_INDEX
from bumblebee.rewards.passage import Passage
from bumblebee.rl.rollout import Rollout
from bumblebee.rl.tool_caller import ToolCaller
from bumblebee.rl.tool_use import ToolUse, tool_use_of
from bumblebee.rl.tools import PythonTool
from bumblebee.rl.training_batch import training_batch
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.tokenizer.tool_call_parser import ParsedCall

MODEL = {"vocab_size": 320}
USER = {"role": "user", "content": "2 + 3?"}


class Question(SimpleNamespace):
    index, question, place, record = 5, "2 + 3?", "questions.jsonl:1", {}
    messages, tools = [USER], None


class Scripted:
    """A generator that writes prepared turns, whatever the prompt."""

    def __init__(self, tokenizer: Tokenizer, spelled: Sequence[int], turns: Sequence[list[int]], positions: int = 4096) -> None:
        self.tokenizer, self.spelled, self.turns = tokenizer, spelled, list(turns)
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []

    def engine_for(self, requests: Sequence[EngineRequest]) -> Any:
        return SimpleNamespace(validate=lambda request: None)

    def complete(self, requests: Sequence[EngineRequest], engine: Any) -> list[Completion]:
        (request,), ids = requests, self.turns.pop(0)
        self.prompts.append(request.prompt)
        self.params.append(request.params)
        cut = ids[: request.params.max_new_tokens]
        detokenizer = Detokenizer(self.tokenizer, spelled=request.params.spelled_ids)
        text = "".join(map(detokenizer.add, cut)) + detokenizer.finish()
        return [Completion(text, [SampledToken(id, -0.5) for id in cut], "stop" if cut == ids else "length")]


def call_of(arguments: str, number: int = 0) -> dict[str, Any]:
    call = {"id": f"call{number:05d}", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def conversation(use: ToolUse, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    return use._format.rewrite([USER, *messages])


def turn_ids(use: ToolUse, *messages: dict[str, Any]) -> list[int]:
    """The tokens of the last of these assistant messages, as the template writes it, with the end of turn."""
    chat = use._template.encode(conversation(use, *messages), use.caller.descriptions, "last")
    return [token for token, target in zip(chat.ids, chat.target_mask, strict=True) if target]


def tool_use(tokenizer: Tokenizer, *functions: Any, max_turns: int = 4) -> ToolUse:
    use = ToolUse(ToolCaller(functions or (add,), None, 1), max_turns)
    use.set_up(tokenizer)
    return use


def sample(use: ToolUse, generator: Scripted, budget: int = 400) -> Rollout:
    params = SamplingParams(max_new_tokens=budget, seed=7, logprobs=0)
    ((rollout,),) = use.sample(generator, [(Question(), use.prompt_ids(Question()))], [[params]])  # type: ignore[arg-type,list-item]
    return rollout


@pytest.mark.parametrize("name", ["chatml", "qwen", "llama", "mistral", "heads", "glm", "thinking"])
def test_tokens_are_those_of_the_rendered_conversation(name, tmp_path):
    """Of two calls and an answer, for all token positions; only sampled tokens are targets."""
    tokenizer = tokenizer_of(name, tmp_path)
    use = tool_use(tokenizer)
    first, second = call_of('{"a": 2, "b": 3}'), call_of('{"a": 5, "b": 1}', 1)
    results = [
        {"role": "tool", "tool_call_id": f"call{at:05d}", "name": "add", "content": text} for at, text in enumerate(("5", "6"))
    ]
    answer = {"role": "assistant", "content": "It is 6."}
    history = [first, results[0], second, results[1], answer]
    turns = [turn_ids(use, *history[: at + 1]) for at in (0, 2, 4)]
    generator = Scripted(tokenizer, (), turns)
    rollout = sample(use, generator)
    assert [turn["role"] for turn in rollout.turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert [turn["content"] for turn in rollout.turns if turn["role"] == "tool"] == ["5", "6"]
    assert not rollout.truncated and rollout.tokens == [token for turn in turns for token in turn]
    for at, prompt in zip((0, 2, 4), generator.prompts, strict=True):
        assert prompt == use._template.apply(conversation(use, *history[:at]), use.caller.descriptions, True)
    prompt, (ids, positions) = generator.prompts[0], rollout.sequence
    assert prompt + ids == generator.prompts[2] + turns[2]
    assert len({params.seed for params in generator.params}) == 3
    rollout.rewards = [1.0]
    batch = training_batch([(5, prompt)], [[rollout, rollout]], torch.zeros(1, 2))
    labels = batch["labels"][0]
    assert (labels != IGNORE_INDEX).nonzero().flatten().tolist() == [len(prompt) + at - 1 for at in positions]
    assert labels[labels != IGNORE_INDEX].tolist() == rollout.tokens
    assert batch["input_ids"][0].tolist() == (prompt + ids)[:-1]


def test_a_turn_is_never_rendered_again(tmp_path):
    """Spaces that the template would not write stay, and text that spells special tokens is text."""
    tokenizer = tokenizer_of("chatml", tmp_path)
    use = tool_use(tokenizer, by_name)
    end = tokenizer.end_of_turn_ids[0]
    odd = tokenizer.encode('Well.<tool_call>{"arguments":{"action":"x"},  "name":"by_name"}</tool_call>') + [end]
    generator = Scripted(tokenizer, (), [odd, tokenizer.encode("Yes.") + [end]])
    rollout = sample(use, generator)
    assert generator.prompts[1][: len(generator.prompts[0]) + len(odd)] == generator.prompts[0] + odd
    assert rollout.text.endswith("\n<tool_response>\n<|im_end|> x\n</tool_response>\nYes.")
    assert rollout.turns[0]["content"] == "Well."
    inserted = rollout.inserted[0][1]
    assert inserted.count(end) == 1 and tokenizer.decode(inserted, skip_special_tokens=False).startswith("\n<|im_start|>user")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "by_name", "arguments": {"action": "raise"}}', "Error: KeyError: 'no such key'"),
        ('{"name": "by_name", "arguments": {"action": 3}}', "Error: action: Input should be a valid string"),
        ('{"name": "by_name", "arguments": {}}', "Error: action: Field required"),
        ('{"name": "absent", "arguments": {}}', "Error: there is no tool named 'absent'"),
    ],
)
def test_a_call_that_fails_is_answered_by_the_error(text, message, tmp_path):
    tokenizer = tokenizer_of("chatml", tmp_path)
    use, end = tool_use(tokenizer, by_name), tokenizer.end_of_turn_ids[0]
    turns = [tokenizer.encode(f"<tool_call>{text}</tool_call>") + [end], tokenizer.encode("No.") + [end]]
    rollout = sample(use, Scripted(tokenizer, (), turns))
    assert (rollout.turns[1]["content"], rollout.tool_errors, rollout.truncated) == (message, 1, False)


def test_limits_truncate_a_completion(tmp_path):
    """Turns, sampled tokens, and the model's positions."""
    tokenizer = tokenizer_of("chatml", tmp_path)
    use = tool_use(tokenizer, max_turns=2)
    call = turn_ids(use, call_of('{"a": 2, "b": 3}'))
    by_turns = sample(use, Scripted(tokenizer, (), [call, call, call]))
    assert by_turns.truncated and len(by_turns.turns) == 3 and by_turns.tokens == call * 2
    by_tokens = sample(use, Scripted(tokenizer, (), [call, call]), budget=len(call) + 3)
    assert by_tokens.truncated and by_tokens.tokens == call + call[:3]
    assert sample(use, Scripted(tokenizer, (), [call]), budget=len(call)).truncated
    positions = len(use.prompt_ids(Question())) + len(call) + 5  # type: ignore[arg-type]
    by_positions = sample(use, Scripted(tokenizer, (), [call], positions))
    assert by_positions.truncated and by_positions.tokens == call and not by_positions.inserted


def test_schema_comes_from_hints_and_docstring():
    assert PythonTool(add).description == {
        "type": "function",
        "function": {
            "name": "add", "description": "Add.",
            "parameters": {
                "type": "object", "required": ["a", "b"],
                "properties": {
                    "a": {"type": "integer", "description": "first number."},
                    "b": {"type": "integer", "description": "second number."},
                },
            },
        },
    }  # fmt: skip


def test_example_of_the_documentation_works(tmp_path, monkeypatch):
    """The tool and its options, and the pattern that scores the last turn only."""
    text = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
    section = text.split("\n## Tools\n")[1].split("\n## ")[0]
    (code,), (options,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
    (tmp_path / "my_tools.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(tool_use_of, "use", skip={"timeout", "processes"}, fail_untyped=False)
    init_args = yaml.safe_load(options)["task"]["init_args"]
    parsed = parser.parse_object({"use": {name: init_args[name] for name in ("tools", "max_turns")}})
    (multiply,) = parser.instantiate_classes(parsed).use.tools
    task = ToolGRPO(small_model(**MODEL), **{**init_args, "tools": [multiply]})
    assert str(task.tool_use) == "multiply, in at most 4 turns"
    assert PythonTool(multiply).call('{"a": 6, "b": 7}').text == "42"
    (within,) = re.findall(r"within: '(.*?)'`", section)
    last = Passage(within).of
    assert (last("a\n<tool_response>\n5\n</tool_response>\nIt is"), last("It is\n6")) == ("\nIt is", "It is\n6")


def test_bad_tools_and_options_are_refused(tmp_path):
    def silent(a: int) -> int:
        return a

    def untyped(a, b: int):  # type: ignore[no-untyped-def]
        """Do."""

    for function, message in ((silent, "silent has no docstring"), (untyped, "untyped: parameter 'a' has no type hint")):
        with pytest.raises(ValueError, match=message):
            ToolGRPO(small_model(**MODEL), tools=[function])
    with pytest.raises(ValueError, match="max_turns must be at least 2.*got 1"):
        ToolGRPO(small_model(**MODEL), max_turns=1)
    with pytest.raises(ValueError, match="two tools have the same name: add, add"):
        ToolGRPO(small_model(**MODEL), tools=[add, add])
    with pytest.raises(ValueError, match="tool_timeout must be positive.*got 0"):
        ToolGRPO(small_model(**MODEL), tool_timeout=0)
    with pytest.raises(ValueError, match="max_turns, tool_timeout and tool_processes have no effect without tools"):
        ToolGRPO(small_model(**MODEL), tools=None)
    use = tool_use(tokenizer_of("chatml", tmp_path))
    own = {"type": "function", "function": {"name": "other", "description": "x", "parameters": {"type": "object"}}}
    assert use.tools_of(Question(tools=[own])) == [own, PythonTool(add).description]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="questions.jsonl:1: the record has a tool named 'add'"):
        use.tools_of(Question(tools=[PythonTool(add).description]))  # type: ignore[arg-type]


# -- with processes and training -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_calls_that_hang_or_die_are_ended():
    caller = ToolCaller([by_name, add], timeout=2.0, processes=2)
    calls = [ParsedCall("by_name", json.dumps({"action": action})) for action in ("sleep", "exit", "raise", "x")]
    results = caller.call([*calls, ParsedCall("add", '{"a": 1, "b": 2}'), ParsedCall("absent", "{}")])
    assert [result.text for result in results] == [
        "Error: timed out after 2 s", "Error: ended its worker process: exit code 7", "Error: KeyError: 'no such key'",
        "<|im_end|> x", "3", "Error: there is no tool named 'absent'",
    ]  # fmt: skip
    assert [result.is_error for result in results] == [True, True, True, False, False, True]


@pytest.fixture(scope="module")
def calling_model(tmp_path_factory) -> Path:
    """A folder of a tiny model that has learnt to call ``add`` and then to answer."""
    folder = tmp_path_factory.mktemp("calling") / "model"
    questions, model = ToolQuestions(), small_model(**MODEL)
    questions.setup(0)
    use = tool_use(questions.tokenizer)
    rows = []
    for sample in questions.train[:6]:
        a, b = sample.question.rstrip("?").split(" + ")
        result = {"role": "tool", "tool_call_id": "call00000", "name": "add", "content": str(int(a) + int(b))}
        answer = {"role": "assistant", "content": f"{int(a) + int(b)}"}
        messages = [*sample.messages, call_of(f'{{"a": {a}, "b": {b}}}'), result, answer]
        rows.append(use._template.encode(messages, use.caller.descriptions))
    length = max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(len(rows), length, dtype=torch.int64), torch.full((len(rows), length), IGNORE_INDEX)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        shifted = [token if target else IGNORE_INDEX for token, target in zip(row.ids[1:], row.target_mask[1:], strict=True)]
        labels[at, : len(shifted)] = torch.tensor(shifted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = model(ids, labels=labels).sum() / (labels != IGNORE_INDEX).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_training_with_tools_is_exact_and_resumes(calling_model, tmp_path):
    """Log-probabilities of all turns are those that are trained; a resumed run samples the same conversations."""
    job: dict[str, Any] = {
        "data": ("ToolQuestions", {}), "base": str(calling_model), "task": "ToolGRPO", "max_steps": 2,
        "optimizer": ("AdamW", {"lr": 1e-4}),
        "callbacks": {"checkpoint": ("Checkpoint", {"every": 1, "keep": None})},
    }  # fmt: skip
    lines = train(tmp_path / "whole", **job)
    records = [json.loads(line) for line in (tmp_path / "whole/rollouts/step-000001.jsonl").read_text().splitlines()]
    called = [record for record in records if any(turn["role"] == "tool" for turn in record["turns"])]
    assert len(called) > len(records) / 2
    for line in lines:
        assert line["rl/logprob_drift"] < 1e-5
        assert line["rl/turns"] > 1.3 and line["rl/tool_calls"] > 0.3
    assert lines[0]["rl/length"] == pytest.approx(sum(record["tokens"] for record in records) / len(records))
    for record in called:
        result = next(turn["content"] for turn in record["turns"] if turn["role"] == "tool")
        assert f"\n<tool_response>\n{result}\n</tool_response>\n" in record["completion"]
    stopped = {**job, "callbacks": {**job["callbacks"], "stop": ("StopAfter", {"step": 1})}}
    train(tmp_path / "pieces", **stopped)
    train(tmp_path / "pieces", **job, resume="auto")
    assert weight_bytes(tmp_path / "pieces") == weight_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_hold_the_conversations_of_one(calling_model, tmp_path):
    job: dict[str, Any] = {
        "data": ("ToolQuestions", {}), "base": str(calling_model), "task": "ToolGRPO", "max_steps": 2, "micro_batch_size": 1,
        "optimizer": ("AdamW", {"lr": 1e-4}),
    }  # fmt: skip
    one = train(tmp_path / "one", **job, accumulate=2)
    [two] = run_jobs([{**job, "accumulate": 1, "folder": str(tmp_path / "two")}], 2, tmp_path)

    def conversations(name: str) -> list[str]:
        files = sorted((tmp_path / name / "rollouts").glob("step-000001*.jsonl"))
        return sorted(json.loads(line)["completion"] for file in files for line in file.read_text().splitlines())

    assert conversations("one") == conversations("two")
    assert any("<tool_response>" in text for text in conversations("two"))
    for line, other in zip(one, two["metrics"], strict=True):
        assert line["rl/reward"] == pytest.approx(other["rl/reward"])
        assert line["rl/tool_calls"] == pytest.approx(other["rl/tool_calls"])
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
