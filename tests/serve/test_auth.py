"""Bearer tokens, the Host check, and which addresses require a key."""

from __future__ import annotations

import re
from typing import Any

import pytest

from serve.api.errors import APIError
from serve.auth import BearerAuth
from serve.serve_options import ServeOptions


def auth(**options: Any) -> BearerAuth:
    return BearerAuth(ServeOptions("folder", **options))


@pytest.mark.parametrize("authorization", [None, "", "Bearer anything", "Basic eDp5"])
def test_no_key_accepts_any_authorization(authorization: str | None):
    auth().check_key(authorization)


@pytest.mark.parametrize("authorization", ["Bearer first", "bearer second", "Bearer  sécret ".encode().decode("latin-1")])
def test_each_of_several_keys_is_accepted(authorization: str):
    auth(api_key=["first", "second", "sécret"]).check_key(authorization)


@pytest.mark.parametrize(
    "authorization", [None, "", "first", "Bearer", "Bearer ", "Bearer firs", "Bearer firstt", "Basic first", "Bearer \xff"]
)
def test_wrong_authorization_is_rejected(authorization: str | None):
    with pytest.raises(APIError) as caught:
        auth(api_key="first").check_key(authorization)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str):
    auth(host=host).check_key(None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_hosts_need_a_key_or_without_key(host: str):
    with pytest.raises(ValueError, match=rf"^host {re.escape(host)} .*--api_key KEY.*--without_key"):
        auth(host=host)
    auth(host=host, without_key=True).check_key(None)
    auth(host=host, api_key="first").check_key("Bearer first")


@pytest.mark.parametrize(
    "host", [None, "localhost:8000", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000", "a.localhost", "10.0.0.7:80"]
)
def test_local_names_and_addresses_are_accepted_without_a_key(host: str | None):
    auth().check_host(host)


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "localhost.evil.com", "[", "a@b", "localhost."]
)
def test_rebindable_host_names_are_rejected_without_a_key(host: str):
    with pytest.raises(APIError, match="--api_key KEY or --without_key") as caught:
        auth().check_host(host)
    assert caught.value.status == 403
    auth(without_key=True).check_host(host)
    auth(api_key="first").check_host(host)


@pytest.mark.parametrize("key", ["", "  ", ["first", ""]])
def test_empty_key_is_an_error(key: Any):
    with pytest.raises(ValueError, match="api_key is empty"):
        auth(api_key=key)
