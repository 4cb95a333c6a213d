"""Singular value and spectral radius of a Jacobian that is never written down."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp

ITERATIONS = 30


def spectrum(
    function: Callable[[Tensor], Tensor], x: Tensor, iterations: int = ITERATIONS
) -> tuple[float, float]:
    """(largest singular value, spectral radius) of the Jacobian of `function` at x.

    By power iteration: with v <- J^T J v for the first, with v <- J v for the second, which is the
    geometric mean of |v|'s growth over the later half (a complex pair turns v, so that single
    steps do not settle), and NaN where shapes differ.
    """
    x = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    start = start / start.norm()
    out, pull = vjp(function, x)[:2]

    def push(v: Tensor) -> Tensor:
        return jvp(function, (x,), (v,))[1]

    v, singular = start, 0.0
    for _ in range(iterations):
        u = push(v)
        singular = u.norm().item()
        if not 0 < singular < math.inf:
            break
        v = pull(u / singular)[0]
        v = v / v.norm()
    if out.shape != x.shape:
        return singular, math.nan
    v, logs = start, []
    for _ in range(iterations):
        v = push(v)
        growth = v.norm().item()
        if not 0 < growth < math.inf:
            return singular, growth
        logs.append(math.log(growth))
        v = v / growth
    late = logs[iterations // 2 :]
    return singular, math.exp(sum(late) / len(late))
