"""ToolCaller: calls tools in worker processes, where a call that takes too long is ended, or in this process."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence

from bumblebee.rewards.worker_main import Reply
from bumblebee.rewards.worker_processes import WorkerProcesses, pickled
from bumblebee.rl.tools import PythonTool, ToolResult
from bumblebee.tokenizer.chat_template import Tool
from bumblebee.tokenizer.tool_call_parser import ParsedCall


class ToolCaller:
    """Some tools.

    Args:
        functions: see ``PythonTool``.
        timeout: seconds for one call, which then runs in a worker process; None calls in this process without a limit.
        processes: number of worker processes.

    Raises:
        ValueError: a number is out of range, two tools have the same name, or one cannot be sent to another process.
    """

    def __init__(self, functions: Sequence[Callable[..., object]], timeout: float | None, processes: int) -> None:
        tools = [PythonTool(function) for function in functions]
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) < len(tools):
            raise ValueError(f"tools: two tools have the same name: {', '.join(tool.name for tool in tools)}")
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"tool_timeout must be positive, or null for none; got {timeout}")
        if processes < 1:
            raise ValueError(f"tool_processes must be at least 1, got {processes}")
        self._workers = None if timeout is None else WorkerProcesses(_pickled(tools), processes, timeout)

    @property
    def descriptions(self) -> list[Tool]:
        """For the chat template."""
        return [tool.description for tool in self._tools.values()]

    def __contains__(self, name: str) -> bool:
        return name in self._tools

    def call(self, calls: Sequence[ParsedCall]) -> list[ToolResult]:
        """Result of each call; an error also for an unknown tool, and for one that takes too long or ends its process.

        Raises:
            RewardError: a worker process cannot start.
        """
        results = [ToolResult(f"Error: there is no tool named {call.name!r}", is_error=True) for call in calls]
        known = [at for at, call in enumerate(calls) if call.name in self]
        if self._workers is None:
            for at in known:
                results[at] = self._tools[calls[at].name].call(calls[at].arguments)
            return results
        for index, reply in self._workers.replies([(calls[at].name, calls[at].arguments) for at in known]):
            failed = ToolResult(
                f"Error: {reply.what.rpartition(' ')[0]}{f': {reply.detail}' if reply.detail else ''}", is_error=True
            )
            results[known[index]] = failed if reply.value is None else ToolResult(str(reply.value), reply.invalid)
        return results


class _Calls:
    """What a worker process does: call a tool."""

    def __init__(self, tools: dict[str, PythonTool]) -> None:
        self.tools = tools

    def reply(self, item: object, /) -> Reply:
        """Call a tool.

        Args:
            item: its name and arguments.
        """
        assert isinstance(item, tuple)
        name, arguments = item
        result = self.tools[name].call(arguments)
        return Reply(result.text, invalid=result.is_error)


def _pickled(tools: Sequence[PythonTool]) -> bytes:
    for tool in tools:
        pickled(tool, tool.function, f"tools: {tool.name}", "set tool_timeout to null")
    return pickle.dumps(_Calls({tool.name: tool for tool in tools}))
