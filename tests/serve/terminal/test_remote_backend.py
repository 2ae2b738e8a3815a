"""The terminal chat with servers: streams, errors and cancellation."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.pseudo_terminal import PseudoTerminal
from helpers.server_process import Running, serving, wait_for

from serve.terminal.backends import Delta
from serve.terminal.remote_backend import RemoteBackend

MESSAGES = [{"role": "user", "content": "Why?"}]


class Stub:
    """A server with scripted responses that records its requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []  # path, headers, body
        self.replies: list[tuple[int, dict[str, str], bytes]] = []  # one per request
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                status, headers, content = stub.replies.pop(0)
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def streams(self, *events: dict[str, Any] | str, length: int | None = None) -> None:
        """Answer the next request with events; ``length`` overrides Content-Length."""
        lines = (event if isinstance(event, str) else json.dumps(event) for event in events)
        content = "".join(f"data: {line}\n\n" for line in lines).encode()
        more = {} if length is None else {"Content-Length": str(length)}
        self.replies.append((200, {"Content-Type": "text/event-stream", **more}, content))

    def refuses(self, status: int, message: str, **headers: str) -> None:
        """Answer the next request with an error."""
        self.replies.append((status, headers, json.dumps({"error": {"message": message, "type": "x"}}).encode()))


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.server.shutdown()
    server.server.server_close()


