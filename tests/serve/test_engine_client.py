"""The hub: who is admitted, which worker gets it, and what reaches the one who waits. The workers' side is played by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bumblebee.inference.engine_config import EngineStats
from bumblebee.inference.request import EngineRequest, RequestOutput, SampledToken
from bumblebee.inference.sampling_params import SamplingParams
from serve.api_errors import Fault
from serve.engine_client import Hub, Replica
from serve.metrics import Metrics
from serve.serve_options import ServeOptions
from serve.worker_messages import Cancel, Ready, Step

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
READY = Ready("cpu", "float32", 1000, 400, 160, 160, SamplingParams(), STATS)


class Sent(list):
    """In the place of a channel: what would have gone to the worker."""

    send = list.append

    @property
    def ids(self) -> list[str]:
        return [message.id for message in self]


def hub_of(workers: int = 1, **options: Any) -> Hub:
    made = Hub(ServeOptions("folder", **options), Metrics(lambda: []))
    made.replicas = [Replica(index, Sent(), READY) for index in range(workers)]
    return made


def jobs(count: int = 1) -> list[Any]:
    return [SimpleNamespace(index=index, prompt=[1, 2, 3], params=SamplingParams()) for index in range(count)]


def output(id: str, text: str, finish_reason: Any = None) -> RequestOutput:
    return RequestOutput(id, text, [SampledToken(5)], finish_reason, 3, 0)


def step(hub: Hub, replica: Replica, *outputs: RequestOutput, refused: Any = ()) -> None:
    hub.step(replica, Step(list(outputs), list(refused), STATS))


async def test_outputs_reach_the_run_that_waits_for_them_with_the_index_of_the_job():
    hub = hub_of()
    replica = hub.replicas[0]
    run, other = hub.run(jobs(2)), hub.run(jobs())
    first, second, third = replica.channel.ids
    step(hub, replica, output(second, "b"), output(third, "x", "stop"), output(first, "a", "stop"))
    step(hub, replica, output(second, "c", "length"))
    assert [(index, each.text) async for index, each in run] == [(1, "b"), (0, "a"), (1, "c")]
    assert [each.text async for _, each in other] == ["x"]
    assert hub.idle


async def test_closing_a_run_cancels_what_has_not_ended_and_nothing_else():
    hub = hub_of()
    replica = hub.replicas[0]
    run = hub.run(jobs(3))
    first, *others = replica.channel.ids
    step(hub, replica, output(first, "a", "stop"))
    run.close()
    run.close()
    assert replica.channel[3:] == [Cancel(id) for id in others]
    assert hub.idle
    step(hub, replica, output(others[0], "late", "cancelled"))  # what was on its way is dropped


async def test_requests_go_to_the_least_busy_worker_and_those_of_one_run_to_the_same():
    hub = hub_of(workers=3)
    runs = [hub.run(jobs(count)) for count in (2, 1, 1, 1)]
    assert [run.replica.index for run in runs] == [0, 1, 2, 1]


async def test_a_worker_that_loads_gets_no_requests():
    hub = hub_of(workers=2)
    hub.replicas[0].ready = None
    assert {hub.run(jobs()).replica.index for _ in range(4)} == {1}


async def test_more_than_run_and_wait_are_refused_until_one_ends():
    hub = hub_of(workers=2, max_running=2, max_queue=3)
    runs = [hub.run(jobs()) for _ in range(6)]
    with pytest.raises(Fault) as refused:
        hub.run(jobs(2))
    assert (refused.value.status, refused.value.code, refused.value.headers) == (429, "queue_full", {"Retry-After": "1"})
    hub.run(jobs(1))
    with pytest.raises(Fault):
        hub.run(jobs(1))
    runs[0].close()
    hub.run(jobs(1))


async def fault_of(run: Any) -> Fault:
    with pytest.raises(Fault) as raised:
        async for _ in run:
            pass
    return raised.value


async def test_a_worker_that_ends_gives_its_runs_an_error_and_leaves_the_others_alone():
    hub = hub_of(workers=2)
    lost, kept = hub.run(jobs(2)), hub.run(jobs())
    hub.lost(hub.replicas[0])
    fault = await fault_of(lost)
    assert (fault.status, fault.code) == (500, "worker_died")
    step(hub, hub.replicas[1], output(hub.replicas[1].channel.ids[0], "a", "stop"))
    assert [each.text async for _, each in kept] == ["a"]
    lost.close()
    assert len(hub.replicas[0].channel) == 2, "a worker that is gone is told nothing"


async def test_what_came_before_a_worker_ended_is_still_delivered():
    hub = hub_of()
    run = hub.run(jobs())
    step(hub, hub.replicas[0], output(hub.replicas[0].channel.ids[0], "a"))
    hub.lost(hub.replicas[0])
    assert (await run.__anext__())[1].text == "a"
    assert (await fault_of(run)).status == 500


def refused_prompt(hub: Hub, id: str) -> None:
    step(hub, hub.replicas[0], refused=[(id, "the prompt has 500 tokens")])


def aborted(hub: Hub, id: str) -> None:
    hub.abort()


@pytest.mark.parametrize(
    ("happens", "status", "code"),
    [(refused_prompt, 400, "context_length_exceeded"), (aborted, 503, "draining")],
)
async def test_a_run_that_cannot_go_on_ends_with_a_fault(happens: Callable[[Hub, str], None], status: int, code: str):
    hub = hub_of()
    run = hub.run(jobs())
    happens(hub, hub.replicas[0].channel.ids[0])
    fault = await fault_of(run)
    run.close()
    assert (fault.status, fault.code) == (status, code)
    assert hub.idle


async def test_a_run_that_takes_too_long_ends_also_where_the_worker_says_nothing():
    hub = hub_of(request_timeout=0.05)
    run = hub.run(jobs())
    fault = await fault_of(run)
    run.close()
    assert (fault.status, fault.code) == (504, "timeout")
    assert [type(message) for message in hub.replicas[0].channel] == [EngineRequest, Cancel]


async def test_nobody_is_admitted_while_the_model_loads_or_the_server_is_stopped():
    hub = hub_of()
    hub.replicas[0].ready = None
    assert hub.state == "loading"
    with pytest.raises(Fault) as loading:
        hub.run(jobs())
    hub.replicas[0].ready = READY
    hub.draining = True
    with pytest.raises(Fault) as draining:
        hub.run(jobs())
    assert [(each.value.status, each.value.code) for each in (loading, draining)] == [(503, "loading"), (503, "draining")]


async def test_times_to_tokens_are_measured():
    hub = hub_of()
    run = hub.run(jobs(2))
    first, second = hub.replicas[0].channel.ids
    step(hub, hub.replicas[0], output(first, "a"), output(second, "a", "stop"))
    step(hub, hub.replicas[0], output(first, "b", "length"))
    run.close()
    text = hub.metrics.text().decode()
    assert "bumblebee_first_token_seconds_count 2.0" in text
    assert "bumblebee_further_token_seconds_count 1.0" in text
