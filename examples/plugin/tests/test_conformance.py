from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.trilith_conformance("acme")
def test_conformance(trilith_check: Callable[[], None]) -> None:
    trilith_check()
