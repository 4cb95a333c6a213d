"""Bias and activation, with dropout; SwiGLU."""

from typing import Any

import pytest

from perf.suite import Case, cases, measure
from perf.timing import CLOCK
from perf.workloads import bias_act, swiglu

GPU = [bias_act(8192, 16384), bias_act(8192, 16384, p=0.1), swiglu(8192, 11008)]
CPU = [bias_act(256, 1024), bias_act(256, 1024, p=0.1), swiglu(256, 1024)]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_bias_act(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
