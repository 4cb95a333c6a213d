"""The processes of a run: how they share a model and a batch, and what they agree on.

Every mode trains as one process does, on the same batches: ranks with rows of their own average
their gradients, ranks with parts of a layer hold all rows of their group.
"""

from __future__ import annotations

import os
from argparse import Namespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.lm import BadInput

MODES = ("ddp", "fsdp", "tp", "fsdp+tp")


class Ranks:
    """One process; nothing to share and no one to agree with."""

    rank, world = 0, 1
    row_rank, row_ranks = 0, 1  # among those that have rows of their own

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def spread(self, model: nn.Module) -> nn.Module:
        """Share the model out, in place; returns what training calls."""
        return model

    def rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a batch."""
        return batch.tensor_split(self.row_ranks)[self.row_rank]

    def agree(self, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """The mean loss, and whether any rank was asked to stop."""
        return loss, stop

    def all_of(self, state: Tensor) -> list[Tensor]:
        """Every rank's."""
        return [state]

    def wait(self) -> None:
        """Until all ranks are here."""

    def close(self) -> None:
        """Part from the others."""


class Group(Ranks):
    """The processes that torchrun started."""

    def __init__(self, device: str, mode: str, tensor_ranks: int, batch: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        local = int(os.environ["LOCAL_RANK"])
        super().__init__(device if device == "cpu" else f"{device}:{local}")
        self.mode = mode
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        tensor = {"tp": self.world, "fsdp+tp": tensor_ranks}.get(mode, 1)
        if self.world % tensor:
            raise BadInput(
                f"--tensor-ranks must divide the {self.world} processes of torchrun, got {tensor}"
            )
        self.row_ranks = self.world // tensor
        if batch % self.row_ranks:
            raise BadInput(f"--batch must be divisible by {self.row_ranks} processes, got {batch}")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        names = ("rows", "tensor")
        mesh = init_device_mesh(device, (self.row_ranks, tensor), mesh_dim_names=names)
        self.row_mesh, self.tensor_mesh = mesh["rows"], mesh["tensor"]
        self.row_rank = self.row_mesh.get_local_rank()

    def spread(self, model: nn.Module) -> nn.Module:
        if self.mode == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if "tp" in self.mode:
            from torch.distributed.tensor.parallel import parallelize_module

            from trilith.blocks.parallel import tensor_parallel_plan

            try:
                parallelize_module(model, self.tensor_mesh, tensor_parallel_plan(model))
            except ValueError as error:
                raise BadInput(str(error)) from None
        if "fsdp" in self.mode:
            from torch.distributed.fsdp import fully_shard

            for part in (*model.blocks, model):
                fully_shard(part, mesh=self.row_mesh)
        return model

    def agree(self, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
        said = torch.stack([loss.double(), torch.tensor(stop, device=self.device).double()])
        dist.all_reduce(said)
        return (said[0] / self.world).to(loss.dtype), bool(said[1] > 0)

    def all_of(self, state: Tensor) -> list[Tensor]:
        own = state.to(self.device)
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own)
        return [one.cpu() for one in every]

    def wait(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()


def ranks_of(args: Namespace, batch: int) -> Ranks:
    """As --parallel says and torchrun has started them."""
    started = "WORLD_SIZE" in os.environ
    if args.parallel is None:
        if started and int(os.environ["WORLD_SIZE"]) > 1:
            raise BadInput(f"torchrun started many processes: give --parallel {'|'.join(MODES)}")
        return Ranks(args.device)
    if not started:
        raise BadInput(
            f"--parallel {args.parallel} needs torchrun: torchrun --nproc-per-node 2 -m "
            f"examples.train_lm --parallel {args.parallel}"
        )
    return Group(args.device, args.parallel, args.tensor_ranks, batch)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over ranks; every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, spread as another one of its shape is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
