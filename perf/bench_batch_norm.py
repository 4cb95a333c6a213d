"""Batch norm of a training batch."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import batch_norm

GPU = [batch_norm(16384, 1024), batch_norm(8192, 4096)]
CPU = [batch_norm(512, 256)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_batch_norm(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
