"""An op called with DTensors: each rank runs it on its own shards, where the op's rules allow that.

Nothing is communicated. What no rule allows is refused: which tensor to gather, and when, is the
caller's choice. Gradients come placed as their inputs are, but of a replicated input whose op was
split each rank has a part, as with torch's own ops: `Partial`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement, Shard

    from trilith.plugins.op import Op

PLAIN = frozenset({Tensor, nn.Parameter, type(None)})


def is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # whose import takes seconds
    return module is not None and isinstance(value, module.DTensor)


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """As a DTensor where `like` is one, with the first rank's value."""
    if type(like) in PLAIN or not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh)  # type: ignore[attr-defined]


class Strategy(NamedTuple):
    """Placements on one mesh dimension; of the inputs, None for what is no tensor."""

    outputs: list[Placement]
    inputs: list[Placement | None]


def call(op: Op, args: tuple[Any, ...]) -> Any:
    """The op on every rank's shards, its outputs as DTensors."""
    from torch.distributed.tensor import DTensor

    _require_one_mesh(op, args)
    tensors: list[DTensor | None] = [
        a if i in op.parameters.tensors else None for i, a in enumerate(args)
    ]
    mesh = next(t for t in tensors if t is not None).device_mesh
    allowed = strategies(op, args, tensors)
    chosen = [_choose(op, allowed, tensors, dim) for dim in range(mesh.ndim)]
    local = [
        a if t is None else _local(t, _gradient_placements(chosen, i))
        for i, (a, t) in enumerate(zip(args, tensors, strict=True))
    ]
    results = op(*local)
    outputs = []
    for n, result in enumerate((results,) if isinstance(results, Tensor) else results):
        placements = [_counted_from_front(s.outputs[n], result.ndim) for s in chosen]
        shape = _global_shape(op, result, n, chosen, tensors, local)
        stride = _dense_strides(shape, like=result)
        outputs.append(DTensor.from_local(result, mesh, placements, shape=shape, stride=stride))
    return outputs[0] if op.spec.outputs == 1 else tuple(outputs)


def _local(tensor: DTensor, grad_placements: list[Placement]) -> Tensor:
    if torch.compiler.is_compiling():
        return tensor.to_local(grad_placements=grad_placements)
    return cast(Tensor, _Local.apply(tensor, grad_placements))


