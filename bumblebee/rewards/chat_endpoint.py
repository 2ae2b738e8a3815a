"""ChatEndpoint: an OpenAI-compatible endpoint, with a limit on the whole time of a request.

The time-outs of httpx are for each read: a server that sends a byte now and then is never cut off. Requests therefore run in an
event loop, which can cancel one at any point, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from importlib import import_module

from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from openai.types.chat import ChatCompletion

# The HTTP client that this version of openai is built on, httpx or httpx2, whose time-outs it knows.
_HTTP = import_module(DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])


class ChatEndpoint:
    """Sends chat completions from any thread.

    Args:
        base_url: of the endpoint.
        api_key: that requests carry.
        retries: of a request that fails.
        timeout: seconds from the beginning of an attempt to the end of its answer.
    """

    def __init__(self, base_url: str, api_key: str, retries: int, timeout: float) -> None:
        self._client = AsyncOpenAI(
            base_url=base_url,
            api_key=api_key,
            max_retries=retries,
            timeout=timeout,
            http_client=_BoundedClient(timeout),
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="chat endpoint", daemon=True).start()

    def answer(self, model: str, text: str, options: Mapping[str, object]) -> ChatCompletion:
        """The answer to a user's message.

        Args:
            model: name in the request.
            text: of the message.
            options: further fields of the request.

        Raises:
            openai.APIError: there is none; ``openai.APITimeoutError`` if the last attempt took too long.
        """
        request = self._client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], extra_body=dict(options)
        )
        return asyncio.run_coroutine_threadsafe(request, self._loop).result()


class _BoundedClient(DefaultAsyncHttpxClient):
    """Limits the time of an attempt: connecting, sending, and reading the whole answer."""

    def __init__(self, seconds: float) -> None:
        super().__init__(timeout=seconds)
        self._seconds = seconds

    async def send(self, *request, **options):  # type: ignore[no-untyped-def]  # types of httpx or httpx2
        """See the base class.

        Raises:
            TimeoutException: the answer is not complete in time; openai sends the request again, as after other errors.
        """
        try:
            return await asyncio.wait_for(super().send(*request, **options), self._seconds)
        except asyncio.TimeoutError:
            raise _HTTP.ReadTimeout(f"no complete answer in {self._seconds:g} s") from None
