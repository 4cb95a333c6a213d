"""Dropout, alone and with bias and residual."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import bias_dropout_add, dropout

GPU = [dropout(8192, 8192), bias_dropout_add(8192, 8192)]
CPU = [dropout(256, 1024), bias_dropout_add(256, 1024)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_dropout(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
