"""The loss of a head without its logits, beside the same with them."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import linear_cross_entropy

GPU = [
    linear_cross_entropy(8192, 2048, 32000),
    linear_cross_entropy(8192, 768, 50257),
    linear_cross_entropy(8192, 4096, 128256),
]
CPU = [linear_cross_entropy(512, 64, 4096)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_linear_cross_entropy(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
