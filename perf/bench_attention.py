"""Attention at the head dimensions and lengths of language models."""

from typing import Any

import pytest

from perf.attention_workloads import attention, attention_qkvpacked
from perf.suite import Case, cases, measure
from perf.timing import CLOCK

GPU = [
    attention(4, 16, 4096, 128),
    attention(1, 16, 16384, 128),
    attention(4, 16, 4096, 128, causal=False),
    attention(4, 32, 4096, 64),
    attention(16, 12, 1024, 64),
    attention(4, 8, 4096, 256),
    attention_qkvpacked(16, 12, 12, 1024, 64),
]
CPU = [
    attention(2, 4, 128, 64),
    attention(2, 4, 128, 64, causal=False),
    attention_qkvpacked(2, 4, 2, 128, 64),
]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_attention(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