def chunk(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"id": "a", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


USAGE = {"id": "a", "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}
WHOLE = (chunk("Be"), chunk("es."), chunk(None, "stop"), USAGE, "[DONE]")


def test_conversation_is_sent_and_answers_are_streamed(stub: Stub, talk) -> None:
    stub.streams(*WHOLE)
    stub.streams(*WHOLE)
    words = ("--system_prompt", "Be brief.", "--temperature", "0.5", "--top_k", "5", "--max_new_tokens", "9", "--api_key", "k")
    words += ("--min_new_tokens", "3", "--stop_ids", "[7]", "--include_stop_str_in_output", "true")
    assert talk("--url", stub.url, *words, inputs="Who?\nWhy?") == ("Bees.\nBees.\n", "", 0)
    path, headers, body = stub.requests[1]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer k"
    assert body == {
        "model": "bumblebee", "stream": True, "stream_options": {"include_usage": True},
        "temperature": 0.5, "top_k": 5, "max_tokens": 9,
        "min_tokens": 3, "stop_token_ids": [7], "include_stop_str_in_output": True,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
                     {"role": "assistant", "content": "Bees."}, {"role": "user", "content": "Why?"}],
    }  # fmt: skip


def test_raw_text_uses_the_completions_endpoint(stub: Stub, talk) -> None:
    stub.streams({"choices": [{"index": 0, "text": " fly.", "finish_reason": "stop"}]}, "[DONE]")
    assert talk("--url", f"{stub.url}/other/", "--raw", "true", inputs="The bees") == (" fly.\n", "", 0)
    path, _, body = stub.requests[0]
    assert path == "/other/completions" and body["prompt"] == "The bees" and "messages" not in body


def test_no_key_sends_no_authorization(stub: Stub, talk) -> None:
    for words in ((), ("--api_key", "secret")):
        stub.streams(*WHOLE)
        talk("--url", stub.url, *words, inputs="Why?")
    assert [headers.get("authorization") for _, headers, _ in stub.requests] == [None, "Bearer secret"]


def test_token_count_is_the_servers_usage(stub: Stub) -> None:
    stub.streams(*WHOLE)
    pieces = list(RemoteBackend(stub.url, "bumblebee").stream(MESSAGES, {}))
    assert pieces[:2] == [Delta("Be"), Delta("es.")] and pieces[-1].new_tokens == 2


def test_server_errors_are_one_line_with_advice(stub: Stub, talk) -> None:
    stub.refuses(401, "this key is not known")
    stub.refuses(429, "too many requests wait", **{"Retry-After": "3"})
    stub.refuses(503, "the model is being loaded")
    stub.refuses(404, "The model 'x' does not exist")
    stub.refuses(400, "temperature must be\n at most 2")
    stub.replies.append((502, {"Content-Type": "text/html"}, b"<html>Bad Gateway</html>"))
    stub.streams(*WHOLE)
    out, err, code = talk("--url", stub.url, inputs="Why?\n" + 6 * "/retry\n")
    assert err.splitlines()[:5] == [
        "bumblebee: 401: this key is not known (use --api_key KEY)",
        "bumblebee: 429: too many requests wait (/retry sends it again, in 3 s)",
        "bumblebee: 503: the model is being loaded (/retry sends it again)",
        "bumblebee: 404: The model 'x' does not exist (check --url and --name)",
        "bumblebee: 400: temperature must be at most 2",
    ]
    assert err.splitlines()[5].startswith("bumblebee: 502: ") and err.count("\n") == 6
    assert (out, code) == ("Bees.\n", 1)
    assert [len(body["messages"]) for _, _, body in stub.requests] == 7 * [1]


def test_unreachable_server_is_named(talk) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    out, err, code = talk("--url", f"http://127.0.0.1:{port}", inputs="Why?\n/retry")
    line = f"bumblebee: cannot connect to http://127.0.0.1:{port} (Connection refused): is the server running?\n"
    assert (out, err, code) == ("", 2 * line, 1)


@pytest.mark.parametrize(
    ("events", "length", "why"),
    [
        ((chunk("Be"), {"error": {"message": "its process has ended", "type": "x"}}), None, "its process has ended"),
        ((chunk("Be"),), None, "ended the stream before the answer was complete"),
        ((chunk("Be"),), 5000, "broke off the answer: peer closed"),
        ((chunk("Be"), "{no json"), None, "broke off the answer"),
    ],
)
def test_broken_off_answer_is_kept(stub: Stub, talk, events, length, why: str, tmp_path) -> None:
    stub.streams(*events, length=length)
    out, err, code = talk("--url", stub.url, inputs=f"Why?\n/save {tmp_path}/a.json")
    assert (out, code) == ("Be\n", 1)
    assert why in err.splitlines()[0] and "Traceback" not in err
    assert [one["content"] for one in json.loads((tmp_path / "a.json").read_text())["messages"]] == ["Why?", "Be"]


def test_closing_the_stream_closes_the_connection(stub: Stub) -> None:
    stub.streams(*[chunk("Be")] * 1000)
    pieces = RemoteBackend(stub.url, "bumblebee").stream(MESSAGES, {})
    assert next(pieces) == Delta("Be")
    pieces.close()
    with pytest.raises(StopIteration):
        next(pieces)


def test_empty_answer_is_not_a_turn(stub: Stub, talk) -> None:
    stub.streams(chunk(""), chunk(None, "stop"), "[DONE]")
    stub.streams(*WHOLE)
    out, err, _ = talk("--url", stub.url, inputs="Who?\nWhy?")
    assert out == "Bees.\n" and "/retry" in err
    assert len(stub.requests[1][2]["messages"]) == 1


# -- our own server ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_server_and_folder_give_the_same_answers(server: Running, served_folder: Path, talk) -> None:
    words = ("--temperature", "0", "--max_new_tokens", "12", "--system_prompt", "Be brief.")
    inputs = "Who flies?\nWhy?\n/set min_p 0.1\n/retry"
    remote = talk("--url", server.url, *words, inputs=inputs)
    local = talk(*words, "--model", str(served_folder), inputs=inputs)
    assert remote == local and remote[0].count("\n") >= 3 and remote[2] == 0


@pytest.mark.slow
def test_our_servers_errors_are_one_line_each(server: Running, talk) -> None:
    inputs = f"{'honey ' * 3000}\n/set temperature 3\nWhy?\n/set temperature 0\n/set max_new_tokens 3\nWhy?"
    out, err, code = talk("--url", server.url, inputs=inputs)
    lines = [line for line in err.splitlines() if line.startswith("bumblebee: ")]
    assert code == 1 and out.endswith("\n") and len(lines) == 2
    assert re.match(
        "bumblebee: 400: This model's maximum context length is 2048 tokens.*/reset starts a new conversation", lines[0]
    )
    assert re.match("bumblebee: 400: Invalid value for 'temperature'", lines[1])
    assert talk("--url", server.url, "--name", "other", inputs="Why?")[1].startswith("bumblebee: 404: ")


@pytest.mark.slow
def test_missing_key_is_reported_and_ctrl_c_cancels(served_folder: Path, talk, tmp_path: Path) -> None:
    with serving(served_folder, "--api_key", "secret") as running:
        _, err, _ = talk("--url", running.url, inputs="Why?")
        assert re.fullmatch(r"bumblebee: 401: .* \(use --api_key KEY\)\n", err)
        running.http.headers["Authorization"] = "Bearer secret"
        words = ("--url", running.url, "--api_key", "secret", "--ignore_eos", "true", "--max_new_tokens", "2000")
        chat = PseudoTerminal("chat", *words, state=tmp_path)
        try:
            chat.expect(">")
            chat.type("Why?", "enter")
            wait_for(lambda: running.metric("bumblebee_new_tokens_total") > 50, "an answer")
            chat.more(0.1)
            chat.type("ctrl-c")
            chat.expect("stopped by Ctrl-C")
            chat.expect(">")
            running.wait_for_metric("bumblebee_running", 0)
            assert running.metric("bumblebee_new_tokens_total") < 1900
            chat.type("ctrl-d")
            assert chat.end() == 0
        finally:
            chat.close()
