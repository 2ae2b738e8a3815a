"""Whatever goes wrong with a request is answered in OpenAI's error format, also what FastAPI and Starlette raise themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from serve.api_errors import Fault

LEFT = 499  # nginx's status for a client that has left before the answer; nobody reads it


def install(app: FastAPI) -> None:
    """Answer all errors of an application in the one format."""
    handlers: dict[Any, Any] = {
        Fault: _fault,
        HTTPException: _http,
        RequestValidationError: _unreadable,
        ClientDisconnect: _left,
        Exception: _ours,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def answer(fault: Fault) -> JSONResponse:
    """A fault as an HTTP answer."""
    return JSONResponse(fault.body(), fault.status, fault.headers)


async def _fault(request: Request, error: Fault) -> Response:
    return answer(error)


async def _http(request: Request, error: HTTPException) -> Response:
    """Raised by the router: no such path, or not by this method."""
    said = {
        404: f"there is no {request.url.path} here",
        405: f"{request.method} is not for {request.url.path}",
    }
    headers = dict(error.headers or {})
    return answer(Fault(error.status_code, said.get(error.status_code, str(error.detail)), headers=headers))


async def _unreadable(request: Request, error: RequestValidationError) -> Response:
    return answer(Fault(400, "the request cannot be read"))


async def _left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=LEFT)


async def _ours(request: Request, error: Exception) -> Response:
    """A mistake of ours: the traceback is in the server's log."""
    return answer(Fault(500, "the server has made a mistake; its log tells which", code="internal_error"))
