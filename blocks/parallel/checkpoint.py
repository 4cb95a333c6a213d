"""Checkpoints that any number of ranks writes and any number reads, as safetensors.

`torch.distributed.checkpoint`, with its safetensors storage: its default one keeps its index in a
pickle. Each rank writes what it holds; what a file holds of a tensor stands in the file's header.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(
    folder: str | PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    group: ProcessGroup | None = None,
) -> None:
    """Write a model's and an optimizer's tensors into a folder; every rank must ask.

    Args:
        folder: a new one, which all ranks see. Needs the package safetensors.
        model: of one process, or under DDP, `fully_shard` or `parallelize_module`.
        optimizer: of the model's parameters. Its options, such as lr, are not written.
        group: the ranks that hold the model; None for all.

    Example:
        >>> save_checkpoint("step-1000", model, optimizer)
    """
    model_state, optimizer_state = _states(model, optimizer)
    writer = dcp.HuggingFaceStorageWriter(fspath(folder), save_distributed=True)
    tensors = model_state | _tensors(optimizer_state)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def load_checkpoint(
    folder: str | PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    group: ProcessGroup | None = None,
) -> None:
    """Read what `save_checkpoint` wrote, on however many ranks; every rank must ask.

    Args:
        folder: that was written, by any number of ranks and under any of their engines.
        model: whose parameters are overwritten; spread as it likes, or of one process.
        optimizer: of the model's parameters, whose state is overwritten too.
        group: the ranks that hold the model; None for all.

    Raises:
        CheckpointException: a tensor of the model or the optimizer is not in the folder, or has
            another shape there.
    """
    model_state, optimizer_state = _states(model, optimizer)
    tensors = model_state | _tensors(optimizer_state)
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    reader = dcp.HuggingFaceStorageReader(fspath(folder))
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=alone)
    set_model_state_dict(model, {name: tensors[name] for name in model_state})
    if optimizer is not None:
        filled = {name: tensors.get(name, value) for name, value in optimizer_state.items()}
        set_optimizer_state_dict(model, optimizer, filled, options=_FLAT)


def _states(model: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each value by its name; an optimizer that has not stepped gets its state here."""
    if optimizer is None:
        return get_model_state_dict(model), {}
    flat = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    return get_model_state_dict(model), dict(flat)


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
