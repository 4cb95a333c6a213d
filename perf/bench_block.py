"""Whole transformer blocks, as `build_lm` makes them."""

from typing import Any

import pytest

from perf.models import block_workload
from perf.suite import Case, cases, measure
from perf.timing import CLOCK

GPU = [block_workload("gpt", 8, 1024, 768, 12), block_workload("gated", 4, 2048, 2048, 16)]
CPU = [block_workload(kind, 2, 64, 128, 4) for kind in ("gpt", "gated")]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_block(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
