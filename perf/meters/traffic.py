"""Bytes that kernels move, counted in Triton's interpreter.

Every access of global memory passes one of four methods of `InterpreterBuilder`. Each is wrapped to
note which bytes it touches. Two figures come of it:

`total`, what device memory must deliver
- Per launch and tensor, the distinct bytes read plus the distinct bytes written.
- What several programs read (weights, keys and values) counts once: the cache serves it.
- A byte that only one program reads counts again when that program reads it again after touching
  more than its share of the L2 cache: programs that run side by side cannot all keep theirs.
- A tensor that one launch writes and a later one reads (partial sums) is scratch: counted apart,
  and left out of the total while it fits in half of the L2 cache.
- PyTorch's operators count too, each operand once, so that a hidden copy shows.

`requested`, what the programs ask of the cache
- Every access counts, so that a second pass over a row shows also where the cache holds the row.
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
from torch import Tensor
from torch.utils._pytree import tree_leaves

from perf.meters.aten import operators

L2_BYTES = 50_000_000
RESIDENT_PROGRAMS = 2 * 132
_L2_SHARE = L2_BYTES // RESIDENT_PROGRAMS


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
    requested: int = 0


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

    @property
    def requested(self) -> int:
        return sum(launch.requested for launch in self.launches)

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
    """One storage during one launch.

    Of each byte: whether it was written, which program read it last, how many bytes that program
    had touched by then, how often it was fetched, and whether several programs read it.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.written = np.zeros(self.size, dtype=bool)
        self.reader = np.full(self.size, -1, dtype=np.int32)
        self.read_at = np.zeros(self.size, dtype=np.int64)
        self.fetches = np.zeros(self.size, dtype=np.int32)
        self.shared = np.zeros(self.size, dtype=bool)

    def touch(self, offsets: np.ndarray, access: _Access, program: int, touched: int) -> None:
        if access.writes:
            self.written[offsets] = True
        if access.reads:
            reader = self.reader[offsets]
            far = touched - self.read_at[offsets] > _L2_SHARE
            self.shared[offsets] |= (reader >= 0) & (reader != program)
            self.fetches[offsets] += (reader < 0) | ((reader == program) & far)
            self.reader[offsets] = program
            self.read_at[offsets] = touched

    @property
    def bytes_read(self) -> int:
        return int(np.where(self.shared, 1, self.fetches).sum())


class _Recorder:
    """One launch while it runs."""

    def __init__(self, kernel: str, storages: list[torch.UntypedStorage]) -> None:
        self.kernel = kernel
        self.regions = [_Region(storage) for storage in storages]
        self.programs: dict[tuple[int, ...], int] = {}
        self.touched: Counter[int] = Counter()
        self.requested = 0

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
            if inside.size:
                offsets = (inside[:, None] + np.arange(width)).ravel()
                region.touch(offsets, access, program, self.touched[program])
        self.touched[program] += addresses.size * width
        self.requested += addresses.size * width * (access.reads + access.writes)

    def finish(self) -> Launch:
        launch = Launch(self.kernel, requested=self.requested)
        for region in self.regions:
            read, written = region.bytes_read, int(region.written.sum())
            if read:
                launch.read[region.start] = read
            if written:
                launch.written[region.start] = written
        return launch


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes of every kernel launched inside. Needs TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

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
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        measured.storages.update(storages)
        running.append(_Recorder(executor.fn.__name__, list(storages.values())))
        try:
            return start_launch(executor, *args, **kwargs)
        finally:
            measured.launches.append(running.pop().finish())

    def operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        launch = Launch(name)
        for tensors, moved in (((args, kwargs), launch.read), (result, launch.written)):
            for address, (storage, size) in _operands(tensors).items():
                measured.storages[address] = storage
                moved[address] = size
                launch.requested += size
        measured.launches.append(launch)

    with ExitStack() as patches:
        for access in _ACCESSES:
            patches.enter_context(patch.object(InterpreterBuilder, access.method, wrapped(access)))
        patches.enter_context(patch.object(GridExecutor, "__call__", call))
        patches.enter_context(operators(operator))
        yield measured


def _operands(values: Any) -> dict[int, tuple[torch.UntypedStorage, int]]:
    """Address -> (storage, bytes that the operator touches of it)."""
    found: dict[int, tuple[torch.UntypedStorage, int]] = {}
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor) and tensor.numel():
            storage = tensor.untyped_storage()
            size = min(tensor.numel() * tensor.element_size(), storage.nbytes())
            _, before = found.get(storage.data_ptr(), (storage, 0))
            found[storage.data_ptr()] = (storage, max(before, size))
    return found
