"""What the host pays for an op's machinery, against a plain autograd.Function with its body."""

import time
from typing import Any

import pytest

from perf.meters.dispatch import DIRECTIONS, call, host_microseconds, subjects
from perf.suite import DEVICE
from perf.timing import environment


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("subject", ["op", "plain"])
def test_dispatch(benchmark: Any, subject: str, direction: str) -> None:
    benchmark.group = f"dispatch {direction}"
    run = call(subjects()[subject], direction)
    benchmark.pedantic(run, rounds=50, iterations=100, warmup_rounds=3)
    least = host_microseconds(direction)
    benchmark.extra_info.update(
        workload="dispatch",
        provider=subject,
        direction=direction,
        dtype="fp32",
        environment=environment(DEVICE),
        host_us=least[subject],
        ratio_to_plain=least["op"] / least["plain"],
    )
