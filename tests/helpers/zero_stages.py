"""ZeRO stages for ``pytest.mark.parametrize``: 0 and 3 in the fast suite, 1 and 2 in the slow suite."""

from __future__ import annotations

import pytest

EACH_STAGE = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
