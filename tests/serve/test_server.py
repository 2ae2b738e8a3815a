"""The running server: responses, errors, disconnects and limits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.malformed_bodies import MALFORMED
from helpers.server_process import TIMEOUT, Running, completion, serving

LONG = {"max_tokens": 2000, "ignore_eos": True, "temperature": 1.0}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object, which must be the whole response."""
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    return error


# -- responses -----------------------------------------------------------------------------------------------------------


def test_stream_and_full_response_have_the_same_text(server: Running):
    fields = {"max_tokens": 24, "temperature": 1.0, "seed": 7, "n": 2}
    whole = server.complete("The list is", **fields).json()
    with server.stream("The list is", stream_options={"include_usage": True}, **fields) as chunks:
        texts, usage = ["", ""], None
        for chunk in chunks:
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert texts[0] != texts[1]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"] == 48


def test_chat_completion(server: Running):
    body = {"model": "bumblebee", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "ignore_eos": True}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 5


def test_max_tokens_beyond_the_context_end_with_length(server: Running):
    body = {"messages": [{"role": "user", "content": "a " * 990}], "max_completion_tokens": 10**6, "ignore_eos": True}
    answer = server.post("/v1/chat/completions", {"model": "bumblebee", **body}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 2048


def test_echoed_logprobs_equal_a_plain_forward_pass(server: Running, served_folder: Path):
    import torch

    from bumblebee import Bumblebee

    text = "Return a new list " * 90  # longer than a step, and cached after the first request
    ids = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    with torch.no_grad():
        expected = Bumblebee.from_pretrained(served_folder)(torch.tensor([ids]))[0].log_softmax(dim=-1)
    own = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    for fields in ({"max_tokens": 1}, {"max_tokens": 0}, {"max_tokens": 0, "prompt": ids}):
        answer = server.complete(**{"prompt": text, **fields}, echo=True, logprobs=1).json()
        [choice] = answer["choices"]
        values, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert values[0] is None and values[1 : len(ids)] == pytest.approx(own, abs=1e-3)
        best = [max(top.values()) for top in tops[1 : len(ids)]]
        assert best == pytest.approx(expected[:-1].amax(dim=-1).tolist(), abs=1e-3)
        assert len(values) == len(ids) + fields["max_tokens"] and choice["text"].startswith(text)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert server.complete(text, max_tokens=1).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_echoed_logprobs_are_streamed(server: Running):
    fields = {"max_tokens": 4, "ignore_eos": True, "temperature": 0.0, "echo": True, "logprobs": 1}
    whole = server.complete("The list is", **fields).json()["choices"][0]
    with server.stream("The list is", **fields) as chunks:
        parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == whole["text"]
    values = [value for part in parts if part["logprobs"] for value in part["logprobs"]["token_logprobs"]]
    assert values[0] is None and values[1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_tokenizer_info(server: Running):
    info = server.http.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"]) == ("<|endoftext|>", None) and "<|im_start|>" in info["chat_template"]


def test_model_card(server: Running):
    card = server.http.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("bumblebee", "model", 2048)
    assert "examples" not in card
    assert server.http.get("/v1/models/bumblebee").json() == card
    missing = server.http.get("/v1/models/some/other")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_tokenize_and_detokenize(server: Running):
    tokens = server.post("/tokenize", {"prompt": "Return a new list"}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == 2048
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Return a new list"}
    special = server.post("/tokenize", {"prompt": "<|im_start|>user"}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": special}).json() == {"prompt": "<|im_start|>user"}
    assert server.post("/detokenize", {"tokens": special, "skip_special_tokens": True}).json() == {"prompt": "user"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    unknown = server.post("/detokenize", {"tokens": [0, 2**40]})
    assert (unknown.status_code, error_of(unknown)["param"]) == (400, "tokens")


def test_health_and_readiness_need_no_key(server: Running):
    for path, status in (("/health", "ok"), ("/ready", "ready")):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()) == (200, {"status": status})
    assert "bumblebee" in httpx.get(server.url + "/").text.lower()


def test_metrics_count_requests_and_tokens(server: Running):
    before = {name: server.metric(name) for name in ("bumblebee_new_tokens_total", "bumblebee_prompt_tokens_total")}
    usage = server.complete("Count", max_tokens=6, ignore_eos=True).json()["usage"]
    assert server.metric("bumblebee_new_tokens_total") == before["bumblebee_new_tokens_total"] + 6
    assert server.metric("bumblebee_prompt_tokens_total") == before["bumblebee_prompt_tokens_total"] + usage["prompt_tokens"]
    text = server.http.get("/metrics").text
    assert 'bumblebee_http_requests_total{route="/v1/completions",status="200"}' in text
    assert server.metric("bumblebee_first_token_seconds_count") >= 1
    assert server.metric("bumblebee_pages_total") >= server.metric("bumblebee_pages_free") > 0
    server.http.get("/invented/path")
    assert "invented" not in server.http.get("/metrics").text


# -- invalid requests -----------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
GOOD = b'{"model": "bumblebee", "prompt": "Hello", "max_tokens": 2}'
WRONG = {  # name: (method, path, headers, body, status, part of the message)
    "no content type": ("POST", "/v1/completions", {}, GOOD, 415, "application/json"),
    "a form": ("POST", "/v1/completions", {"Content-Type": "application/x-www-form-urlencoded"}, GOOD, 415, "form"),
    "a foreign page": ("POST", "/v1/completions", {**JSON, "Host": "foreign.example:8000"}, GOOD, 403, "--api_key"),
    "compressed": ("POST", "/v1/completions", {**JSON, "Content-Encoding": "gzip"}, GOOD, 415, "gzip"),
    "too large": ("POST", "/v1/completions", JSON, b" " * (5 * 2**20), 413, "4194304 bytes"),
    "far too large": ("POST", "/v1/completions", {**JSON, "Content-Length": str(2**40)}, b"", 413, "4194304 bytes"),
    "another method": ("GET", "/v1/completions", {}, b"", 405, "GET"),
    "another method on a page": ("DELETE", "/v1/models", {}, b"", 405, "DELETE"),
    "an unknown path": ("POST", "/v1/embeddings", JSON, GOOD, 404, "/v1/embeddings"),
    "an unknown model": ("POST", "/v1/completions", JSON, GOOD.replace(b"bumblebee", b"gpt-4"), 404, "gpt-4"),
    "a prompt that is too long": ("POST", "/v1/completions", JSON, GOOD.replace(b"Hello", b"a b " * 2000), 400, "2048"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_request_is_rejected_and_the_next_served(server: Running, name: str):
    method, path, headers, body, status, word = WRONG[name]
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), TIMEOUT) as connection:
        lines = {"Host": "localhost", "Content-Length": str(len(body)), "Connection": "close", **headers}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items()) + "\r\n"
        connection.sendall(head.encode() + body)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, content = received.decode().partition("\r\n\r\n")
    assert head.split()[1] == str(status), received
    error = error_of(httpx.Response(status, headers={"content-type": "application/json"}, content=content))
    assert word in error["message"]
    assert server.complete(max_tokens=2).status_code == 200


def test_malformed_bodies_are_rejected_and_the_next_request_served(server: Running):
    for malformed in MALFORMED:
        response = server.http.post(malformed.path, content=malformed.body, headers=JSON)
        assert 400 <= response.status_code < 500, malformed.name
        error = error_of(response)
        assert error["param"] == malformed.param and malformed.says in error["message"], malformed.name
    assert server.complete(max_tokens=2).status_code == 200
    assert server.count("Traceback") == 0


# -- disconnects ---------------------------------------------------------------------------------------------------------


def test_disconnect_from_a_stream_cancels_it(server: Running):
    with server.stream(**LONG) as chunks:
        next(chunks)
        assert server.metric("bumblebee_running") == 1
    server.wait_for_metric("bumblebee_running", 0)
    assert server.metric("bumblebee_pages_free") + server.metric("bumblebee_pages_cached") == server.metric(
        "bumblebee_pages_total"
    )


def test_disconnect_before_the_response_cancels_it(server: Running):
    before = server.metric("bumblebee_new_tokens_total")
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/completions", completion(n=3, **LONG), timeout=0.3)
    server.wait_for_metric("bumblebee_running", 0)
    assert server.metric("bumblebee_new_tokens_total") < before + 3 * LONG["max_tokens"]
    assert 'status="499"' in server.http.get("/metrics").text


# -- limits ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_server(served_folder: Path) -> Iterator[Running]:
    """A server with one running and two queued requests at most, and an API key."""
    words = ["--max_running", "1", "--max_queue", "2", "--api_key", "key", "--name", "mine", "--max_payload", "1000"]
    words += ["--examples", "How are you?", "Who are you?"]
    with serving(served_folder, *words) as running:
        yield running


def test_full_queue_rejects_until_there_is_room(small_server: Running):
    body = completion(model="mine", stream=True, **LONG)
    streams = [small_server.http.stream("POST", "/v1/completions", json=body) for _ in range(3)]
    running = streams[0].__enter__()
    waiting = [threading.Thread(target=streams[1].__enter__), threading.Thread(target=streams[2].__enter__)]
    for thread in waiting:
        thread.start()
    small_server.wait_for_metric("bumblebee_waiting", 2)
    rejected = small_server.post("/v1/completions", completion(model="mine", max_tokens=1))
    assert (rejected.status_code, rejected.headers["retry-after"]) == (429, "1")
    assert error_of(rejected)["code"] == "queue_full"
    assert small_server.post("/tokenize", {"prompt": "a"}).status_code == 200, "tokenizing needs no worker"
    running.close()
    small_server.wait_for_metric("bumblebee_waiting", 1)
    # There is room for one more, which disconnects while it is queued.
    with pytest.raises(httpx.ReadTimeout):
        small_server.post("/v1/completions", completion(model="mine", **LONG), timeout=0.2)
    for thread, stream in zip(waiting, streams[1:], strict=True):
        thread.join(TIMEOUT)
        stream.__exit__(None, None, None)
    small_server.wait_for_metric("bumblebee_running", 0)
    assert small_server.post("/v1/completions", completion(model="mine", max_tokens=1)).status_code == 200


def test_routes_require_the_api_key(small_server: Running):
    wrong = {"Authorization": "Bearer other"}
    for method, path in (("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/v1/models"), ("GET", "/metrics")):
        rejected = small_server.http.request(method, path, headers=wrong)
        assert (rejected.status_code, error_of(rejected)["code"]) == (401, "invalid_api_key")
    assert {httpx.get(small_server.url + path).status_code for path in ("/health", "/ready", "/")} == {200}
    card = small_server.http.get("/v1/models").json()["data"][0]
    assert (card["id"], card["examples"]) == ("mine", ["How are you?", "Who are you?"])


def test_max_payload(small_server: Running):
    assert small_server.post("/v1/completions", completion("a" * 1000, model="mine")).status_code == 413


@pytest.mark.slow
def test_request_timeout(served_folder: Path):
    with serving(served_folder, "--request_timeout", "1.5") as running:
        with running.stream(**LONG) as chunks:
            last = list(chunks)[-1]
        assert last["error"]["code"] == "timeout"
        whole = running.complete(**LONG)
        assert (whole.status_code, error_of(whole)["code"]) == (504, "timeout")
        assert whole.headers["x-should-retry"] == "false"
        assert running.complete(max_tokens=1).status_code == 200


@pytest.mark.slow
def test_large_bodies_do_not_block_small_requests(server: Running):
    large = completion("a b c " * 400_000)  # half a second each, until rejected as too long
    with ThreadPoolExecutor(12) as threads:
        large_requests = [threads.submit(server.post, "/v1/completions", large) for _ in range(12)]
        time.sleep(0.5)
        assert server.complete(max_tokens=1).status_code == 200
        waiting = [answer for answer in large_requests if not answer.done()]
        assert len(waiting) > 1, "the small request waited for all large ones"
        assert {answer.result().status_code for answer in large_requests} == {400}