class _Local(torch.autograd.Function):
    """`DTensor.to_local`; torch 2.11's has a backward that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, grad_placements: list[Placement]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mesh, ctx.shape, ctx.placements = tensor.device_mesh, tensor.shape, grad_placements
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        from torch.distributed.tensor import DTensor

        if grad is None:
            return None, None
        stride = _dense_strides(ctx.shape, like=grad)
        given = (grad, ctx.mesh, ctx.placements)
        return DTensor.from_local(*given, shape=ctx.shape, stride=stride), None


def _require_one_mesh(op: Op, args: Sequence[Any]) -> None:
    names = op.parameters.names
    given = {names[i]: args[i] for i in op.parameters.tensors if args[i] is not None}
    first = next(name for name, t in given.items() if is_dtensor(t))
    mesh = given[first].device_mesh
    for name, tensor in given.items():
        if not is_dtensor(tensor):
            raise TypeError(
                f"{op.spec.name}: {name} must be a DTensor, as {first} is, got a plain tensor; "
                f"distribute_tensor({name}, {first}.device_mesh) replicates it"
            )
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"{op.spec.name}: {name} must be on {first}'s mesh {mesh}, got {tensor.device_mesh}"
            )


def strategies(op: Op, args: Sequence[Any], tensors: Sequence[DTensor | None]) -> list[Strategy]:
    """What the op takes on a mesh dimension, all tensors replicated first."""
    from torch.distributed.tensor import Replicate

    found = [([Replicate()] * op.spec.outputs, []), *_rules(op, args)]
    allowed = []
    for outputs, inputs in found:
        padded = [*inputs, *[None] * (len(tensors) - len(inputs))]
        placed = [
            None if t is None else _counted_from_front(p or Replicate(), t.ndim)
            for p, t in zip(padded, tensors, strict=True)
        ]
        split = any(p is not None and p.is_shard() for p in placed)
        wrong = any(p.is_replicate() if split else p.is_shard() for p in outputs)
        if len(outputs) != op.spec.outputs or wrong:
            raise ValueError(
                f"{op.spec.name}: sharding must split or sum each of {op.spec.outputs} outputs "
                f"where it splits an input, got {list(outputs)} for {placed}"
            )
        allowed.append(Strategy(list(outputs), placed))
    return allowed


def _rules(op: Op, args: Sequence[Any]) -> list[Any]:
    if op.spec.sharding is None:
        return []
    rules = op.spec.sharding(*args)
    try:
        return [(list(outputs), list(inputs)) for outputs, inputs in rules]
    except (TypeError, ValueError):
        raise TypeError(
            f"{op.spec.name}: sharding must return [(output placements, input placements), ...], "
            f"got {rules!r}"
        ) from None


def _choose(
    op: Op, allowed: Sequence[Strategy], tensors: Sequence[DTensor | None], dim: int
) -> Strategy:
    given = [None if t is None else t.placements[dim] for t in tensors]
    for strategy in allowed:
        if strategy.inputs == given:
            return strategy
    _refuse(op, allowed, tensors, dim, given)


def _refuse(
    op: Op,
    allowed: Sequence[Strategy],
    tensors: Sequence[DTensor | None],
    dim: int,
    given: Sequence[Placement | None],
) -> NoReturn:
    names = op.parameters.names
    tensor_at = [i for i, t in enumerate(tensors) if t is not None]
    nearest = max(allowed, key=lambda s: [s.inputs[i] == given[i] for i in tensor_at])
    wrong = next(i for i in tensor_at if nearest.inputs[i] != given[i])
    accepted = dict.fromkeys(
        "(" + ", ".join(str(s.inputs[i]) for i in tensor_at) + ")" for s in allowed
    )
    mesh = tensors[wrong].device_mesh  # type: ignore[union-attr]
    label = f" ({mesh.mesh_dim_names[dim]})" if mesh.mesh_dim_names else ""
    raise NotImplementedError(
        f"{op.spec.name}: {names[wrong]} is {given[wrong]!r} on mesh dimension {dim}{label}; with "
        f"these arguments ({', '.join(names[i] for i in tensor_at)}) may be "
        f"{' or '.join(accepted)} there; call {names[wrong]}.redistribute first"
    )


def _gradient_placements(chosen: Sequence[Strategy], i: int) -> list[Placement]:
    from torch.distributed.tensor import Partial, Replicate

    placements = []
    for _, inputs in chosen:
        own = inputs[i]
        assert own is not None
        if own.is_partial():
            own = Replicate()
        elif own.is_replicate() and not all(p is None or p.is_replicate() for p in inputs):
            own = Partial()
        placements.append(own)
    return placements


def _global_shape(
    op: Op,
    result: Tensor,
    n: int,
    chosen: Sequence[Strategy],
    tensors: Sequence[DTensor | None],
    local: Sequence[Any],
) -> torch.Size:
    """Shards may be uneven: a split dimension is as long as the input's that is split with it."""
    shape = list(result.shape)
    for outputs, inputs in chosen:
        if not outputs[n].is_shard():
            continue
        i, given = next((i, p) for i, p in enumerate(inputs) if p is not None and p.is_shard())
        out_dim, dim = (cast("Shard", place).dim for place in (outputs[n], given))
        whole = tensors[i]
        assert whole is not None
        if result.shape[out_dim] != local[i].shape[dim]:
            raise NotImplementedError(
                f"{op.spec.name}: output {n} must be as long in its split dimension {out_dim} as "
                f"{op.parameters.names[i]} is in dimension {dim}, "
                f"{local[i].shape[dim]} on this rank, got {result.shape[out_dim]}"
            )
        shape[out_dim] = whole.shape[dim]
    return torch.Size(shape)


def _dense_strides(shape: Sequence[int], like: Tensor) -> tuple[int, ...]:
    """With the dimensions in the order in which `like` has them in memory."""
    order = sorted(range(len(shape) - 1, -1, -1), key=like.stride)
    strides, step = [1] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


def _counted_from_front(placement: Placement, ndim: int) -> Placement:
    from torch.distributed.tensor import Shard

    if type(placement) is Shard and placement.dim < 0:
        return Shard(placement.dim + ndim)
    return placement
