"""One key for a binary, whatever was compiled before it.

Triton keeps a binary under a hash of the kernel, of the functions that it calls and of the
constants that these read; but those that a callee reads count only if the callee was hashed
earlier. Processes that start with other kernels would not find each other's binaries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def settle_keys(functions: Iterable[Any]) -> None:
    """Hash what these call before them. What is not Triton's, or is hashed, stays as it is."""
    for function in functions:
        if _is_to_hash(function):
            _hash(function, set())


def _is_to_hash(value: Any) -> bool:
    return getattr(value, "hash", "") is None and hasattr(value, "fn")


def _hash(function: Any, begun: set[int]) -> None:
    begun.add(id(function))
    for name in function.fn.__code__.co_names:
        callee = function.fn.__globals__.get(name)
        if _is_to_hash(callee) and id(callee) not in begun:
            _hash(callee, begun)
    function.cache_key  # noqa: B018 - which it keeps
