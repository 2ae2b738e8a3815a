"""Judge: requests to a local endpoint that answers, refuses, hangs, or talks about something else."""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from bumblebee.rewards import Judge, RewardInput
from bumblebee.rewards.reward import CompletionError, Failure
from bumblebee.rl.reward_check import reward_notes
from bumblebee.rl.scoring import WeightedRewards


class Endpoint(ThreadingHTTPServer):
    """Answers "Score: N" with the number of digits in the response that is judged; some responses have effects."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.requests, self.running, self.most = threading.Lock(), [], 0, 0
        self.retried: list[float] = []
        self.release, self.cut = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        with server.lock:
            server.requests.append({**body, "key": self.headers["Authorization"]})
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            self.answer(text)
        finally:
            with server.lock:
                server.running -= 1

    def answer(self, text: str) -> None:
        if "busy" in text:
            self.server.retried.append(time.monotonic())
            if len(self.server.retried) == 1:
                return self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.4"})
        if "hang" in text:
            self.server.release.wait(20)
        if "dribble" in text:
            return self.dribble()
        if "forbidden" in text:
            return self.reply(401, {"error": {"message": "no such key"}})
        if "page" in text:
            return self.reply(200, ["hello"])
        time.sleep(0.03)
        digits = len(re.findall(r"\d", text.partition("<response>")[2].partition("</response>")[0]))
        content = (
            "I like it." if "chat" in text else f'Score: 1? No.\n**Score: {digits}** {{"grade": {{"points": "{digits}"}}}}'
        )
        content = content if "json" not in text else f'```json\n{{"points": {digits}.5}}\n```'
        return self.reply(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]})

    def dribble(self) -> None:
        """A byte now and then, so that no read takes long."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            while not self.server.release.wait(0.05):
                self.wfile.write(b" ")
        except OSError:
            self.server.cut.set()

    def reply(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, header)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def inputs(*texts: str) -> list[RewardInput]:
    return [RewardInput("2 + 2?", text, {"answer": 4}) for text in texts]


def test_scores_are_scaled_and_equal_questions_asked_once(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge(endpoint.url, "m", concurrency=3, api_key_env="JUDGE_KEY", options={"max_tokens": 9})
    texts = [f"{'7' * digits}" for digits in range(11)]
    assert judge.score(inputs(*texts, *texts)) == [digits / 10 for digits in range(11)] * 2
    assert judge.score(inputs("77")) == [0.2]
    assert len(endpoint.requests) == 11 and endpoint.most == 3
    assert all(request["key"] == "Bearer secret" and request["max_tokens"] == 9 for request in endpoint.requests)
    assert all(request["model"] == "m" and "2 + 2?" in request["messages"][0]["content"] for request in endpoint.requests)
    assert pickle.loads(pickle.dumps(judge)).score(inputs("7")) == [0.1]


def test_template_and_json_key_are_the_users(endpoint):
    template = 'json {{"a": 1}} {answer} {prompt} <response>{completion}</response>'
    judge = Judge(endpoint.url, "m", template=template, score_key="points", scale=(0, 5))
    assert judge.score(inputs("77 {x}")) == [0.5]
    assert endpoint.requests[0]["messages"][0]["content"] == 'json {"a": 1} 4 2 + 2? <response>77 {x}</response>'
    assert Judge(endpoint.url, "m", score_key="grade", on_error=-1.0).score(inputs("7"))[0].value == -1.0
    with pytest.raises(CompletionError, match="needs 'gold', which is not in the record, for a completion: its keys: 'answer'"):
        Judge(endpoint.url, "m", template="{gold} {completion}").score(inputs("a"))


def test_a_refused_request_waits_as_the_server_asks(endpoint):
    assert Judge(endpoint.url, "m").score(inputs("busy 7")) == [0.1]
    first, second = endpoint.retried
    assert second - first >= 0.4


def test_failures_cost_their_own_completion_only(endpoint):
    judge = Judge(endpoint.url, "m", timeout=2.0, retries=0, on_timeout=0.25, on_error=0.75)
    texts = ["7", "hang", "chat", "forbidden", "page", "9" * 12]
    good, hanging, chatting, forbidden, page, high = judge.score(inputs(*texts))
    assert good == 0.1
    assert hanging == Failure(0.25, "timed out on", f"{endpoint.url} did not answer in 1 attempt of 2 s", timed_out=True)
    assert chatting == Failure(0.75, "failed on", "no score in the answer 'I like it.'")
    assert "answered 401" in forbidden.detail and "no such key" in forbidden.detail
    assert "did not answer with a chat completion" in page.detail
    assert "a score of 12, which is not between 0 and 10, in the answer" in high.detail
    with pytest.raises(CompletionError, match="failed on a completion: no score in the answer 'I like it.'"):
        Judge(endpoint.url, "m").score(inputs("chat", "7"))


def test_timeout_bounds_a_request_that_dribbles_bytes(endpoint):
    judge = Judge(endpoint.url, "m", timeout=0.3, retries=0, on_timeout=0.25)
    (failure,) = judge.score(inputs("dribble"))
    assert isinstance(failure, Failure) and (failure.value, failure.timed_out) == (0.25, True)
    assert endpoint.cut.wait(5), "the connection is still open"


def test_a_preview_says_that_the_endpoint_was_asked(endpoint):
    judge = Judge(endpoint.url, "m")
    question = SimpleNamespace(index=0, question="?", record={"answer": "12"}, place="q:1", messages=[], tools=None)
    (lines,) = reward_notes(WeightedRewards([judge], None), [question], lambda text: [])
    assert lines == [
        "its 'answer', 12: reward 0.2", "empty completion: reward 0",
        f"{endpoint.url} was asked for these rewards; --samples 0 asks for none",
    ]  # fmt: skip
    assert len(endpoint.requests) == 2
    assert reward_notes(WeightedRewards([judge], None), [], lambda text: []) == [] and len(endpoint.requests) == 2


def test_an_endpoint_is_checked_before_training(endpoint):
    Judge(endpoint.url, "m").check()
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(ValueError, match=f"cannot connect to {endpoint.url}: .*refused"):
        Judge(endpoint.url, "m", retries=0).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url must begin with http:// or https://, got 'localhost:8000'"),
        ({"template": "{prompt}"}, "template must contain {completion}"),
        ({"template": '{completion} {"score": 1}'}, 'template: {"score"} is not the name of a key; write {{ and }} for braces'),
        ({"template": "{completion"}, "template: expected '}' before end of string; write {{ and }} for braces"),
        ({"score_pattern": "Score"}, "score_pattern 'Score' must have one group, the score; it has 0"),
        ({"score_pattern": "(a)", "score_key": "b"}, "score_pattern and score_key cannot both be set"),
        ({"scale": (5, 5)}, "scale must be the lowest and the highest score, got [5, 5]"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env: the environment variable NO_SUCH_KEY is not set"),
        ({"concurrency": 0}, "concurrency must be at least 1 and retries 0, got 0 and 3"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
    ],
)
def test_judge_refuses_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Judge(**{"base_url": "http://x/v1", "model": "m", **options})
