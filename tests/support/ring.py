"""One rank of ring attention: keys and values travel, partial results are merged.

python -m tests.support.ring RANK WORLD FOLDER reads inputs.pt from the folder, takes this rank's
share of queries, keys and values, and writes its output, lse and gradients to RANK.pt there.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from trilith.kernels import attention, merge_attention


class PassOn(torch.autograd.Function):
    """A tensor goes to the next rank, the previous one's comes; gradients go the other way."""

    @staticmethod
    def forward(ctx, tensor):
        return exchanged(tensor, 1)

    @staticmethod
    def backward(ctx, grad):
        return exchanged(grad, -1)


def exchanged(tensor, step):
    rank, world = dist.get_rank(), dist.get_world_size()
    incoming = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    sends = dist.isend(tensor.contiguous(), (rank + step) % world)
    dist.recv(incoming, (rank - step) % world)
    sends.wait()
    return incoming


def ring_attention(q, k, v):
    """Causal attention of this rank's queries over the keys of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = []
    for step in range(world):
        owner = (rank - step) % world
        if owner <= rank:
            parts.append(attention(q, k, v, causal=owner == rank, return_lse=True))
        if step < world - 1:
            k, v = PassOn.apply(k), PassOn.apply(v)
    # the last keys that came take part in every rank's graph, so that every rank passes back
    out, lse = merge_attention(*zip(*parts, strict=True))
    return out + 0 * (k.sum() + v.sum()), lse


def main(rank, world, folder):
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    q, k, v, dout, dlse = (
        t.chunk(world, dim=2)[rank] for t in torch.load(folder / "inputs.pt", weights_only=True)
    )
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = ring_attention(*leaves)
    gradients = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    torch.save([out.detach(), lse.detach(), *gradients], folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
