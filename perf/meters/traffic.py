"""Bytes that Triton kernels move, counted in Triton's interpreter.

Every access of global memory passes one of four methods of `InterpreterBuilder`. Each is wrapped to
note which bytes it touches. Per launch and tensor we count distinct bytes read and distinct bytes
written: what device memory must deliver if nothing is fetched twice.

- A byte that one program reads again counts again if the programs that run side by side cannot
  all keep what they touch in the L2 cache.
- What several programs read (weights, keys and values) is taken to be served by the cache.
- A tensor that one launch writes and a later one reads (partial sums) is scratch: counted apart,
  and left out of the total while it fits in half of the L2 cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

L2_BYTES = 50_000_000
RESIDENT_PROGRAMS = 2 * 132


class _Access(NamedTuple):
    """A method of InterpreterBuilder: the positions of its arguments, and what it does."""

    method: str
    pointer: int
    mask: int | None
    reads: bool
    writes: bool


_ACCESSES = (
    _Access("create_masked_load", pointer=0, mask=1, reads=True, writes=False),
    _Access("create_masked_store", pointer=0, mask=2, reads=False, writes=True),
    _Access("create_atomic_rmw", pointer=1, mask=3, reads=True, writes=True),
    _Access("create_atomic_cas", pointer=0, mask=None, reads=True, writes=True),
)


@dataclass
class Launch:
    """Bytes of one kernel launch, by storage address."""

    kernel: str
    read: Counter[int] = field(default_factory=Counter)
    written: Counter[int] = field(default_factory=Counter)


@dataclass
class Traffic:
    """All launches inside one `with traffic():` block."""

    launches: list[Launch] = field(default_factory=list)
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    @property
    def scratch(self) -> int:
        return sum(self._bytes(address) for address in self._cached_scratch())

    @property
    def total(self) -> int:
        cached = self._cached_scratch()
        return sum(self._bytes(address) for address in self.storages if address not in cached)

    def _bytes(self, address: int) -> int:
        return sum(launch.read[address] + launch.written[address] for launch in self.launches)

    def _cached_scratch(self) -> set[int]:
        written: set[int] = set()
        scratch: set[int] = set()
        for launch in self.launches:
            scratch |= written & set(launch.read)
            written |= set(launch.written)
        return {a for a in scratch if 2 * self.storages[a].nbytes() <= L2_BYTES}


class _Region:
    """One storage during one launch: which bytes are touched, and which program read each last."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.read = np.zeros(self.size, dtype=bool)
        self.written = np.zeros(self.size, dtype=bool)
        self.reader = np.full(self.size, -1, dtype=np.int32)
        self.repeated = 0


class _Recorder:
    """One launch while it runs."""

    def __init__(self, kernel: str, storages: list[torch.UntypedStorage]) -> None:
        self.kernel = kernel
        self.regions = [_Region(storage) for storage in storages]
        self.programs: dict[tuple[int, ...], int] = {}
        self.footprint: Counter[int] = Counter()

    def touch(self, access: _Access, args: tuple[Any, ...], grid_index: tuple[int, ...]) -> None:
        pointers = args[access.pointer]
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data, dtype=np.int64)
        mask = None if access.mask is None else args[access.mask]
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = np.unique(addresses)
        program = self.programs.setdefault(tuple(grid_index), len(self.programs))
        for region in self.regions:
            inside = addresses - region.start
            inside = inside[(inside >= 0) & (inside < region.size)]
            offsets = (inside[:, None] + np.arange(width)).ravel()
            if access.writes:
                region.written[offsets] = True
            if access.reads:
                again = int((region.reader[offsets] == program).sum())
                region.repeated += again
                region.reader[offsets] = program
                region.read[offsets] = True
                self.footprint[program] += offsets.size - again

    def finish(self) -> Launch:
        widest = max(self.footprint.values(), default=0)
        cached = widest * RESIDENT_PROGRAMS <= L2_BYTES
        launch = Launch(self.kernel)
        for region in self.regions:
            read = int(region.read.sum()) + (0 if cached else region.repeated)
            written = int(region.written.sum())
            if read:
                launch.read[region.start] = read
            if written:
                launch.written[region.start] = written
        return launch


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes of every kernel launched inside. Needs TRITON_INTERPRET=1."""
    measured = Traffic()
    running: list[_Recorder] = []
    start_launch = GridExecutor.__call__

    def wrapped(access: _Access) -> Callable[..., Any]:
        original = getattr(InterpreterBuilder, access.method)

        def method(builder: Any, *args: Any, **kwargs: Any) -> Any:
            running[-1].touch(access, args, builder.grid_idx)
            return original(builder, *args, **kwargs)

        return method

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        measured.storages.update(storages)
        running.append(_Recorder(executor.fn.__name__, list(storages.values())))
        try:
            return start_launch(executor, *args, **kwargs)
        finally:
            measured.launches.append(running.pop().finish())

    with ExitStack() as patches:
        for access in _ACCESSES:
            patches.enter_context(patch.object(InterpreterBuilder, access.method, wrapped(access)))
        patches.enter_context(patch.object(GridExecutor, "__call__", call))
        yield measured
