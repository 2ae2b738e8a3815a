"""The worker's loop, with the real engine and the other end of its pipe in the test's hands."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from bumblebee.inference.request import Request
from bumblebee.inference.sampling_params import SamplingParams
from serve.worker import receive_messages, run_engine
from serve.worker_messages import CancelRequest, StepOutputs

LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)


@pytest.fixture
def pipe(served_folder: Path) -> Iterator[Connection]:
    """A pipe to a loop that runs in a thread."""
    from bumblebee.inference.engine_config import GenerationOptions
    from bumblebee.inference.generator import Generator

    engine = Generator.from_pretrained(served_folder, device="cpu").engine(GenerationOptions(cache_tokens=4096))
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=run_engine, args=(engine, theirs))
    thread.start()
    yield ours
    ours.send(None)
    thread.join(30)
    assert not thread.is_alive()


def received(pipe: Connection) -> StepOutputs:
    assert pipe.poll(30), "nothing came"
    return pipe.recv()


def test_one_message_a_step_holds_the_outputs_of_all_requests(pipe: Connection):
    for id in "ab":
        pipe.send(Request(id, [5, 6, 7], SamplingParams(max_new_tokens=20, ignore_eos=True)))
    steps: list[StepOutputs] = []
    while len([output for step in steps for output in step.outputs if output.finish_reason]) < 2:
        steps.append(received(pipe))
    assert {output.id for output in steps[10].outputs} == {"a", "b"}
    assert sum(len(output.tokens) for step in steps for output in step.outputs) == 40
    assert steps[-1].stats.running == 0


def test_a_cancelled_request_is_gone_with_the_next_step_that_hears_of_it(pipe: Connection):
    pipe.send(Request("a", [5, 6, 7], LONG))
    step = received(pipe)
    pipe.send(CancelRequest("a"))
    while step.outputs[0].finish_reason is None:
        step = received(pipe)
    assert step.outputs[0].finish_reason == "cancelled"
    assert (step.stats.running, step.stats.pages_free + step.stats.pages_cached) == (0, step.stats.pages_total)
    assert step.stats.new_tokens < 1000


@pytest.mark.parametrize("prompt", [[], [5] * 3000, [10**6]], ids=["empty", "too long", "unknown id"])
def test_a_request_that_can_never_run_is_refused_and_the_next_one_runs(pipe: Connection, prompt: list[int]):
    pipe.send(Request("a", prompt, LONG))
    [(id, why)] = received(pipe).rejected
    assert id == "a" and why
    pipe.send(Request("b", [5], SamplingParams(max_new_tokens=1)))
    assert [output.id for output in received(pipe).outputs] == ["b"]


class Scripted:
    """A pipe that has some messages."""

    def __init__(self, *messages: Any) -> None:
        self.messages, self.patience = list(messages), []

    def poll(self, patience: float | None) -> bool:
        self.patience.append(patience)
        return bool(self.messages)

    def recv(self) -> Any:
        message = self.messages.pop(0)
        if message is EOFError:
            raise EOFError
        return message


def test_it_waits_without_end_only_where_nothing_is_to_do():
    idle, busy = Scripted(CancelRequest("a"), CancelRequest("b")), Scripted()
    assert receive_messages(idle, busy=False) == [CancelRequest("a"), CancelRequest("b")]
    assert receive_messages(busy, busy=True) == []
    assert (idle.patience, busy.patience) == ([None, 0, 0], [0])


@pytest.mark.parametrize("end", [None, EOFError], ids=["told", "the server is gone"])
def test_it_ends_when_nothing_more_comes(end: Any):
    assert receive_messages(Scripted(CancelRequest("a"), end), busy=True) is None
