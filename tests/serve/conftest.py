"""What the server's tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    """What ``pytest.mark.anyio`` runs async tests with."""
    return "asyncio"
