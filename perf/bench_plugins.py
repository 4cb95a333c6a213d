"""Ops and implementations of installed plugins, at the largest of each op's samples.

There is nothing to write for an op to be here: the arguments, the reference that it is measured
against and the cost are those of its spec.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import Draw, Workload
from trilith.plugins import Op, manager, registry, use_implementation

manager.load()


def workloads() -> Iterator[Workload]:
    """One for each implementation that is not our own."""
    for op in registry.ops():
        for implementation in op.implementations:
            if implementation.provider != "trilith":
                yield workload(op, implementation.provider)


def workload(op: Op, provider: str) -> Workload:
    def run(*args: Any) -> Tensor:
        if op.choose(*args) is None:
            return first(op(*args))
        with use_implementation(op, provider):
            return first(op(*args))

    return Workload(
        name=f"{op.spec.name} by {provider}",
        arguments=lambda draw: largest(op, draw),
        cost=op.spec.cost,
        trilith=run,
        eager=lambda *args: first(op.spec.reference(*args)),
    )


def largest(op: Op, draw: Draw) -> tuple[Any, ...]:
    samples = [
        op.parameters.bind(s.args, s.kwargs) for s in op.spec.samples(draw.device, draw.dtype)
    ]
    chosen = max(samples, key=lambda args: sum(a.numel() for a in args if isinstance(a, Tensor)))
    return tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in chosen
    )


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


FOREIGN: list[Workload] = list(workloads())


@pytest.mark.benchmark(timer=CLOCK)
@cases(FOREIGN, FOREIGN)
def test_plugins(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
