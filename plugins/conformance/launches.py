"""Checks of what an op's kernels touch: memory beyond a tensor, and memory that two write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trilith.plugins.conformance.compare import assert_same, is_differentiable
from trilith.plugins.conformance.support import (
    backward_arguments,
    bound,
    has_gradient,
    named_check,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample

_BAND = 4096  # more than a tile: a store without a mask shows before it spoils the heap
_ALLOCATES = ("empty", "new_empty", "zeros", "new_zeros", "full", "new_full", "ones", "new_ones")


@named_check
def guard_bands(op: Op, sample: Sample) -> None:
    """Every tensor, given or allocated inside, lies between bands that nothing writes or reads."""
    args = bound(op, sample)
    if op.choose(*args) is None:
        return
    bands = _Bands()
    torch.manual_seed(2)
    actual = forward_and_backward(op, [bands.around(a) if _is_dense(a) else a for a in args], bands)
    bands.check()  # first: without bands a stray store may end the process
    torch.manual_seed(2)
    expected = forward_and_backward(op, args)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"result {i} between guard bands", a, e)


def forward_and_backward(op: Op, args: Sequence[Any], bands: _Bands | None = None) -> list[Tensor]:
    """Results of forward and backward without the dispatcher between."""
    provider = op.choose(*args)
    assert provider is not None
    with ExitStack() as stack:
        if bands is not None:
            stack.enter_context(bands)
        results = op.torch_ops.run_forward(*args, provider)
        if not has_gradient(op, args):
            return results
        outputs = results[: op.spec.outputs]
        grads = [torch.randn_like(o) if is_differentiable(o) else None for o in outputs]
        call = backward_arguments(op, args, provider, results, grads)
        return results + (op.torch_ops.run_backward(*call) if any(call[-1]) else [])


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0 and 0 not in value.stride()


class _Bands(TorchDispatchMode):
    """Puts each tensor that is allocated inside between two bands."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[Tensor, int, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").removesuffix("_like")
        allocates = name.removesuffix("_strided") in _ALLOCATES
        if allocates and isinstance(result, Tensor) and result.numel():
            return self.around(result)
        return result

    def around(self, tensor: Tensor) -> Tensor:
        extent = _extent(tensor)
        with torch.utils._python_dispatch._disable_current_modes():
            wide = torch.full(
                (extent + 2 * _BAND,), _filler(tensor), dtype=tensor.dtype, device=tensor.device
            )
            inner = wide.as_strided(tensor.shape, tensor.stride(), _BAND).copy_(tensor.detach())
        self._buffers.append((wide, extent, f"{tuple(tensor.shape)} {tensor.dtype}"))
        return inner

    def check(self) -> None:
        for wide, extent, what in self._buffers:
            for side, band in (("before", wide[:_BAND]), ("after", wide[_BAND + extent :])):
                filler = torch.full_like(band, _filler(wide))
                touched = band.view(torch.uint8) != filler.view(torch.uint8)
                elements = int(touched.view(len(band), -1).any(1).sum())
                assert not elements, f"{elements} elements {side} a tensor {what} were written"


def _filler(tensor: Tensor) -> float | int:
    if tensor.is_floating_point():
        return float("nan")
    return 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3


@dataclass
class Launch:
    """One start of a Triton kernel: the elements that each program wrote, by address."""

    kernel: str
    grid: tuple[int, ...]
    tensors: list[Tensor]
    writers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    contested: set[int] = field(default_factory=set)
    strays: int = 0  # elements read outside of the tensors

    def __post_init__(self) -> None:
        self._starts, self._ends = _extents(self.tensors)

    def read(self, addresses: np.ndarray) -> None:
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        self.strays += int((~((at >= 0) & (addresses < self._ends[at]))).sum())

    def wrote(self, addresses: np.ndarray, program: tuple[int, ...]) -> None:
        for address in addresses.tolist():
            if self.writers.setdefault(address, program) != program:
                self.contested.add(address)


def _extents(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the memory that tensors span, ascending and apart; never empty."""
    apart: list[list[int]] = [[0, 0]]
    spans = [(t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size()) for t in tensors]
    for start, end in sorted(spans):
        if start <= apart[-1][1]:
            apart[-1][1] = max(end, apart[-1][1])
        else:
            apart.append([start, end])
    starts, ends = zip(*apart, strict=True)
    return np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)


def _extent(tensor: Tensor) -> int:
    """Elements from the first one to the last, of memory."""
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches inside, where Triton's interpreter runs the kernels; else none."""
    try:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
    except ImportError:
        yield []
        return
    launches: list[Launch] = []
    start = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        grid = executor.grid if isinstance(executor.grid, tuple) else ()
        launches.append(Launch(executor.fn.__name__, grid, tensors))
        return start(executor, *args, **kwargs)

    def touched(ptrs: Any, mask: Any) -> np.ndarray:
        addresses = np.asarray(ptrs.data, dtype=np.int64)
        return addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]

    def masked_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].read(touched(ptrs, mask))
        return load(builder, ptrs, mask, *rest)

    def masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].wrote(touched(ptrs, mask), tuple(builder.grid_idx))
        return store(builder, ptrs, value, mask, *rest)

    def atomic_rmw(builder: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].wrote(touched(ptr, mask), tuple(builder.grid_idx))
        return atomic(builder, op, ptr, val, mask, *rest)

    with (
        patch.object(GridExecutor, "__call__", call),
        patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        patch.object(InterpreterBuilder, "create_atomic_rmw", atomic_rmw),
    ):
        yield launches


def _launches_of(op: Op, sample: Sample) -> list[Launch]:
    """Those of forward and backward; none where the reference runs the call."""
    args = bound(op, sample)
    if op.choose(*args) is None:
        return []
    with recorded() as launches:
        forward_and_backward(op, args)
    return launches


@named_check
def reads_stay_inside(op: Op, sample: Sample) -> None:
    """No kernel reads outside of its tensors, also where nobody uses what it reads.

    Seen where Triton's interpreter runs the kernels: on a GPU it is an illegal access, some day.
    """
    for launch in _launches_of(op, sample):
        assert not launch.strays, (
            f"{launch.kernel} reads {launch.strays} elements outside of its tensors"
        )


@named_check
def writes_are_disjoint(op: Op, sample: Sample) -> None:
    """No element is written by two programs, by atomics neither, nor is part of two arguments and
    written.

    Seen where Triton's interpreter runs the kernels: on a GPU such a race may pass by luck.
    """
    for launch in _launches_of(op, sample):
        assert not launch.contested, (
            f"{launch.kernel} writes {len(launch.contested)} elements by more than one program"
        )
        assert all(n <= 65535 for n in launch.grid[1:]), f"{launch.kernel}: grid {launch.grid}"
        written = np.fromiter(launch.writers, dtype=np.int64)
        touched = [np.intersect1d(written, _addresses(t)) for t in launch.tensors]
        for (i, one), (j, other) in itertools.combinations(enumerate(touched), 2):
            shared = np.intersect1d(one, other)
            assert not shared.size, (
                f"{launch.kernel} writes {shared.size} elements that its tensors {i} and {j} share"
            )


def _addresses(tensor: Tensor) -> np.ndarray:
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    return tensor.data_ptr() + np.unique(offsets) * tensor.element_size()
