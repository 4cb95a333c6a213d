"""Stages of a language model for `torch.distributed.pipelining`'s schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from trilith.blocks.linear import plain_linear
from trilith.blocks.stream import Stream
from trilith.blocks.transformer import Projection, TransformerLM, run_block
from trilith.kernels import cross_entropy, dropout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Stage(nn.Module):
    """Consecutive blocks of a `TransformerLM`; the first has the embedding, the last the head.

    Its state dict is the model's own, but for what other stages hold. The last stage gives hidden
    states: `loss` is the schedule's loss_fn, and `logits` what the model would return.
    """

    def __init__(self, model: TransformerLM, index: int, count: int) -> None:
        super().__init__()
        layers = len(model.blocks)
        if not 1 <= count <= layers:
            raise ValueError(
                f"pipeline_stage: count must be from 1 to the model's {layers} blocks, got {count}"
            )
        if not 0 <= index < count:
            raise ValueError(f"pipeline_stage: index must be in [0, {count}), got {index}")
        if model.head is None:
            raise ValueError(
                "pipeline_stage: model must have a head of its own, got one tied to the embedding; "
                "build it with tied=False"
            )
        first, last = index == 0, index == count - 1
        self.embedding = model.embedding if first else None
        self.position = model.position if first else None
        mine = range(layers * index // count, layers * (index + 1) // count)
        self.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in mine})
        self.norm = model.norm if last else None
        self.head = model.head if last else None
        self.dropout = model.dropout
        self.checkpoint_activations = model.checkpoint_activations

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) in the first stage, elsewhere what the stage before gave, (B, T, dim)."""
        if self.embedding is not None:
            x = cast(nn.Module, self.position)(self.embedding(x))
            x = dropout(x, self.dropout, self.training)
        stream = Stream(x)
        for block in self.blocks.values():
            stream = run_block(block, stream, recompute=self.checkpoint_activations)
        return stream.total() if self.norm is None else stream.normed(self.norm)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the last stage's output."""
        return cast(nn.Module, self.head)(hidden)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the last stage's output, for targets (B, T)."""
        head = cast(nn.Module, self.head)
        if plain_linear(head):
            return Projection().loss(hidden, head.weight, head.bias, targets, None)
        return cross_entropy(head(hidden).flatten(0, -2), targets.flatten())


def pipeline_stage(
    model: TransformerLM,
    index: int,
    count: int,
    *,
    device: torch.device | str = "cpu",
    group: ProcessGroup | None = None,
) -> PipelineStage:
    """One of `count` stages of a model, to be run by a schedule of `torch.distributed.pipelining`.

    Args:
        model: untied, with no fewer blocks than stages; maybe on the meta device. The stage takes
            its parts of it, not copies.
        index: which stage; that of this rank.
        count: how many stages; blocks are divided evenly.
        device: where the stage runs; its parts are moved there.
        group: the ranks of the pipeline; None for all.

    Returns:
        A PipelineStage whose `submod` is a module with the model's names for its parts, and with
        `loss`, the schedule's loss_fn. Torch 2.11's stages take contiguous tokens alone.

    Raises:
        ValueError: the head is tied, or index or count is out of range.

    Source: Huang et al., "GPipe", 2019; Narayanan et al., "PipeDream-2BW", 2021.

    Example:
        >>> stage = pipeline_stage(model, rank, ranks, device="cuda")
        >>> schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=stage.submod.loss)
        >>> schedule.step(tokens) if rank == 0 else schedule.step(target=targets, losses=losses)
    """
    module = Stage(model, index, count)
    if not any(p.is_meta for p in module.parameters()):
        module = module.to(device)
    return PipelineStage(module, index, count, torch.device(device), group=group)
