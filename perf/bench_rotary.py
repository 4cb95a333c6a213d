"""Rotary position embedding."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import rotary, rotary_qkvpacked

GPU = [rotary(4, 32, 4096, 128), rotary(16, 12, 1024, 64), rotary_qkvpacked(16, 12, 12, 1024, 64)]
CPU = [rotary(2, 4, 128, 64), rotary_qkvpacked(2, 4, 2, 128, 64)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_rotary(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
