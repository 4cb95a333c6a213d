"""The launches that samples of `tests/kernels/shapes_*.py` make, each distinct compilation once.

The ops run on fake tensors, and each launch is specialised as Triton's own JIT specialises it.
Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import collections
import importlib
import math
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.architectures import LAUNCHED_AS, MULTIPROCESSORS, assume_target
from tests.support.binary import Report
from tests.support.entries import Entry, looked_up

KERNEL_TESTS = Path(__file__).parents[1] / "kernels"


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor argument: what the JIT looks at when it specialises."""

    dtype: torch.dtype
    offset: int
    size: int

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.size


@dataclass
class Launch:
    """One distinct compilation: a kernel with specialised arguments, on one architecture."""

    op: str
    sample: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    arch: str
    entry: Entry | None = None  # of attention's tables


def cases(source: str = "") -> Iterator[tuple[str, Any]]:
    """(op name, Sample) of every `shapes_*.py`, or of one module; call under a FakeTensorMode."""
    if source:
        yield from importlib.import_module(source).cases()
        return
    for module in sorted(pkgutil.iter_modules([str(KERNEL_TESTS)]), key=lambda m: m.name):
        if module.name.startswith("shapes_"):
            yield from importlib.import_module(f"tests.kernels.{module.name}").cases()


def import_kernels() -> None:
    """Register every family's ops: nothing is loaded later, on fake tensors."""
    from trilith.plugins import manager

    manager.load()


def captured(arch: str, name: str = "", source: str = "") -> tuple[list[Launch], list[Report]]:
    """The distinct launches that the cases make on `arch`, and cases that failed before any."""
    from trilith.kernels._runtime import device, launch
    from trilith.plugins import registry

    found: dict[Any, Launch] = {}
    failures: list[Report] = []
    op_name, sample = "", None
    entries: list[Entry] = []

    def observe(kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        entry = entries.pop() if entries else None
        if name not in kernel.__name__ and name not in op_name:
            return
        args = tuple(_stand_in(a) for a in args)
        key = (kernel.__name__, kernel.__module__, _specialised(kernel, args, options))
        one = Launch(op_name, repr(sample), kernel, args, dict(options), arch, entry)
        found.setdefault(key, one)

    assume_target(arch)
    device._INTERPRETED_MULTIPROCESSORS = MULTIPROCESSORS[arch]
    launch.observers.append(observe)
    try:
        tables = LAUNCHED_AS.get(arch, arch)
        with FakeTensorMode(), device.assume_architecture(tables), looked_up(entries):
            for op_name, sample in cases(source):
                try:
                    _run(registry.op(op_name), sample)
                except Exception as error:
                    problem = f"running on fake tensors: {type(error).__name__}: {error}"
                    failures.append(
                        Report(op_name, repr(sample), "-", arch, problems=[problem[:500]])
                    )
    finally:
        launch.observers.remove(observe)
    return list(found.values()), failures


def _run(op: Any, sample: Any) -> None:
    """Forward and backward of every implementation, on whatever tensors the sample holds."""
    from trilith.plugins.conformance import backward_arguments

    args = op.parameters.bind(sample.args, sample.kwargs)
    for implementation in op.implementations:
        results = op.torch_ops.run_forward(*args, implementation.provider)
        if implementation.backward is None:
            continue
        outputs = results[: op.spec.outputs]
        grads = [torch.empty_like(o) if o.is_floating_point() else None for o in outputs]
        call = backward_arguments(op, args, implementation.provider, results, grads)
        if any(call[-1]):
            op.torch_ops.run_backward(*call)


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    size = value.element_size()
    return Pointer(
        value.dtype, value.storage_offset() * size % 16, value.untyped_storage().nbytes()
    )


def _specialised(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    from triton.runtime.driver import driver
    from triton.runtime.jit import compute_cache_key

    device = driver.active.get_current_device()
    _, key_cache, _, _, binder = kernel.device_caches[device]
    _, specialization, rest = binder(*args, debug=False, **options)
    return compute_cache_key(key_cache, specialization, rest)


def variant(launch: Launch) -> str:
    dtypes = [str(a.dtype).removeprefix("torch.") for a in launch.args if isinstance(a, Pointer)]
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    named = []
    for name, value in launch.options.items():
        value = getattr(value, "__name__", value)
        named.append(f"{name}={value}")
    return " ".join([",".join(short.get(d, d) for d in dict.fromkeys(dtypes)), *named])


def title(kernel: str, arch: str, variant: str, op: str) -> str:
    """What launches share whose binaries are held to the same figures."""
    return f"{kernel} {arch} [{variant or op}]"


def thinned(launches: list[Launch], most: Sequence[int]) -> list[Launch]:
    """The most laden launch of each entry of attention's tables, and so many of other kernels.

    Of these the largest tile per warp, then evenly smaller; a second number is for kernels without
    dots.
    """
    of_entry: dict[Entry, Launch] = {}
    by_kernel: dict[str, list[Launch]] = collections.defaultdict(list)
    for launch in launches:
        if launch.entry is None:
            by_kernel[launch.kernel.__name__].append(launch)
        else:
            of_entry[launch.entry] = max(of_entry.get(launch.entry, launch), launch, key=_burden)
    kept = list(of_entry.values())
    for own in by_kernel.values():
        own.sort(key=_elements_per_warp, reverse=True)
        count = min(most[0] if _has_dots(own[0].kernel) else most[-1], len(own))
        kept.extend(own[i * len(own) // count] for i in range(count))
    return kept


def _burden(launch: Launch) -> tuple[float, int, int, int]:
    pointers = sum(isinstance(a, Pointer) for a in launch.args)
    flags = [v for v in launch.options.values() if isinstance(v, bool)]
    flags += launch.options.get("FLAGS", ())
    chunks = sum(launch.options.get("CHUNKS", ()))
    return _elements_per_warp(launch), chunks, pointers, sum(flags)


def _has_dots(kernel: Any) -> bool:
    """Whether it or a function that it calls by name has one."""
    called = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
    return "tl.dot" in kernel.src or any(_has_dots(f) for f in called if hasattr(f, "src"))


def _elements_per_warp(launch: Launch) -> float:
    sizes = [v for k, v in launch.options.items() if k.startswith("BLOCK")]
    return math.prod(max(v, 1) for v in sizes) / launch.options.get("num_warps", 4)
