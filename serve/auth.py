"""API-key authentication (RFC 6750 bearer tokens), and a Host check for servers without a key.

A server that other machines can reach does not start without a key, unless ``without_key`` is set.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from serve.api.errors import APIError, quoted
from serve.serve_options import ServeOptions


class BearerAuth:
    """Checks requests against the server's API keys.

    Args:
        options: the server's; ``api_key``, ``without_key`` and ``host`` are used.

    Raises:
        ValueError: an empty key, or no key on an address that other machines can reach.
    """

    def __init__(self, options: ServeOptions) -> None:
        keys = [options.api_key] if isinstance(options.api_key, str) else options.api_key or []
        if not all(key.strip() for key in keys):
            raise ValueError("api_key is empty: set a key, or omit the option")
        if not keys and not options.without_key and not is_loopback(options.host):
            raise ValueError(
                f"host {options.host} is reachable from other machines: set --api_key KEY,"
                " or --without_key to accept unauthenticated requests"
            )
        self._keys = [key.strip().encode() for key in keys]
        self._loopback_only = not keys and not options.without_key

    def check_key(self, authorization: str | None) -> None:
        """Check the Authorization header of a request, decoded as Latin-1.

        Raises:
            APIError: 401.
        """
        if not self._keys:
            return  # OpenAI's clients always send a key: accept any
        scheme, _, key = (authorization or "").partition(" ")
        # Compare with every key in constant time, so that the duration reveals nothing.
        matches = [hmac.compare_digest(known, key.strip().encode("latin-1")) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            message = "Incorrect API key provided" if key else "Missing API key: send it as Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, message, type="authentication_error", code="invalid_api_key", headers=headers)

    def check_host(self, host: str | None) -> None:
        """Check the Host header of a request to a loopback server without a key: it must name this machine.

        This prevents DNS rebinding: the owner of a web page can make its domain name resolve to 127.0.0.1, and the browser
        then treats this server as part of that page. IP addresses cannot be rebound.

        Raises:
            APIError: 403.
        """
        if host and self._loopback_only and not _cannot_be_rebound(host):
            message = f"Unknown host {quoted(host)}: set --api_key KEY or --without_key to allow other host names"
            raise APIError(403, message, code="unknown_host")


def _cannot_be_rebound(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or name.endswith(".localhost") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
