"""A benchmark file is a table of workloads and one test: `cases` and `measure` do the rest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

from perf.oracle import Wrong, autocasting, check, forget, gradient_for, leaves, seeded_arguments
from perf.providers import Unavailable, function_of, providers_of
from perf.timing import (
    CLOCK,
    Region,
    clocks,
    copy_seconds,
    environment,
    limits,
    prepare,
    timing_stream,
)
from perf.workloads import Function, Workload
from trilith.kernels._runtime.launch import observers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIRECTIONS = ("forward", "backward", "both")
_right: set[tuple[str, str, torch.dtype]] = set()
_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    workload: Workload
    dtype: torch.dtype
    provider: str
    direction: str

    @property
    def is_ours(self) -> bool:
        """Also under torch.compile: what fails there is no peer that is not able."""
        return self.provider.startswith("trilith")

    @property
    def group(self) -> str:
        return f"{self.workload.name} {_SHORT[self.dtype]} {self.direction}"

    def __str__(self) -> str:
        return f"{self.group} {self.provider}".replace(" ", "-")


def cases(
    gpu: Iterable[Workload],
    cpu: Iterable[Workload],
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
) -> pytest.MarkDecorator:
    """Parametrise `case` by workload, dtype, provider and direction: the table of this device.

    On a CPU dtypes are float32, and the providers Trilith's reference path and torch eager. Where
    several workers share the cases, one worker has all of a workload, and its oracle.
    """
    on_gpu = DEVICE.type == "cuda"
    rows = [
        pytest.param(
            Case(workload, dtype, provider, direction),
            marks=pytest.mark.xdist_group(workload.name),
        )
        for workload in (gpu if on_gpu else cpu)
        for dtype in (dtypes if on_gpu else (torch.float32,))
        for provider in (providers_of(workload) if on_gpu else ("trilith", "eager"))
        for direction in _directions(workload)
    ]
    return pytest.mark.parametrize("case", rows, ids=str)


def _directions(workload: Workload) -> tuple[str, ...]:
    if workload.steps:
        return ("step",)
    return ("both",) if workload.together else DIRECTIONS


def measure(benchmark: Any, case: Case) -> None:
    """Check the case's results, time it, and note what explains the time.

    Only the check where pytest-benchmark is disabled: with several workers, whom nobody times. It
    leaves compiled kernels in the caches on disk.
    """
    workload = case.workload
    benchmark.group = case.group
    try:
        function = function_of(case.provider, workload, DEVICE, case.dtype)
    except Unavailable as why:
        pytest.skip(str(why))
    with timing_stream(DEVICE):
        if benchmark.disabled:
            benchmark.pedantic(_check, args=(case, function))
            forget()
            return
        _check(case, function)
        args = seeded_arguments(workload, DEVICE, case.dtype)
        region = _region(case, function, args)
        prepared = prepare(region, DEVICE)
        kernels = launched(region)
        benchmark.pedantic(_advance, args=(prepared.sample,), rounds=prepared.rounds)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(_described(case), kernels=kernels, **prepared.facts)
        benchmark.extra_info.update(_work(case, args, seconds))


def launched(region: Region) -> list[str]:
    """Our kernels that the region starts, with grid and chosen configuration."""
    found: list[str] = []

    def observe(kernel: Any, grid: Any, args: Any, options: dict[str, Any]) -> None:
        config = " ".join(f"{name}={_brief(value)}" for name, value in options.items())
        found.append(f"{kernel.fn.__name__} grid={grid} {config}")

    observers.append(observe)
    try:
        region()
    finally:
        observers.remove(observe)
    return found


def _brief(value: Any) -> Any:
    return getattr(getattr(value, "fn", None), "__name__", value)


def _advance(sample: Any) -> None:
    CLOCK.advance(sample())


def _check(case: Case, function: Function) -> None:
    """Once for all directions: a result comes with its gradients."""
    subject = case.provider, case.workload.name, case.dtype
    if subject in _right:
        return
    try:
        check(function, case.workload, DEVICE, case.dtype)
        _right.add(subject)
    except Wrong as error:
        if case.is_ours:
            raise
        pytest.skip(f"{case.provider}: {error}")
    except RuntimeError as error:
        if (case.is_ours or case.provider == "eager") and not _others_have_the_memory(error):
            raise
        pytest.skip(f"{case.provider}: {str(error).splitlines()[0]}")


def _others_have_the_memory(error: RuntimeError) -> bool:
    """Whether there is no room beside other workers; the case is checked again before its time."""
    full = isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
    return full and "PYTEST_XDIST_WORKER" in os.environ


def _region(case: Case, function: Function, args: tuple[Any, ...]) -> Region:
    if case.direction == "step":
        return lambda: _step(case, function, args)
    if case.direction == "forward":
        return lambda: function(*args)
    wanted, out = leaves(args), function(*args)
    above = gradient_for(out)
    if case.direction == "both":
        del out
        return lambda: torch.autograd.grad(function(*args), wanted, above)
    return lambda: torch.autograd.grad(out, wanted, above, retain_graph=True)


def _step(case: Case, function: Function, args: tuple[Any, ...]) -> None:
    optimizer = args[-1]
    with autocasting(case.workload, DEVICE):
        loss = function(*args)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _described(case: Case) -> dict[str, Any]:
    return {
        "workload": case.workload.name,
        "provider": case.provider,
        "dtype": _SHORT[case.dtype],
        "direction": case.direction,
        "environment": environment(DEVICE),
        "clocks": clocks(DEVICE),
    }


def _work(case: Case, args: tuple[Any, ...], seconds: float) -> dict[str, Any]:
    """Bytes and FLOPs of the case, and which fraction of the device's limits it reached."""
    if case.workload.cost is None:
        tokens = args[0].numel()
        return {"tokens": tokens, "tokens_per_s": tokens / seconds}
    cost = case.workload.cost(*args)
    forward, backward = (
        case.direction in ("forward", "both"),
        case.direction in ("backward", "both"),
    )
    n_bytes = forward * cost.forward_bytes + backward * cost.backward_bytes
    flops = forward * cost.forward_flops + backward * cost.backward_flops
    facts: dict[str, Any] = {"bytes": n_bytes, "flops": flops}
    reached = limits(DEVICE)
    if reached is not None:
        facts["limits"] = asdict(reached)
        facts["fraction_of_copy"] = n_bytes / seconds / reached.copy
        facts["fraction_of_matmul"] = flops / seconds / reached.matmul
        if facts["fraction_of_copy"] > facts["fraction_of_matmul"]:
            facts["fraction_of_equal_copy"] = copy_seconds(n_bytes, DEVICE) / seconds
    return facts
