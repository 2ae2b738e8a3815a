"""The engine client: admission, routing and cancellation, with the tests playing the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.request import EngineRequest, RequestOutput, SampledToken
from bumblebee.inference.sampling.sampling_params import SamplingParams
from serve.api.errors import APIError
from serve.api.requests import ChoiceRequest
from serve.metrics import Metrics
from serve.serve_options import ServeOptions
from serve.workers.engine_client import EngineClient, Replica
from serve.workers.messages import CancelRequest, StepOutputs, WorkerReady

pytestmark = pytest.mark.anyio

STATS = EngineStats(
    running=1,
    waiting=2,
    blocks_total=10,
    blocks_free=7,
    blocks_cached=2,
    prompt_tokens=0,
    cached_tokens=0,
    new_tokens=0,
    steps=0,
)
READY = WorkerReady("cpu", "float32", 1000, 400, 160, 160, SamplingParams(), STATS)


class RecordingPipe(list):
    """Stands in for a worker pipe: records the messages to the worker."""

    send = list.append

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self]


def engine_client_of(workers: int = 1, **options: Any) -> EngineClient:
    client = EngineClient(ServeOptions("folder", **options), Metrics(lambda: []))
    client.replicas = [Replica(index, RecordingPipe(), READY) for index in range(workers)]
    return client


def choices(count: int = 1) -> list[ChoiceRequest]:
    return [ChoiceRequest([1, 2, 3], SamplingParams(), index) for index in range(count)]


def output(id: str, text: str, finish_reason: Any = None) -> RequestOutput:
    return RequestOutput(id, text, [SampledToken(5)], finish_reason, 3, 0)


def deliver(engine_client: EngineClient, replica: Replica, *outputs: RequestOutput, rejected: Any = ()) -> None:
    engine_client.deliver(replica, StepOutputs(list(outputs), list(rejected), STATS))


async def test_outputs_reach_their_stream_with_the_choice_index():
    engine_client = engine_client_of()
    replica = engine_client.replicas[0]
    stream, other = engine_client.generate(choices(2)), engine_client.generate(choices())
    first, second, third = replica.pipe.ids
    deliver(engine_client, replica, output(second, "b"), output(third, "x", "stop"), output(first, "a", "stop"))
    deliver(engine_client, replica, output(second, "c", "length"))
    assert [(index, each.text) async for index, each in stream] == [(1, "b"), (0, "a"), (1, "c")]
    assert [each.text async for _, each in other] == ["x"]
    assert engine_client.idle


async def test_ended_choice_is_cancelled_and_delivers_no_more():
    engine_client = engine_client_of()
    replica = engine_client.replicas[0]
    stream = engine_client.generate(choices(2))
    first, second = replica.pipe.ids
    deliver(engine_client, replica, output(first, "a"), output(first, "late"), output(first, "later", "stop"))
    assert (await anext(stream))[1].text == "a"
    stream.end(0)
    assert replica.pipe[2:] == [], "its generation has finished"
    deliver(engine_client, replica, output(second, "b"))
    assert (await anext(stream))[1].text == "b"
    stream.end(1)
    assert replica.pipe[2:] == [CancelRequest(second)]
    deliver(engine_client, replica, output(second, "late", "cancelled"))
    assert [each async for each in stream] == [] and engine_client.idle


async def test_closing_a_stream_cancels_only_unfinished_choices():
    engine_client = engine_client_of()
    replica = engine_client.replicas[0]
    stream = engine_client.generate(choices(3))
    first, *remaining = replica.pipe.ids
    deliver(engine_client, replica, output(first, "a", "stop"))
    stream.close()
    stream.close()
    assert replica.pipe[3:] == [CancelRequest(id) for id in remaining]
    assert engine_client.idle
    deliver(engine_client, replica, output(remaining[0], "late", "cancelled"))  # outputs of a cancelled request are dropped


async def test_choices_go_together_to_the_least_busy_worker():
    engine_client = engine_client_of(workers=3)
    streams = [engine_client.generate(choices(count)) for count in (2, 1, 1, 1)]
    assert [stream.replica.index for stream in streams] == [0, 1, 2, 1]


async def test_late_worker_gets_requests_only_if_alone():
    engine_client = engine_client_of(workers=2)
    engine_client.replicas[1].silence = 5.0
    assert {engine_client.generate(choices()).replica.index for _ in range(4)} == {0}
    engine_client.replicas[0].ready = None
    assert engine_client.generate(choices()).replica.index == 1


async def test_hanging_worker_fails_its_streams():
    engine_client = engine_client_of()
    stream = engine_client.generate(choices())
    engine_client.worker_hangs(engine_client.replicas[0])
    error = await error_of(stream)
    stream.close()
    assert (error.status, error.code) == (500, "worker_unresponsive")
    assert engine_client.idle


async def test_loading_worker_gets_no_requests():
    engine_client = engine_client_of(workers=2)
    engine_client.replicas[0].ready = None
    assert {engine_client.generate(choices()).replica.index for _ in range(4)} == {1}


async def test_full_queue_rejects_until_a_request_ends():
    engine_client = engine_client_of(workers=2, max_running=2, max_queue=3)
    streams = [engine_client.generate(choices()) for _ in range(6)]
    with pytest.raises(APIError) as caught:
        engine_client.generate(choices(2))
    assert (caught.value.status, caught.value.code, caught.value.headers) == (429, "queue_full", {"Retry-After": "1"})
    engine_client.generate(choices(1))
    with pytest.raises(APIError):
        engine_client.generate(choices(1))
    streams[0].close()
    engine_client.generate(choices(1))


async def error_of(stream: Any) -> APIError:
    with pytest.raises(APIError) as raised:
        async for _ in stream:
            pass
    return raised.value


async def test_dead_worker_fails_only_its_own_streams():
    engine_client = engine_client_of(workers=2)
    lost, kept = engine_client.generate(choices(2)), engine_client.generate(choices())
    engine_client.worker_died(engine_client.replicas[0])
    error = await error_of(lost)
    assert (error.status, error.code) == (500, "worker_died")
    deliver(engine_client, engine_client.replicas[1], output(engine_client.replicas[1].pipe.ids[0], "a", "stop"))
    assert [each.text async for _, each in kept] == ["a"]
    lost.close()
    assert len(engine_client.replicas[0].pipe) == 2, "a dead worker gets no messages"


async def test_outputs_before_a_worker_died_are_delivered():
    engine_client = engine_client_of()
    stream = engine_client.generate(choices())
    deliver(engine_client, engine_client.replicas[0], output(engine_client.replicas[0].pipe.ids[0], "a"))
    engine_client.worker_died(engine_client.replicas[0])
    assert (await stream.__anext__())[1].text == "a"
    assert (await error_of(stream)).status == 500


def rejected_prompt(engine_client: EngineClient, id: str) -> None:
    deliver(engine_client, engine_client.replicas[0], rejected=[(id, "the prompt has 500 tokens")])


def aborted(engine_client: EngineClient, id: str) -> None:
    engine_client.abort_all()


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [(rejected_prompt, 400, "context_length_exceeded"), (aborted, 503, "draining")],
)
async def test_rejected_or_aborted_stream_raises(event: Callable[[EngineClient, str], None], status: int, code: str):
    engine_client = engine_client_of()
    stream = engine_client.generate(choices())
    event(engine_client, engine_client.replicas[0].pipe.ids[0])
    error = await error_of(stream)
    stream.close()
    assert (error.status, error.code) == (status, code)
    assert engine_client.idle


async def test_timeout_does_not_depend_on_the_worker():
    engine_client = engine_client_of(request_timeout=0.05)
    stream = engine_client.generate(choices())
    error = await error_of(stream)
    stream.close()
    assert (error.status, error.code) == (504, "timeout")
    assert [type(message) for message in engine_client.replicas[0].pipe] == [EngineRequest, CancelRequest]


async def test_loading_and_draining_reject_requests():
    engine_client = engine_client_of()
    engine_client.replicas[0].ready = None
    assert engine_client.state == "loading"
    with pytest.raises(APIError) as loading:
        engine_client.generate(choices())
    engine_client.replicas[0].ready = READY
    engine_client.draining = True
    with pytest.raises(APIError) as draining:
        engine_client.generate(choices())
    assert [(each.value.status, each.value.code) for each in (loading, draining)] == [(503, "loading"), (503, "draining")]


async def test_token_latencies_are_measured():
    engine_client = engine_client_of()
    stream = engine_client.generate(choices(2))
    first, second = engine_client.replicas[0].pipe.ids
    deliver(engine_client, engine_client.replicas[0], output(first, "a"), output(second, "a", "stop"))
    deliver(engine_client, engine_client.replicas[0], output(first, "b", "length"))
    stream.close()
    text = engine_client.metrics.text().decode()
    assert "bumblebee_first_token_seconds_count 2.0" in text
    assert "bumblebee_further_token_seconds_count 1.0" in text
