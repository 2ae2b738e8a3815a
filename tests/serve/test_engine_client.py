"""The engine client: admission, routing and cancellation, with the tests playing the workers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.request import Output, Request, Token
from bumblebee.inference.sampling_params import SamplingParams
from serve.api_errors import APIError
from serve.engine_client import EngineClient, Replica
from serve.metrics import Metrics
from serve.serve_options import ServeOptions
from serve.worker_messages import CancelRequest, StepOutputs, WorkerReady

pytestmark = pytest.mark.anyio

STATS = EngineStats(
    running=1, waiting=2, pages_total=10, pages_free=7, pages_cached=2, prompt_tokens=0, cached_tokens=0, new_tokens=0, steps=0
)
READY = WorkerReady("cpu", "float32", 1000, 400, 160, 160, SamplingParams(), STATS)


class Sent(list):
    """In the place of a channel: what would have gone to the worker."""

    send = list.append

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self]


def engine_client_of(workers: int = 1, **options: Any) -> EngineClient:
    made = EngineClient(ServeOptions("folder", **options), Metrics(lambda: []))
    made.replicas = [Replica(index, Sent(), READY) for index in range(workers)]
    return made


def jobs(count: int = 1) -> list[Any]:
    return [SimpleNamespace(index=index, prompt=[1, 2, 3], params=SamplingParams()) for index in range(count)]


def output(id: str, text: str, finish_reason: Any = None) -> Output:
    return Output(id, text, [Token(5)], finish_reason, 3, 0)


def deliver(engine_client: EngineClient, replica: Replica, *outputs: Output, rejected: Any = ()) -> None:
    engine_client.deliver(replica, StepOutputs(list(outputs), list(rejected), STATS))


async def test_outputs_reach_the_run_that_waits_for_them_with_the_index_of_the_job():
    engine_client = engine_client_of()
    replica = engine_client.replicas[0]
    run, other = engine_client.generate(jobs(2)), engine_client.generate(jobs())
    first, second, third = replica.pipe.ids
    deliver(engine_client, replica, output(second, "b"), output(third, "x", "stop"), output(first, "a", "stop"))
    deliver(engine_client, replica, output(second, "c", "length"))
    assert [(index, each.text) async for index, each in run] == [(1, "b"), (0, "a"), (1, "c")]
    assert [each.text async for _, each in other] == ["x"]
    assert engine_client.idle


async def test_closing_a_run_cancels_what_has_not_ended_and_nothing_else():
    engine_client = engine_client_of()
    replica = engine_client.replicas[0]
    run = engine_client.generate(jobs(3))
    first, *others = replica.pipe.ids
    deliver(engine_client, replica, output(first, "a", "stop"))
    run.close()
    run.close()
    assert replica.pipe[3:] == [CancelRequest(id) for id in others]
    assert engine_client.idle
    deliver(engine_client, replica, output(others[0], "late", "cancelled"))  # what was on its way is dropped


async def test_requests_go_to_the_least_busy_worker_and_those_of_one_run_to_the_same():
    engine_client = engine_client_of(workers=3)
    runs = [engine_client.generate(jobs(count)) for count in (2, 1, 1, 1)]
    assert [run.replica.index for run in runs] == [0, 1, 2, 1]


async def test_a_worker_that_loads_gets_no_requests():
    engine_client = engine_client_of(workers=2)
    engine_client.replicas[0].ready = None
    assert {engine_client.generate(jobs()).replica.index for _ in range(4)} == {1}


async def test_more_than_run_and_wait_are_refused_until_one_ends():
    engine_client = engine_client_of(workers=2, max_running=2, max_queue=3)
    runs = [engine_client.generate(jobs()) for _ in range(6)]
    with pytest.raises(APIError) as refused:
        engine_client.generate(jobs(2))
    assert (refused.value.status, refused.value.code, refused.value.headers) == (429, "queue_full", {"Retry-After": "1"})
    engine_client.generate(jobs(1))
    with pytest.raises(APIError):
        engine_client.generate(jobs(1))
    runs[0].close()
    engine_client.generate(jobs(1))


async def fault_of(run: Any) -> APIError:
    with pytest.raises(APIError) as raised:
        async for _ in run:
            pass
    return raised.value


async def test_a_worker_that_ends_gives_its_runs_an_error_and_leaves_the_others_alone():
    engine_client = engine_client_of(workers=2)
    lost, kept = engine_client.generate(jobs(2)), engine_client.generate(jobs())
    engine_client.worker_died(engine_client.replicas[0])
    fault = await fault_of(lost)
    assert (fault.status, fault.code) == (500, "worker_died")
    deliver(engine_client, engine_client.replicas[1], output(engine_client.replicas[1].pipe.ids[0], "a", "stop"))
    assert [each.text async for _, each in kept] == ["a"]
    lost.close()
    assert len(engine_client.replicas[0].pipe) == 2, "a worker that is gone is told nothing"


async def test_what_came_before_a_worker_ended_is_still_delivered():
    engine_client = engine_client_of()
    run = engine_client.generate(jobs())
    deliver(engine_client, engine_client.replicas[0], output(engine_client.replicas[0].pipe.ids[0], "a"))
    engine_client.worker_died(engine_client.replicas[0])
    assert (await run.__anext__())[1].text == "a"
    assert (await fault_of(run)).status == 500


def refused_prompt(engine_client: EngineClient, id: str) -> None:
    deliver(engine_client, engine_client.replicas[0], rejected=[(id, "the prompt has 500 tokens")])


def aborted(engine_client: EngineClient, id: str) -> None:
    engine_client.abort_all()


@pytest.mark.parametrize(
    ("happens", "status", "code"),
    [(refused_prompt, 400, "context_length_exceeded"), (aborted, 503, "draining")],
)
async def test_a_run_that_cannot_go_on_ends_with_a_fault(happens: Callable[[EngineClient, str], None], status: int, code: str):
    engine_client = engine_client_of()
    run = engine_client.generate(jobs())
    happens(engine_client, engine_client.replicas[0].pipe.ids[0])
    fault = await fault_of(run)
    run.close()
    assert (fault.status, fault.code) == (status, code)
    assert engine_client.idle


async def test_a_run_that_takes_too_long_ends_also_where_the_worker_says_nothing():
    engine_client = engine_client_of(request_timeout=0.05)
    run = engine_client.generate(jobs())
    fault = await fault_of(run)
    run.close()
    assert (fault.status, fault.code) == (504, "timeout")
    assert [type(message) for message in engine_client.replicas[0].pipe] == [Request, CancelRequest]


async def test_nobody_is_admitted_while_the_model_loads_or_the_server_is_stopped():
    engine_client = engine_client_of()
    engine_client.replicas[0].ready = None
    assert engine_client.state == "loading"
    with pytest.raises(APIError) as loading:
        engine_client.generate(jobs())
    engine_client.replicas[0].ready = READY
    engine_client.draining = True
    with pytest.raises(APIError) as draining:
        engine_client.generate(jobs())
    assert [(each.value.status, each.value.code) for each in (loading, draining)] == [(503, "loading"), (503, "draining")]


async def test_times_to_tokens_are_measured():
    engine_client = engine_client_of()
    run = engine_client.generate(jobs(2))
    first, second = engine_client.replicas[0].pipe.ids
    deliver(engine_client, engine_client.replicas[0], output(first, "a"), output(second, "a", "stop"))
    deliver(engine_client, engine_client.replicas[0], output(first, "b", "length"))
    run.close()
    text = engine_client.metrics.text().decode()
    assert "bumblebee_first_token_seconds_count 2.0" in text
    assert "bumblebee_further_token_seconds_count 1.0" in text
