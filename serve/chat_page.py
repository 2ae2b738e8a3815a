"""The chat page: static files under ``serve/page``, served at ``/`` and ``/page/...``.

`routes()` returns one route per file, for the server's application::

    app.router.routes.extend(chat_page.routes())

The files, about 400 kB, are read once when the routes are created; no request path is ever resolved on the disk. There is no
build step: the browser runs the files as they are.

The page displays text written by a model, which is untrusted. Three layers protect the browser: Markdown is converted to HTML
that DOMPurify reduces to a list of harmless elements (``page/markdown.js``); the content security policy below allows
scripts, resources and requests from this server only; and nothing is inline, so an injected script cannot run. The policy is
CSP level 3 (https://www.w3.org/TR/CSP3/) with Trusted Types.

The page uses ``GET ready``; ``GET v1/models``, of each model ``id`` and, if present, ``max_model_len`` (the context length in
tokens), ``defaults`` (the default sampling parameters) and ``examples`` (example questions); and streams with usage from
``POST v1/chat/completions`` and ``POST v1/completions``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")

# The file types that are served; licences, checksums and notes are not.
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    # Only DOMPurify may convert a string to HTML, under its own policy.
    "require-trusted-types-for 'script'",
    "trusted-types dompurify",
)

HEADERS = {
    "Cache-Control": "no-cache",  # revalidate each time, so that a new version is used at once
    "Content-Security-Policy": "; ".join(POLICY),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[Route]:
    """``/`` for the page and ``/page/NAME`` for its resources; GET and HEAD."""
    files = sorted(path for path in FOLDER.rglob("*") if path.suffix in CONTENT_TYPES)
    resources = [Route(f"/page/{path.relative_to(FOLDER).as_posix()}", endpoint(path)) for path in files]
    return [Route("/", endpoint(FOLDER / "index.html")), *resources]


def endpoint(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """A handler that returns the file, or 304 if the browser has the current version."""
    content = path.read_bytes()
    etag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag, "Content-Type": CONTENT_TYPES[path.suffix]}

    async def handler(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return handler
