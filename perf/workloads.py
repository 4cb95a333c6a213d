"""What is measured: functions with their arguments, their cost, and who else computes them.

A workload is one function at one shape. Its `eager` is plain PyTorch, and in float64 the oracle.
Where it drops elements, the oracle is told which branch to take: `drop` stands for dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith import kernels
from trilith.plugins import Cost, registry

Function = Callable[..., Any]  # -> a tensor, or a tuple of them
Drop = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Draw:
    """Makes arguments on a device, in a dtype; those it draws want a gradient."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return self.constant(*shape).requires_grad_()

    def constant(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def labels(self, n: int, classes: int) -> Tensor:
        return torch.randint(classes, (n,), device=self.device)


def whole(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Workload:
    """One function at one shape.

    arguments: `(draw) -> args` of every function below.
    cost: `(*args) -> Cost`, the least work of forward and backward.
    trilith, eager: the function, fused and in plain PyTorch.
    peers: other providers' functions, by the provider's name; each is made when it is asked for.
    p: probability of dropping; eager is then called as `eager(*args, drop=...)`.
    part: takes of each argument and result the part that the oracle computes.
    compiled: whether torch.compile of eager is a peer.
    steps: whether a call is a whole training step, with nothing to differentiate from outside.
    together: whether some make gradients with the output, so that only both directions compare.
    autocast: whether it runs under bfloat16 autocast on a GPU.
    """

    name: str
    arguments: Callable[[Draw], tuple[Any, ...]]
    cost: Callable[..., Cost] | None
    trilith: Function
    eager: Function
    peers: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    p: float = 0.0
    part: Callable[[Tensor], Tensor] = whole
    compiled: bool = True
    steps: bool = False
    together: bool = False
    autocast: bool = False

    @property
    def plain(self) -> Function:
        """eager, dropping at random if it drops at all."""
        return self.with_drop(lambda x: F.dropout(x, self.p)) if self.p else self.eager

    def with_drop(self, drop: Drop) -> Function:
        return lambda *args: self.eager(*args, drop=drop)


def declared_cost(op: str, *constants: Any) -> Callable[..., Cost]:
    """The declared cost of an op whose tensors come first."""

    def cost(*args: Any) -> Cost:
        declared = registry.op(f"trilith::{op}").spec.cost
        assert declared is not None, f"{op} declares no cost"
        return declared(*args, *constants)

    return cost


def _liger(name: str, *constants: Any) -> Callable[[], Function]:
    def function() -> Function:
        from liger_kernel.transformers import functional

        found = getattr(functional, name)
        return lambda *args: found(*args, *constants)

    return function


def layer_norm(m: int, n: int) -> Workload:
    return Workload(
        name=f"layer_norm-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n), draw(n), draw(n)),
        cost=declared_cost("layer_norm", 1e-5),
        trilith=lambda x, w, b: kernels.layer_norm(x, (n,), w, b),
        eager=lambda x, w, b: F.layer_norm(x, (n,), w, b),
        peers={"liger": _liger("liger_layer_norm", 1e-5)},
    )


def rms_norm(m: int, n: int) -> Workload:
    return Workload(
        name=f"rms_norm-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n), draw(n)),
        cost=declared_cost("rms_norm", 1e-6),
        trilith=lambda x, w: kernels.rms_norm(x, (n,), w, 1e-6),
        eager=lambda x, w: F.rms_norm(x, (n,), w, 1e-6),
        peers={"liger": _liger("liger_rms_norm", 1e-6, 0.0, "llama", False)},
    )


def bias_act(m: int, n: int, activation: str = "gelu", p: float = 0.0) -> Workload:
    activations: dict[str, Function] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
    act = activations[activation]

    def eager(x: Tensor, bias: Tensor, drop: Drop = whole) -> Tensor:
        return drop(act(x + bias))

    return Workload(
        name=f"bias_{activation}{suffix(p)}-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n), draw(n)),
        cost=declared_cost("bias_act", None, activation, p),
        trilith=lambda x, bias: kernels.bias_act(x, bias, activation, p=p),
        eager=eager,
        p=p,
    )


def swiglu(m: int, n: int) -> Workload:
    return Workload(
        name=f"swiglu-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n), draw(m, n)),
        cost=declared_cost("gated_act", "silu"),
        trilith=lambda gate, up: kernels.gated_act(gate, up, "silu"),
        eager=lambda gate, up: F.silu(gate) * up,
        peers={"liger": _liger("liger_swiglu")},
    )


def dropout(m: int, n: int, p: float = 0.1) -> Workload:
    return Workload(
        name=f"dropout{suffix(p)}-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n),),
        cost=declared_cost("dropout", None, p),
        trilith=lambda x: kernels.dropout(x, p),
        eager=lambda x, drop=whole: drop(x),
        p=p,
    )


def bias_dropout_add(m: int, n: int, p: float = 0.1) -> Workload:
    def eager(x: Tensor, residual: Tensor, bias: Tensor, drop: Drop = whole) -> Tensor:
        return residual + drop(x + bias)

    return Workload(
        name=f"bias_dropout_add{suffix(p)}-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n), draw(m, n), draw(n)),
        cost=lambda x, residual, bias: declared_cost("bias_dropout_add")(
            x, residual, bias, None, p, x.dtype
        ),
        trilith=lambda x, residual, bias: kernels.bias_dropout_add(x, residual, bias, p),
        eager=eager,
        p=p,
    )


def cross_entropy(n: int, v: int) -> Workload:
    return Workload(
        name=f"cross_entropy-N{n}-V{v}",
        arguments=lambda draw: (draw(n, v), draw.labels(n, v)),
        cost=declared_cost("cross_entropy", None, -100, 0.0, 0.0, None),
        trilith=kernels.cross_entropy,
        eager=lambda logits, labels: F.cross_entropy(_widened(logits), labels),
        peers={"liger": _liger("liger_cross_entropy")},
    )


def soft_cross_entropy(n: int, v: int) -> Workload:
    """The loss against class probabilities."""
    return Workload(
        name=f"soft_cross_entropy-N{n}-V{v}",
        arguments=lambda draw: (draw(n, v), draw.constant(n, v).softmax(1)),
        cost=declared_cost("soft_cross_entropy", None, 0.0, 0.0, None),
        trilith=kernels.cross_entropy,
        eager=lambda logits, target: F.cross_entropy(_widened(logits), _widened(target)),
    )


def linear_cross_entropy(n: int, d: int, v: int) -> Workload:
    """The loss of a head: hidden states (n, d), vocabulary v."""

    def unfused(x: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_widened(F.linear(x, head)), labels)

    def liger() -> Function:
        from liger_kernel.transformers import functional

        found = functional.liger_fused_linear_cross_entropy
        return lambda x, head, labels: found(x, head, labels)

    def arguments(draw: Draw) -> tuple[Any, ...]:
        return draw(n, d), head(draw, v, d), draw.labels(n, v)

    return Workload(
        name=f"linear_cross_entropy-N{n}-d{d}-V{v}",
        arguments=arguments,
        cost=declared_cost("linear_cross_entropy"),
        trilith=kernels.linear_cross_entropy,
        eager=unfused,
        peers={"liger": liger},
        together=True,
    )


def softmax(m: int, n: int, *, log: bool = False) -> Workload:
    name = "log_softmax" if log else "softmax"
    return Workload(
        name=f"{name}-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n),),
        cost=lambda x: declared_cost(name)(x, 1, x.dtype),
        trilith=kernels.log_softmax if log else kernels.softmax,
        eager=lambda x: F.log_softmax(x, -1) if log else F.softmax(x, -1),
    )


def bce_with_logits(m: int, n: int, *, weighted: bool = False) -> Workload:
    """`weighted`: each element has a weight of its own."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        weight = (draw.constant(m, n).abs(),) if weighted else ()
        return draw(m, n), draw.constant(m, n).sigmoid(), *weight

    return Workload(
        name=f"bce_with_logits{'-weighted' if weighted else ''}-M{m}-N{n}",
        arguments=arguments,
        cost=lambda x, t, weight=None: declared_cost("binary_cross_entropy_with_logits")(
            x, t, weight, None, "mean", x.dtype
        ),
        trilith=kernels.binary_cross_entropy_with_logits,
        eager=F.binary_cross_entropy_with_logits,
    )


def mse(m: int, n: int) -> Workload:
    return Workload(
        name=f"mse_loss-M{m}-N{n}",
        arguments=lambda draw: (draw(m, n), draw.constant(m, n)),
        cost=lambda x, t: declared_cost("mse_loss")(x, t, None, "mean", x.dtype),
        trilith=kernels.mse_loss,
        eager=F.mse_loss,
    )


def batch_norm(n: int, c: int) -> Workload:
    return Workload(
        name=f"batch_norm-N{n}-C{c}",
        arguments=lambda draw: (draw(n, c), draw(c), draw(c)),
        cost=declared_cost("batch_norm", 1e-5),
        trilith=lambda x, w, b: kernels.batch_norm(x, None, None, w, b, True),
        eager=lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
    )


def rotary(
    b: int, h: int, t: int, d: int, turned: int | None = None, *, interleaved: bool = False
) -> Workload:
    """The first `turned` channels, or all: halves paired, or neighbours if interleaved."""
    turned = d if turned is None else turned

    def arguments(draw: Draw) -> tuple[Any, ...]:
        angles = torch.rand(t, turned // 2, device=draw.device) * 2 * math.pi
        return draw(b, h, t, d), angles.cos(), angles.sin()

    def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not interleaved:
            y = rotated(x[..., :turned], cos, sin)
        else:
            first, second = _widened(x[..., :turned]).unflatten(-1, (-1, 2)).unbind(-1)
            y = torch.stack(_turned(first, second, cos, sin), dim=-1).flatten(-2).to(x.dtype)
        return torch.cat([y, x[..., turned:]], dim=-1) if turned < d else y

    some = f"-R{turned}" if turned < d else ""
    return Workload(
        name=f"rotary{'-interleaved' if interleaved else ''}-B{b}-H{h}-T{t}-D{d}{some}",
        arguments=arguments,
        cost=declared_cost("rotary", interleaved),
        trilith=lambda x, cos, sin: kernels.rotary(x, cos, sin, interleaved=interleaved),
        eager=eager,
    )


def rotary_qkvpacked(b: int, h: int, hkv: int, t: int, d: int) -> Workload:
    """q and k of a packed projection; v is copied."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        angles = torch.rand(t, d // 2, device=draw.device) * 2 * math.pi
        return draw(b, t, h + 2 * hkv, d), angles.cos(), angles.sin()

    def eager(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, v = qkv.transpose(1, 2).split((h + hkv, hkv), dim=1)
        return torch.cat([rotated(turned, cos, sin), v], dim=1).transpose(1, 2)

    return Workload(
        name=f"rotary_qkvpacked-B{b}-H{h}-Hkv{hkv}-T{t}-D{d}",
        arguments=arguments,
        cost=declared_cost("rotary_qkvpacked", h + hkv, False),
        trilith=lambda qkv, cos, sin: kernels.rotary_qkvpacked(qkv, cos, sin, h),
        eager=eager,
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, H, T, D), halves paired, as models write it."""
    return torch.cat(_turned(*_widened(x).chunk(2, dim=-1), cos, sin), dim=-1).to(x.dtype)


def _turned(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return first * cos - second * sin, second * cos + first * sin


def head(draw: Draw, k: int, n: int) -> Tensor:
    """A linear layer's weight, of the scale that layers have."""
    return (draw.constant(k, n) / n**0.5).requires_grad_()


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def suffix(p: float) -> str:
    return f"-p{p}" if p else ""
