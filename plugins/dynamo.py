"""What Dynamo is told, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def assume_constant_result(function: Function) -> Function:
    """torch.compiler's decorator, which imports Dynamo: that takes longer than all else here."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
