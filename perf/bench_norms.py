"""LayerNorm and RMSNorm."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import layer_norm, rms_norm

GPU = [norm(m, n) for norm in (layer_norm, rms_norm) for m, n in ((4096, 1024), (8192, 4096))]
GPU += [layer_norm(4096, 8192), rms_norm(4096, 16384)]
CPU = [norm(256, 768) for norm in (layer_norm, rms_norm)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_norms(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
