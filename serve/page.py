"""The chat page: static files under ``serve/page``, served at ``/`` and ``/page/...``.

`routes()` gives one route a file, for the server's application to mount::

    app.router.routes.extend(page.routes())

The files are read once, when the routes are made: about 400 kB, and no request ever names a path on the disk. There is no
build step: what lies in the folder is what the browser runs.

The page shows text that a model wrote, which may come from anybody. Three walls stand between that text and the reader's
browser: Markdown becomes HTML that DOMPurify strips to a list of harmless elements (``page/markdown.js``); the policy below
lets the browser run, load and ask nothing but this server's own files and routes; and nothing is ever inline, so an
injected script has no way to run. The policy is CSP level 3 (https://www.w3.org/TR/CSP3/) with Trusted Types.

What the page asks of the server: ``GET ready``; ``GET v1/models``, of each model ``id`` and, where given, ``max_model_len``
(the context in tokens), ``defaults`` (the sampling of a request that asks for none) and ``examples`` (questions to begin
with); and streams with usage from ``POST v1/chat/completions`` and ``POST v1/completions``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_suffix("")

# What is served, by suffix; licences, checksums and notes stay on the disk.
TYPES = {
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
    # A string becomes HTML in DOMPurify alone, under its own policy.
    "require-trusted-types-for 'script'",
    "trusted-types dompurify",
)

HEADERS = {
    "Cache-Control": "no-cache",  # keep a copy, but ask each time whether it is still the same: a new version shows at once
    "Content-Security-Policy": "; ".join(POLICY),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[Route]:
    """``/`` for the page, ``/page/NAME`` for what it loads; each answers GET and HEAD."""
    files = sorted(path for path in FOLDER.rglob("*") if path.suffix in TYPES)
    found = [Route(f"/page/{path.relative_to(FOLDER).as_posix()}", endpoint(path)) for path in files]
    return [Route("/", endpoint(FOLDER / "index.html")), *found]


def endpoint(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """What answers with the file; 304 to a browser that has it already."""
    content = path.read_bytes()
    etag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag, "Content-Type": TYPES[path.suffix]}

    async def answer(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return answer
