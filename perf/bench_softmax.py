"""Softmax and its logarithm, from short to long rows."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import softmax

GPU = [
    softmax(*shape, log=log) for shape in ((16384, 1024), (4096, 32768)) for log in (False, True)
]
CPU = [softmax(128, 1024, log=log) for log in (False, True)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_softmax(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
