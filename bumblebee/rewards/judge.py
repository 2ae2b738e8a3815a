"""Judge: a language model behind an OpenAI-compatible endpoint scores completions."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from string import Formatter
from typing import TYPE_CHECKING

from bumblebee.rewards.in_workers import check_on_failure
from bumblebee.rewards.passage import compiled
from bumblebee.rewards.reward import CompletionError, Failure, InputReward, OnFailure, RewardInput
from bumblebee.utils.formatting import plural

if TYPE_CHECKING:
    from bumblebee.rewards.chat_endpoint import ChatEndpoint

TEMPLATE = """Rate the response to the request below from 0 to 10, where 10 is correct, complete and helpful, and 0 is useless.

<request>
{prompt}
</request>

<response>
{completion}
</response>

Give a short reason. End with a line of the form "Score: N"."""
PATTERN = r"Score:\s*\**\s*(-?\d+(?:\.\d+)?)"


class Judge(InputReward):
    """Score of a completion by a language model, scaled to 0..1.

    Questions are sent as chat completions, several at a time. Equal questions are asked once in a run. Requests that fail with
    status 408, 409, 429 or 5xx, without a connection, or by a time-out are repeated after increasing pauses, or after the
    time that the server requests by ``Retry-After``. Before training, one request checks that the endpoint answers.

    Args:
        base_url: of the endpoint, such as http://localhost:8000/v1 of ``bumblebee serve``.
        model: name in the requests.
        template: of the question; ``{prompt}``, ``{completion}`` and keys of the record, such as ``{answer}``, are replaced.
            Other braces are doubled: ``{{``. null asks for a score from 0 to 10.
        score_pattern: regular expression whose group is the score; the last match counts. null finds "Score: N".
        score_key: key of the score instead, in an answer that is or contains a JSON object.
        scale: lowest and highest score, which become 0 and 1. Another score is an error.
        api_key_env: environment variable with the API key; null sends none.
        options: further fields of the requests, such as max_tokens; null sends a temperature of 0.
        concurrency: maximum number of simultaneous requests, on each rank.
        retries: of a request that fails.
        timeout: seconds of one attempt, to the end of its answer.
        on_timeout: reward if the last attempt times out, or "stop" to end the run.
        on_error: reward if the last attempt fails, or the answer has no score, or "stop" to end the run.

    Raises:
        ValueError: an option that cannot be used, or the environment variable is not set.
    """

    can_fail = waits = True

    def __init__(
        self,
        base_url: str,
        model: str,
        template: str | None = None,
        score_pattern: str | None = None,
        score_key: str | None = None,
        scale: tuple[float, float] = (0.0, 10.0),
        api_key_env: str | None = None,
        options: dict[str, object] | None = None,
        concurrency: int = 16,
        retries: int = 3,
        timeout: float = 60.0,
        on_timeout: OnFailure = "stop",
        on_error: OnFailure = "stop",
    ) -> None:
        self.base_url, self.model, self.template = base_url, model, TEMPLATE if template is None else template
        self.score_key, self.scale, self.api_key_env = score_key, scale, api_key_env
        self.options: dict[str, object] = {"temperature": 0.0} if options is None else options
        self.concurrency, self.retries, self.timeout = concurrency, retries, timeout
        self.on_timeout, self.on_error = on_timeout, on_error
        self._check_options(score_pattern)
        self.pattern = compiled("score_pattern", PATTERN if score_pattern is None else score_pattern)
        if self.pattern.groups != 1:
            raise ValueError(f"score_pattern {score_pattern!r} must have one group, the score; it has {self.pattern.groups}")
        self._client: ChatEndpoint | None = None
        self._scores: dict[str, float] = {}

    def _check_options(self, score_pattern: str | None) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}")
        if score_pattern is not None and self.score_key is not None:
            raise ValueError("score_pattern and score_key cannot both be set")
        if not self.scale[0] < self.scale[1]:
            raise ValueError(f"scale must be the lowest and the highest score, got {list(self.scale)}")
        if self.concurrency < 1 or self.retries < 0:
            raise ValueError(f"concurrency must be at least 1 and retries 0, got {self.concurrency} and {self.retries}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be positive, got {self.timeout}")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(f"api_key_env: the environment variable {self.api_key_env} is not set")
        check_on_failure("on_timeout", self.on_timeout)
        check_on_failure("on_error", self.on_error)
        if "completion" not in _fields(self.template):
            raise ValueError("template must contain {completion}")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_client": None}  # connections cannot be pickled

    # -- rewards ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Ask something.

        Raises:
            ValueError: the endpoint does not answer.
        """
        try:
            self._answer("Reply with OK.")
        except _RequestFailed as error:
            raise ValueError(str(error)) from error

    def score(self, inputs: Sequence[RewardInput]) -> list[float | Failure]:
        """See the class.

        Raises:
            CompletionError: a completion has no score, and the option for that is "stop".
            ValueError: a record lacks a key of the template.
        """
        texts = [self._question(index, each) for index, each in enumerate(inputs)]
        first = {text: index for index, text in reversed([*enumerate(texts)])}
        values: dict[str, float | Failure] = {}
        for text, outcome in self._outcomes([text for text in first if text not in self._scores]):
            if isinstance(outcome, float):
                self._scores[text] = outcome
            else:
                values[text] = self._failure(first[text], outcome)
        return [values[text] if text in values else self._scores[text] for text in texts]

    def _outcomes(self, texts: Sequence[str]) -> Iterator[tuple[str, float | _RequestFailed]]:
        """Yield (question, score or reason why there is none) in the order in which answers arrive."""
        self._connected()
        threads = ThreadPoolExecutor(self.concurrency)
        try:
            pending: dict[Future[float], str] = {threads.submit(self._ask, text): text for text in texts}
            for future in as_completed(pending):
                try:
                    yield pending[future], future.result()
                except _RequestFailed as error:
                    yield pending[future], error
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _failure(self, index: int, error: _RequestFailed) -> Failure:
        value, what = (self.on_timeout, "timed out on") if error.timed_out else (self.on_error, "failed on")
        if value == "stop":
            raise CompletionError(index, what, str(error)) from error
        return Failure(float(value), what, str(error), error.timed_out)

    def _question(self, index: int, each: RewardInput) -> str:
        values = {**each.record, "prompt": each.prompt, "completion": each.completion}
        try:
            return self.template.format(**{name: values[name] for name in _fields(self.template)})
        except KeyError as error:
            keys = f"its keys: {', '.join(map(repr, each.record))}"
            raise CompletionError(index, f"needs {error}, which is not in the record, for", keys) from None

    # -- requests --------------------------------------------------------------------------------------------------------

    def _ask(self, text: str) -> float:
        answer = self._answer(text)
        low, high = self.scale
        score = self._score_in(answer)
        if score is None or not low <= score <= high:
            problem = "no score" if score is None else f"a score of {score:g}, which is not between {low:g} and {high:g},"
            raise _RequestFailed(f"{problem} in the answer {_shown(answer)}")
        return (score - low) / (high - low)

    def _score_in(self, answer: str) -> float | None:
        if self.score_key is not None:
            return _number(_json_object(answer).get(self.score_key))
        found = self.pattern.findall(answer)
        return _number(found[-1]) if found else None

    def _answer(self, text: str) -> str:
        import openai

        try:
            reply = self._connected().answer(self.model, text, self.options)
            return (reply.choices[0].message.content if reply.choices else None) or ""
        except openai.APITimeoutError:
            attempts = plural(self.retries + 1, "attempt")
            raise _RequestFailed(f"{self.base_url} did not answer in {attempts} of {self.timeout:g} s", True) from None
        except openai.APIStatusError as error:
            no_path = error.status_code == 404 and not self.base_url.rstrip("/").endswith("/v1")
            hint = " (is /v1 missing at the end of base_url?)" if no_path else ""
            raise _RequestFailed(f"{self.base_url} answered {error.status_code}: {_shown(error.message)}{hint}") from None
        except openai.APIConnectionError as error:
            raise _RequestFailed(f"cannot connect to {self.base_url}: {_first_cause(error)}") from None
        except (openai.APIError, AttributeError, TypeError) as error:  # the answer is not a chat completion
            raise _RequestFailed(f"{self.base_url} did not answer with a chat completion: {_shown(str(error))}") from None

    def _connected(self) -> ChatEndpoint:
        from bumblebee.rewards.chat_endpoint import ChatEndpoint

        if self._client is None:
            key = os.environ[self.api_key_env] if self.api_key_env else "none"
            self._client = ChatEndpoint(self.base_url, key, self.retries, self.timeout)
        return self._client


class _RequestFailed(ValueError):
    """There is no score."""

    def __init__(self, reason: str, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


def _fields(template: str) -> list[str]:
    """Names in braces.

    Raises:
        ValueError: a brace that is not closed, or what is no name.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template: {error}; write {{{{ and }}}} for braces") from None
    if wrong := [name for name in names if not re.fullmatch(r"\w+", name)]:
        raise ValueError(f"template: {{{wrong[0]}}} is not the name of a key; write {{{{ and }}}} for braces")
    return names


def _json_object(text: str) -> Mapping[str, object]:
    """The last JSON object in a text; an empty one if there is none."""
    decoder, objects, at = json.JSONDecoder(), [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
            objects.append(value)
        except ValueError:
            end = at + 1
        at = text.find("{", end)
    return objects[-1] if objects else {}


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        return None


def _first_cause(error: BaseException) -> str:
    """Why connecting failed: asynchronous clients report first that all addresses failed, and below it why each of them did."""
    causes = [*getattr(error, "exceptions", ()), error.__cause__, error.__context__]
    cause = next((each for each in causes if isinstance(each, BaseException)), None)
    if cause is not None:
        return _first_cause(cause)
    code = error.errno if isinstance(error, OSError) else None
    return f"[Errno {code}] {os.strerror(code)}" if code and code > 0 else str(error)


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 160 else f"...{text[-160:]}")
