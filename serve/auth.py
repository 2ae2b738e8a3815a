"""Who may ask: bearer keys, as OpenAI's clients send them (RFC 6750). A server that others reach does not start without one."""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from serve.api_errors import Fault, shown
from serve.serve_options import ServeOptions


class Keys:
    """The keys of a server.

    Args:
        options: those of them that say who may ask.

    Raises:
        ValueError: an empty key, or none where other machines reach the server.
    """

    def __init__(self, options: ServeOptions) -> None:
        given = [options.api_key] if isinstance(options.api_key, str) else options.api_key or []
        if not all(key.strip() for key in given):
            raise ValueError("api_key is empty: give a key, or leave the option out")
        if not given and not options.without_key and not is_local(options.host):
            raise ValueError(
                f"host {options.host} lets other machines ask: give an --api_key KEY, or --without_key to let everybody"
            )
        self._keys = [key.strip().encode() for key in given]
        self._only_local = not given and not options.without_key

    def check(self, authorization: str | None) -> None:
        """Whether a request's Authorization header, its bytes read as Latin-1, has a key.

        Raises:
            Fault: 401.
        """
        if not self._keys:
            return  # clients must send something: anything will do
        scheme, _, key = (authorization or "").partition(" ")
        # All keys, each in constant time: how long it takes tells nothing.
        right = [hmac.compare_digest(known, key.strip().encode("latin-1")) for known in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            said = "this key is not known" if key else "send a key: Authorization: Bearer KEY"
            raise Fault(401, said, type="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def check_host(self, host: str | None) -> None:
        """Whether a request's Host header names this machine, where nothing but that keeps others out.

        A page in the user's browser may come from a name that its owner lets lead to 127.0.0.1 (DNS rebinding): for the
        browser this server then belongs to the page. Addresses cannot be made to lead elsewhere.

        Raises:
            Fault: 403.
        """
        if host and self._only_local and not _cannot_lead_elsewhere(host):
            said = f"this server is not called {shown(host)}: start it with --api_key KEY or --without_key to let others ask"
            raise Fault(403, said, code="unknown_host")


def _cannot_lead_elsewhere(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
