"""Limits on the head and body of a request, and the listening socket."""

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
from serve.api.errors import install_exception_handlers
from serve.http_limits import MAX_HEAD_SIZE, BoundedHTTPProtocol, read_json_body
from serve.http_server import open_listening_socket
from serve.server import print_line

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    """Address of a server that returns ok, with timeouts of 0.3 s for heads and bodies."""

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


def receive(client: socket.socket) -> bytes:
    """Everything received until the server closes the connection, or for two seconds."""
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


@pytest.mark.parametrize("sent", [b"", b"GET /", GET, GET + b"\r\n" + GET])
def test_missing_head_closes_the_connection(address: tuple[str, int], sent: bytes):
    with socket.create_connection(address) as client:
        client.sendall(sent)
        assert receive(client).endswith(b"closed")


def test_trickling_head_gets_no_extra_time(address: tuple[str, int]):
    with socket.create_connection(address) as client, pytest.raises(OSError):
        for _ in range(40):
            client.sendall(b"G")
            time.sleep(0.05)


@pytest.mark.parametrize("head", [GET + b"X: " + b"x" * MAX_HEAD_SIZE * 4, GET + b"X: x\r\n" * MAX_HEAD_SIZE])
def test_oversized_head_is_rejected(address: tuple[str, int], head: bytes):
    with socket.create_connection(address) as client:
        try:
            client.sendall(head)
        except OSError:  # already closed
            return
        received = receive(client)
    assert received == b"closed" or received.startswith(b"HTTP/1.1 400 ")


def test_keep_alive_outlasts_the_head_timeout(address: tuple[str, int]):
    with socket.create_connection(address) as client:
        for _ in range(3):
            client.sendall(GET + b"\r\n")
            time.sleep(0.4)
            assert client.recv(65536).endswith(b"ok")
        client.sendall((GET + b"\r\n") * 2)
        assert receive(client).count(b"\r\n\r\nok") == 2


def test_missing_body_times_out(address: tuple[str, int]):
    with socket.create_connection(address) as client:
        client.sendall(POST + b"{")
        received = receive(client)
    assert received.startswith(b"HTTP/1.1 408 ") and received.endswith(b"closed"), received


def test_two_servers_cannot_share_an_address():
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
        file.close()  # its buffer still holds the line
