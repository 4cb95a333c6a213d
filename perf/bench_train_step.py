"""Training steps of language models: loss, gradients, AdamW."""

from typing import Any

import pytest

from perf.models import train_step
from perf.suite import Case, cases, measure
from perf.timing import CLOCK

GPU = [
    train_step("gpt", b=16, t=1024, dim=768, n_heads=12, n_layers=12, vocab_size=50304),
    train_step("gated", b=16, t=1024, dim=768, n_heads=12, n_layers=12, vocab_size=50304),
]
CPU = [
    train_step(kind, b=2, t=64, dim=64, n_heads=4, n_layers=2, vocab_size=256)
    for kind in ("gpt", "gated")
]


@pytest.mark.benchmark(timer=CLOCK)
@cases(GPU, CPU)
def test_train_step(benchmark: Any, case: Case) -> None:
    measure(benchmark, case)
