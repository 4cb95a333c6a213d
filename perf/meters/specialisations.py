"""How many binaries Triton would compile for launches: by what it specialises a kernel for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trilith.kernels._runtime.launch import observers

_DIVISOR = 16


@contextmanager
def specialisations() -> Iterator[dict[str, set[Any]]]:
    """The distinct keys of each kernel that is launched inside, by its name."""
    keys: defaultdict[str, set[Any]] = defaultdict(set)

    def observe(kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = kernel.fn.__code__.co_varnames
        constant = {n for n, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)}
        given = [a if n in constant else _key(a) for n, a in zip(names, args, strict=False)]
        keys[kernel.fn.__name__].add((*given, *sorted(options.items())))

    observers.append(observe)
    try:
        yield keys
    finally:
        observers.remove(observe)


def _key(value: Any) -> Any:
    """What a runtime argument is specialised for; `do_not_specialize` is not known here."""
    if isinstance(value, tuple):
        return tuple(map(_key, value))
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _DIVISOR == 0
    if isinstance(value, int):
        return value == 1, value % _DIVISOR == 0
    return type(value)
