"""Multiply-adds of the matrix products that kernels do, counted in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def products() -> Iterator[list[int]]:
    """Of each `tl.dot` that runs inside, its multiply-adds, masked ones too. Needs
    TRITON_INTERPRET=1.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    done: list[int] = []
    dot = InterpreterBuilder.create_dot

    def counted(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        done.append(a.data.size * b.data.shape[-1])
        return dot(builder, a, b, *rest)

    with patch.object(InterpreterBuilder, "create_dot", counted):
        yield done
