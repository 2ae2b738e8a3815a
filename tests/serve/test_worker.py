"""The worker's loop with the real engine; the tests hold the server's end of the pipe."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams
from serve.workers.messages import CancelRequest, Heartbeat, StepOutputs
from serve.workers.worker import receive_messages, run_engine

LONG = SamplingParams(max_new_tokens=1000, ignore_eos=True)


@pytest.fixture(scope="module")
def generator(served_folder: Path) -> Generator:
    return Generator.from_pretrained(served_folder, device="cpu")


@pytest.fixture
def pipe(generator: Generator) -> Iterator[Connection]:
    """A pipe to a loop in a thread."""
    engine = generator.engine(EngineConfig(cache_tokens=4096))
    server_end, worker_end = multiprocessing.Pipe()
    thread = threading.Thread(target=run_engine, args=(engine, worker_end, 0.05))
    thread.start()
    yield server_end
    server_end.send(None)
    thread.join(30)
    assert not thread.is_alive()


def received(pipe: Connection, kind: type = StepOutputs) -> Any:
    """The next message of this kind."""
    while pipe.poll(30):
        if isinstance(message := pipe.recv(), kind):
            return message
    raise AssertionError("nothing came")


def test_one_message_per_step_has_all_outputs(pipe: Connection):
    for id in "ab":
        pipe.send(EngineRequest(id, [5, 6, 7], SamplingParams(max_new_tokens=20, ignore_eos=True)))
    steps: list[StepOutputs] = []
    while len([output for step in steps for output in step.outputs if output.finish_reason]) < 2:
        steps.append(received(pipe))
    assert {output.id for output in steps[10].outputs} == {"a", "b"}
    assert sum(len(output.tokens) for step in steps for output in step.outputs) == 40
    assert steps[-1].stats.running == 0


def test_cancelled_request_ends_with_the_next_step(pipe: Connection):
    pipe.send(EngineRequest("a", [5, 6, 7], LONG))
    step = received(pipe)
    pipe.send(CancelRequest("a"))
    while step.outputs[0].finish_reason is None:
        step = received(pipe)
    assert step.outputs[0].finish_reason == "cancelled"
    assert (step.stats.running, step.stats.blocks_free + step.stats.blocks_cached) == (0, step.stats.blocks_total)
    assert step.stats.new_tokens < 1000


@pytest.mark.parametrize("prompt", [[], [5] * 3000, [10**6]], ids=["empty", "too long", "unknown id"])
def test_impossible_request_is_rejected(pipe: Connection, prompt: list[int]):
    pipe.send(EngineRequest("a", prompt, LONG))
    [(id, why)] = received(pipe).rejected
    assert id == "a" and why
    pipe.send(EngineRequest("b", [5], SamplingParams(max_new_tokens=1)))
    assert [output.id for output in received(pipe).outputs] == ["b"]


def test_idle_loop_sends_heartbeats(pipe: Connection):
    assert [received(pipe, Heartbeat).step_seconds for _ in range(3)] == [0, 0, 0]


def test_heartbeats_measure_a_long_step():
    class Slow:
        busy = False

        def step(self) -> list[Any]:
            self.busy = not self.busy
            if self.busy:
                release.wait(30)
            return []

        def cancel(self, id: str) -> None:
            pass

    release = threading.Event()
    server_end, worker_end = multiprocessing.Pipe()
    thread = threading.Thread(target=run_engine, args=(Slow(), worker_end, 0.02))
    thread.start()
    server_end.send(CancelRequest("a"))
    while received(server_end, Heartbeat).step_seconds < 0.1:
        pass
    release.set()
    while received(server_end, Heartbeat).step_seconds > 0:
        pass
    server_end.send(None)
    thread.join(30)
    assert not thread.is_alive()


class Scripted:
    """A pipe with some pending messages."""

    def __init__(self, *messages: Any) -> None:
        self.messages, self.timeouts = list(messages), []

    def poll(self, timeout: float | None) -> bool:
        self.timeouts.append(timeout)
        return bool(self.messages)

    def recv(self) -> Any:
        message = self.messages.pop(0)
        if message is EOFError:
            raise EOFError
        return message


def test_loop_blocks_only_when_idle():
    idle, busy = Scripted(CancelRequest("a"), CancelRequest("b")), Scripted()
    assert receive_messages(idle, busy=False) == [CancelRequest("a"), CancelRequest("b")]
    assert receive_messages(busy, busy=True) == []
    assert (idle.timeouts, busy.timeouts) == ([None, 0, 0], [0])


@pytest.mark.parametrize("end", [None, EOFError], ids=["closed", "server gone"])
def test_loop_ends_when_the_pipe_closes(end: Any):
    assert receive_messages(Scripted(CancelRequest("a"), end), busy=True) is None
