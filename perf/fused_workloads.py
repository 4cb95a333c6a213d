"""Workloads of what is fused around a linear layer: residual sum, norm, activation."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from perf.workloads import Draw, Drop, Workload, declared_cost, head, suffix, whole
from trilith import kernels
from trilith.plugins import Cost


def add_norm(m: int, n: int, p: float = 0.0, *, rms: bool = False) -> Workload:
    """The residual sum and its norm, both of which are outputs."""

    def fused(x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
        function = kernels.add_rms_norm if rms else kernels.add_layer_norm
        return function(x, residual, weight, *bias, eps=1e-5, p=p)

    def eager(
        x: Tensor, residual: Tensor, weight: Tensor, *bias: Tensor, drop: Drop = whole
    ) -> tuple[Tensor, Tensor]:
        summed = residual + drop(x)
        return _normed(summed, weight, *bias), summed

    def cost(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Cost:
        return declared_cost("add_norm")(x, residual, None, weight, bias, 1e-5, p, not rms, None)

    return Workload(
        name=f"add_{'rms' if rms else 'layer'}_norm{suffix(p)}-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n), draw(m, n), *(draw(n) for _ in "wb"[: 1 + (not rms)])),
        cost=cost,
        trilith=fused,
        eager=eager,
        p=p,
    )


def layer_norm_linear(m: int, n: int, k: int, *, added: bool = False) -> Workload:
    """A norm before a linear layer (k, n), of a residual sum or of x alone."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        data = (draw(m, n), draw(m, n)) if added else (draw(m, n),)
        return *data, draw(n), draw(n), head(draw, k, n), draw(k)

    def fused(x: Tensor, *rest: Tensor) -> Any:
        residual, *parameters = rest if added else (None, *rest)
        return kernels.layer_norm_linear(x, *parameters, residual=residual)

    def eager(x: Tensor, *rest: Tensor) -> Any:
        residual, norm_weight, norm_bias, *linear = rest if added else (None, *rest)
        total = x if residual is None else residual + x
        y = F.linear(_normed(total, norm_weight, norm_bias), *linear)
        return (y, total) if added else y

    def cost(x: Tensor, *rest: Tensor) -> Cost:
        if added:
            options = (None, None, 1e-5, 0.0, True, None)
            return declared_cost("add_norm_linear")(x, rest[0], None, *rest[1:], *options)
        return declared_cost("norm_linear", None, None, 1e-5, True)(x, *rest)

    name = "add_layer_norm_linear" if added else "layer_norm_linear"
    return Workload(
        name=f"{name}-M{m}-N{n}-K{k}", arguments=arguments, cost=cost, trilith=fused, eager=eager
    )


def rms_norm_linear_pair(m: int, n: int, k: int) -> Workload:
    """A norm before the two linear layers (k, n) that a gated MLP begins with."""

    def fused(x: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> Any:
        return kernels.rms_norm_linear(x, weight, (gate, up), eps=1e-5)

    def eager(x: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> Any:
        normed = _normed(x, weight)
        return F.linear(normed, gate), F.linear(normed, up)

    def cost(x: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> Cost:
        return declared_cost("norm_linear")(x, weight, None, gate, None, up, None, 1e-5, False)

    return Workload(
        name=f"rms_norm_linear_pair-M{m}-N{n}-K{k}",
        arguments=lambda draw: (draw(m, n), draw(n), head(draw, k, n), head(draw, k, n)),
        cost=cost,
        trilith=fused,
        eager=eager,
    )


def bias_act_linear(m: int, n: int, k: int) -> Workload:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        return draw(m, n), draw(n), head(draw, k, n), draw(k)

    return Workload(
        name=f"bias_gelu_linear-M{m}-N{n}-K{k}",
        arguments=arguments,
        cost=declared_cost("bias_act_linear", None, "gelu", 0.0),
        trilith=kernels.bias_act_linear,
        eager=lambda x, bias, w, b: F.linear(F.gelu(x + bias), w, b),
    )


def gated_act_linear(m: int, n: int, k: int) -> Workload:
    return Workload(
        name=f"swiglu_linear-M{m}-N{n}-K{k}",
        arguments=lambda draw: (draw(m, n), draw(m, n), head(draw, k, n)),
        cost=declared_cost("gated_act_linear", None, "silu"),
        trilith=kernels.gated_act_linear,
        eager=lambda gate, up, w: F.linear(F.silu(gate) * up, w),
    )


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Layer norm, or without a bias RMS norm."""
    shape = x.shape[-1:]
    if bias is None:
        return F.rms_norm(x, shape, weight, 1e-5)
    return F.layer_norm(x, shape, weight, bias, 1e-5)
