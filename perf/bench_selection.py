"""What choosing an implementation costs a call, beside calling its launcher directly.

The registry's part of a call is the choice of who runs these arguments and the look-up of that
provider's launcher: about 0.8 us, held to 1. The whole op costs about 2 us more than its launcher,
in Python: that part, and the looks at arguments, autocast, gradients and torch's modes. A plain
call goes from there to the launcher; one that a mode, a profiler or a tensor subclass has to see
goes through torch's dispatcher, which is measured beside it. Autograd's part is `bench_dispatch`'s.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from perf.meters.dispatch import subjects
from perf.suite import DEVICE
from perf.timing import environment
from trilith.plugins import use_implementation

LIMIT = 1.0  # microseconds
_CALLS, _ROUNDS = 50, 400


def parts() -> dict[str, Callable[[], Any]]:
    """Layers of one call without gradient, from the launcher outwards."""
    op = subjects()["op"]
    x = torch.randn(4)
    provider = op.spec.provider
    return {
        "launcher": lambda: op.spec.forward(x),
        "launcher by look-up": lambda: op.torch_ops.start(provider, (x,)),
        "through torch's dispatcher": lambda: op.torch_ops.forward(x, provider),
        "whole op": lambda: op(x),
        "selection": lambda: op.provider(x, (x,)),
        "nothing": lambda: None,
    }


def microseconds() -> dict[str, float]:
    """Each part's time a call: the least of rounds that take turns."""
    runs = parts()
    least = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        for _ in range(_ROUNDS):
            for name, run in runs.items():
                start = time.perf_counter()
                for _ in range(_CALLS):
                    run()
                least[name] = min(least[name], (time.perf_counter() - start) / _CALLS * 1e6)
    return least


def registry_part(least: dict[str, float]) -> float:
    look_up = least["launcher by look-up"] - least["launcher"]
    return least["selection"] - least["nothing"] + max(look_up, 0.0)


@pytest.mark.benchmark(timer=time.perf_counter)
@pytest.mark.parametrize("scope", ["", "in a scope"])
def test_selection(benchmark: Any, scope: str) -> None:
    op = subjects()["op"]
    x = torch.randn(4)
    with use_implementation(op, op.spec.provider) if scope else nullcontext():
        least = microseconds()
        benchmark.pedantic(lambda: op.provider(x, (x,)), rounds=50, iterations=1000)
    cost = registry_part(least)
    benchmark.group = "selection"
    benchmark.extra_info.update(
        workload="dispatch",
        provider="op",
        direction=f"selection {scope}".strip(),
        dtype="fp32",
        environment=environment(DEVICE),
        host_us=cost,
        parts_us=least,
    )
    assert cost <= LIMIT, f"the registry takes {cost:.2f} us of a call: {least}"
