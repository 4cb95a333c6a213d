"""The check of an op's rules for DTensors: two ranks, one after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trilith.plugins import sharding
from trilith.plugins.conformance.compare import assert_bits
from trilith.plugins.conformance.support import (
    assert_all_same,
    both,
    bound,
    fixed_upstream,
    floating,
    name_of,
    named_check,
)
from trilith.plugins.op import Op
from trilith.plugins.sharding import Strategy
from trilith.plugins.spec import Sample

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_RANKS = 2
_REDUCED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "avg": lambda one, other: (one + other) / 2,
    "max": torch.maximum,
    "min": torch.minimum,
}


@named_check
def shards_agree(op: Op, sample: Sample, device: torch.device) -> None:
    """Placed as the rules allow, tensors give two ranks what one has of them, gradients too.

    No process group is needed, for ranks do not communicate: each has a mesh on which it is alone.
    What a rule no longer allows once the tensors are placed is refused in a call, and passed over.
    """
    if op.spec.sharding is None or not torch.distributed.is_available():
        return
    from torch.distributed.tensor import Replicate

    args = bound(op, sample)
    meshes = [_mesh(device, rank) for rank in range(_RANKS)]
    whole = _placed(args, [Replicate()] * len(args), meshes)[0]
    upstream = fixed_upstream(op, args)
    expected = both(op, args, upstream)
    _, *said = sharding.strategies(op, whole, _tensors(op, whole))
    for strategy in said:
        ranks = _placed(args, strategy.inputs, meshes)
        if not all(strategy in sharding.strategies(op, own, _tensors(op, own)) for own in ranks):
            continue
        what = _described(op, strategy)
        above = _placed(upstream, list(map(_of_gradient, strategy.outputs)), meshes)
        found = [both(op, own, grads) for own, grads in zip(ranks, above, strict=True)]
        actual = [
            [_whole(what, shards) for shards in zip(*results, strict=True)]
            for results in zip(*found, strict=True)
        ]
        assert_all_same(what, op, floating(args), actual, expected, upstream)


def _mesh(device: torch.device, rank: int) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh(device.type, torch.arange(_RANKS), _init_backend=False, _rank=rank)


def _tensors(op: Op, args: Sequence[Any]) -> list[DTensor | None]:
    return [a if i in op.parameters.tensors else None for i, a in enumerate(args)]


def _of_gradient(placement: Placement) -> Placement:
    from torch.distributed.tensor import Replicate

    return Replicate() if placement.is_partial() else placement


def _placed(
    args: Sequence[Any], placements: Sequence[Placement | None], meshes: Sequence[DeviceMesh]
) -> list[list[Any]]:
    """The arguments of each rank, tensors as DTensors."""
    from torch.distributed.tensor import DTensor

    ranks: list[list[Any]] = [[] for _ in meshes]
    for value, placement in zip(args, placements, strict=True):
        if not isinstance(value, Tensor) or placement is None:
            pieces = [value] * len(meshes)
        else:
            whole: Any = {"shape": value.shape, "stride": value.stride()}
            locals_ = _pieces(value.detach(), placement)
            pieces = [
                DTensor.from_local(local, mesh, [placement], run_check=False, **whole)
                for local, mesh in zip(locals_, meshes, strict=True)
            ]
        for own, piece in zip(ranks, pieces, strict=True):
            own.append(piece)
    return ranks


def _pieces(tensor: Tensor, placement: Any) -> list[Tensor]:
    if placement.is_shard():
        first, *others = tensor.chunk(_RANKS, placement.dim)
        return [first, *(others or [tensor.narrow(placement.dim, 0, 0)])]
    if placement.is_partial():
        return _parts(tensor, placement.reduce_op)
    return [tensor, tensor]


def _parts(tensor: Tensor, reduction: str) -> list[Tensor]:
    """Two that are unlike: halves would hide what is not linear but homogeneous, as relu."""
    one = torch.randn_like(tensor)
    if reduction in ("sum", "avg"):
        return [one, (tensor if reduction == "sum" else 2 * tensor) - one]
    further = one.abs() if reduction == "min" else -one.abs()
    return [tensor, tensor + further]


def _whole(what: str, shards: Sequence[DTensor]) -> Tensor:
    """What the ranks' DTensors are shares of."""
    placement: Any = shards[0].placements[0]
    locals_ = [shard.to_local() for shard in shards]
    if placement.is_shard():
        return torch.cat(locals_, placement.dim)
    if placement.is_partial():
        return _REDUCED[placement.reduce_op](*locals_)
    assert_bits(f"{what}: from rank to rank what is replicated", locals_[1], locals_[0])
    return locals_[0]


def _described(op: Op, strategy: Strategy) -> str:
    given = [f"{name_of(op, i)} {p}" for i, p in enumerate(strategy.inputs) if p is not None]
    return f"{', '.join(given)} to {', '.join(map(str, strategy.outputs))} on two ranks"
