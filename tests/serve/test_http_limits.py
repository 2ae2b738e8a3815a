"""What a client may keep a server waiting with: the head of a request and its body; and an address that is taken."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serve import http_limits
from serve.api_errors import install_exception_handlers
from serve.http_limits import MAX_HEAD_SIZE, BoundedHTTPProtocol, read_json_body
from serve.http_server import open_listening_socket
from serve.server import print_line

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Of a server that says ok; heads and bodies have 0.3 s."""

    async def answer(request: Request) -> PlainTextResponse:
        if request.method == "POST":
            await read_json_body(request, 1000)
        return PlainTextResponse("ok")

    app = FastAPI(routes=[Route("/", answer, methods=["GET", "POST"])])
    install_exception_handlers(app)
    with pytest.MonkeyPatch.context() as patch, open_listening_socket("127.0.0.1", 0) as bound:
        patch.setattr(http_limits, "HEAD_TIMEOUT", 0.3)
        patch.setattr(http_limits, "BODY_TIMEOUT", 0.3)
        server = uvicorn.Server(uvicorn.Config(app, http=BoundedHTTPProtocol, log_level="error", timeout_keep_alive=1))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        yield bound.getsockname()
        server.should_exit = True
        thread.join()


def answers(client: socket.socket) -> bytes:
    """What comes until the server closes the connection, or for two seconds."""
    client.settimeout(2)
    received = b""
    try:
        while part := client.recv(65536):
            received += part
        return received + b"closed"
    except TimeoutError:
        return received
    except ConnectionResetError:
        return received + b"closed"


@pytest.mark.parametrize("begun", [b"", b"GET /", GET, GET + b"\r\n" + GET])
def test_a_head_that_does_not_arrive_ends_the_connection(address: tuple[str, int], begun: bytes):
    with socket.create_connection(address) as client:
        client.sendall(begun)
        assert answers(client).endswith(b"closed")


def test_a_head_that_trickles_has_no_more_time(address: tuple[str, int]):
    with socket.create_connection(address) as client, pytest.raises(OSError):
        for _ in range(40):
            client.sendall(b"G")
            time.sleep(0.05)


@pytest.mark.parametrize("head", [GET + b"X: " + b"x" * MAX_HEAD_SIZE * 4, GET + b"X: x\r\n" * MAX_HEAD_SIZE])
def test_a_head_of_any_size_is_not_taken(address: tuple[str, int], head: bytes):
    with socket.create_connection(address) as client:
        try:
            client.sendall(head)
        except OSError:  # it has been closed already
            return
        received = answers(client)
    assert received == b"closed" or received.startswith(b"HTTP/1.1 400 ")


def test_requests_that_arrive_whole_are_answered_however_long_the_connection_lives(address: tuple[str, int]):
    with socket.create_connection(address) as client:
        for _ in range(3):
            client.sendall(GET + b"\r\n")
            time.sleep(0.4)
            assert client.recv(65536).endswith(b"ok")
        client.sendall((GET + b"\r\n") * 2)
        assert answers(client).count(b"\r\n\r\nok") == 2


def test_a_body_that_does_not_arrive_is_an_error(address: tuple[str, int]):
    with socket.create_connection(address) as client:
        client.sendall(POST + b"{")
        received = answers(client)
    assert received.startswith(b"HTTP/1.1 408 ") and received.endswith(b"closed"), received


def test_two_servers_cannot_have_one_address():
    with open_listening_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"^port {port} is in use on 127.0.0.1"):
            open_listening_socket("127.0.0.1", port)


def test_printing_to_a_closed_pipe_is_not_an_error(monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    os.close(read)
    file = open(write, "w")
    monkeypatch.setattr(sys, "stdout", file)
    print_line("ready")
    with pytest.raises(BrokenPipeError):
        file.close()  # what it could not write is still there
