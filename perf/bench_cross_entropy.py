"""Cross-entropy from small to large vocabularies."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import cross_entropy, soft_cross_entropy

GPU = [
    cross_entropy(8192, 32000),
    cross_entropy(8192, 50257),
    cross_entropy(8192, 128256),
    soft_cross_entropy(8192, 32000),
]
CPU = [cross_entropy(128, 4096), soft_cross_entropy(128, 4096)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_cross_entropy(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
