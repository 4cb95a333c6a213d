"""What an op's machinery costs the host: an op against a plain autograd.Function, same body."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trilith.plugins import OpSpec, Sample
from trilith.plugins.op import Op
from trilith.plugins.spec import BackwardContext

DIRECTIONS = ("forward", "forward+backward")

_CALLS, _ROUNDS = 20, 200  # short rounds: some are undisturbed on a busy machine too


def _body(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward(ctx: BackwardContext, dy: Tensor) -> tuple[Tensor]:
    return (_body(dy),)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    yield Sample(torch.randn(4, device=device, dtype=dtype))


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _body(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (_,) = ctx.saved_tensors
        return _body(dy)


@lru_cache(maxsize=1)
def subjects() -> dict[str, Any]:
    """The op and the plain Function, both with a body that only allocates."""
    spec = OpSpec(
        name="perf::nothing",
        forward=_body,
        backward=_backward,
        reference=lambda x: x + 0,
        samples=_samples,
        save_outputs=False,
        devices=("cpu", "cuda"),
    )
    return {"op": Op(spec), "plain": _Plain.apply}


def call(subject: Callable[[Tensor], Tensor], direction: str) -> Callable[[], Any]:
    x = torch.randn(4, requires_grad=True)
    above = torch.randn(4)
    if direction == "forward":
        return lambda: subject(x)
    return lambda: torch.autograd.grad(subject(x), x, above)


def host_microseconds(direction: str) -> dict[str, float]:
    """Microseconds a call of each subject: the least of rounds that take turns."""
    calls = {name: call(subject, direction) for name, subject in subjects().items()}
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(_ROUNDS):
        for name, run in calls.items():
            start = time.perf_counter()
            for _ in range(_CALLS):
                run()
            least[name] = min(least[name], (time.perf_counter() - start) / _CALLS * 1e6)
    return least
