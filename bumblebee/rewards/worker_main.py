"""The program of a reward's worker process: unpickles the reward, then scores one completion after another.

Tools run in such processes, too: whatever object has a method ``reply`` is called with one item after another.

Nothing is read from stdin, and stdout is the parent's stderr: what the reward or its child processes read and print does not
mix with the messages, which go through a connection of their own.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol, runtime_checkable

from bumblebee.rewards.reward import (
    CompletionError,
    Failure,
    RewardError,
    RewardFunction,
    RewardInput,
    describe,
    score_all,
)  # fmt: skip
from bumblebee.utils.shared_packages import prefer_ours

ENTRY_POINT = "from bumblebee.rewards.worker_main import main; main()"


@dataclass(frozen=True)
class Reply:
    """What became of a completion, or of the start of a worker.

    Args:
        value: its reward, or the result of a tool; None if there is none.
        what: happened instead, followed by a preposition.
        detail: such as the exception.
        timed_out: whether it took too long.
        invalid: whether the reward returned what is no reward.
    """

    value: float | Failure | str | None = None
    what: str = ""
    detail: str = ""
    timed_out: bool = False
    invalid: bool = False


@runtime_checkable
class Job(Protocol):
    """What worker processes may do besides scoring."""

    def reply(self, item: object, /) -> Reply:
        """Do it for one item."""


def main() -> None:
    """Main loop of a worker; ends when the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    prefer_ours()
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # or child processes of the reward would keep the connection open
    connection = Connection(descriptor)
    reward = _load(connection)
    while reward is not None:
        try:
            each: object = connection.recv()
        except EOFError:
            return
        connection.send(reply_to(reward, each))


def _load(connection: Connection) -> RewardFunction | Job | None:
    """Receive the reward, and say whether this has worked."""
    try:
        reward: RewardFunction | Job = pickle.loads(connection.recv_bytes())
    except EOFError:
        return None
    except Exception as error:
        connection.send(Reply(what="cannot be loaded in a worker process", detail=describe(error)))
        return None
    connection.send(Reply(value=0.0))
    return reward


def reply_to(reward: RewardFunction | Job, each: object) -> Reply:
    """Score a completion, or do another job."""
    if isinstance(reward, Job):
        return reward.reply(each)
    assert isinstance(each, RewardInput)
    try:
        (value,) = score_all(reward, [each])
    except CompletionError as error:
        return Reply(what=error.what, detail=error.detail, invalid=True)
    except RewardError as error:
        return Reply(what=f"{error} on", invalid=True)
    except (Exception, SystemExit) as error:
        return Reply(what="failed on", detail=describe(error))
    return Reply(value)
