"""A packed projection of queries, keys and values, split over ranks.

The rows of its weight, heads of q first, then k, then v, are cut into equal runs in that order:
what is sharded is the weight of one process, and a checkpoint of it fits any number of ranks. A
rank's run is not its heads, though, so that the product's columns change places between ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import Placement
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from trilith.blocks.attention import SelfAttention
from trilith.blocks.parallel.seeds import RankSeeds

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Heads(ParallelStyle):
    """A `SelfAttention` each rank of which has its share of the heads."""

    def __init__(self, name: str, seeds_apart: bool) -> None:
        self.name = name
        self.seeds_apart = seeds_apart

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, SelfAttention)
        ranks, (n_heads, n_kv_heads, _) = device_mesh.size(), module.heads
        for what, count in (("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            if count % ranks:
                raise ValueError(
                    f"tensor_parallel_plan: {self.name}.{what} must be divisible by the "
                    f"{ranks} ranks of the mesh, got {count}"
                )
        module.heads = (n_heads // ranks, n_kv_heads // ranks, n_kv_heads // ranks)
        if self.seeds_apart:
            RankSeeds(device_mesh).attach(module)
        return module


class PackedColumns(ColwiseParallel):
    """A packed projection whose output on each rank is q, k and v of that rank's heads.

    Args:
        sizes: heads of each of the parts that are packed, in all.
        input_layouts: how the input is placed.
    """

    def __init__(self, sizes: tuple[int, ...], *, input_layouts: Placement) -> None:
        super().__init__(input_layouts=input_layouts)
        self.sizes = sizes

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Linear)
        columns = module.out_features
        module = super()._apply(module, device_mesh)
        module.register_forward_hook(_Exchange(columns, self.sizes, device_mesh))
        return module


class _Exchange:
    """A forward hook: columns cut into equal runs -> the columns of each rank's own heads."""

    def __init__(self, columns: int, sizes: tuple[int, ...], mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        ranks, rank = mesh.size(), mesh.get_local_rank()
        head_dim = columns // sum(sizes)
        each = torch.arange(ranks)
        parts = [each.repeat_interleave(size // ranks * head_dim) for size in sizes]
        owners = torch.cat(parts).view(ranks, -1)  # [r, c]: who needs column c of rank r's run
        self.order = owners[rank].argsort(stable=True)
        self.sent = torch.bincount(owners[rank], minlength=ranks).tolist()
        self.received = (owners == rank).sum(1).tolist()

    def __call__(self, module: nn.Module, inputs: Any, packed: Tensor) -> Tensor:
        columns = packed.movedim(-1, 0)[self.order.to(packed.device)]
        moved = all_to_all_single_autograd(columns, self.received, self.sent, self.group)
        return moved.movedim(0, -1).contiguous()
