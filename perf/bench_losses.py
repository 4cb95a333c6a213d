"""Losses of one prediction against one target each."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import bce_with_logits, mse

GPU = [make(8192, n) for make in (bce_with_logits, mse) for n in (1024, 8192)]
CPU = [make(128, 1024) for make in (bce_with_logits, mse)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_losses(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
