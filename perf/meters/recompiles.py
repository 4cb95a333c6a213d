"""How often torch.compile compiles a function whose sizes change from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from perf.oracle import gradient_for, leaves


def compilations(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[int]:
    """How many times it was compiled by the end of each call, whole, forward and backward."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    counts = []
    for args in calls:
        out = compiled(*args)
        torch.autograd.grad(out, leaves(args), gradient_for(out))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts
