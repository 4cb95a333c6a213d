"""Checkpoints that any number of ranks writes and any number reads, as safetensors.

`torch.distributed.checkpoint`, with its safetensors storage: its default one keeps its index in a
pickle. Each rank writes what it holds; what a file holds of a tensor stands in the file's header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch
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
_NOT_STEPPED = "optimizer_has_not_stepped"
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


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
    tensors = get_model_state_dict(model)
    if optimizer is not None and optimizer.state:
        tensors |= _tensors(get_optimizer_state_dict(model, optimizer, options=_FLAT))
    elif optimizer is not None:
        tensors[_NOT_STEPPED] = torch.tensor(True)
    writer = dcp.HuggingFaceStorageWriter(fspath(folder), save_distributed=True)
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
        optimizer: of the model's parameters, whose state is replaced; gradients stay. Where reading
            fails it keeps its own.
        group: the ranks that hold the model; None for all.

    Raises:
        CheckpointException: a tensor of the model or the optimizer is not in the folder, or has
            another shape there.
    """
    reader = dcp.HuggingFaceStorageReader(fspath(folder))
    tensors = get_model_state_dict(model)
    if optimizer is None:
        _read(tensors, reader, group)
    else:
        with _replaced(optimizer):
            _load_both(model, tensors, optimizer, reader, group)
    set_model_state_dict(model, tensors)


def _load_both(
    model: nn.Module,
    tensors: dict[str, Any],
    optimizer: Optimizer,
    reader: dcp.HuggingFaceStorageReader,
    group: ProcessGroup | None,
) -> None:
    """Fill the model's tensors, and give an optimizer without state that of the folder."""
    with _gradients_aside(optimizer):  # torch makes no state where there are some
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_FLAT))
    written = reader.read_metadata().state_dict_metadata
    stepped = {_parameter(name) for name in written if name.startswith("state.")}
    wanted = _tensors(state)
    absent = {name for name in wanted if _parameter(name) not in stepped}
    if not stepped and _NOT_STEPPED not in written:
        absent = set()  # which is an error
    found = {name: tensor for name, tensor in wanted.items() if name not in absent}
    _read(tensors | found, reader, group)
    for name, tensor in found.items():
        kind = type(state[name])
        state[name] = tensor if isinstance(state[name], Tensor) else kind(tensor.item())
    owners = {id(value): p for p, own in optimizer.state.items() for value in own.values()}
    unstepped = {owners[id(state[name])] for name in absent if isinstance(state[name], Tensor)}
    set_optimizer_state_dict(model, optimizer, state, options=_FLAT)
    for p, own in list(optimizer.state.items()):
        if p in unstepped or not own:
            del optimizer.state[p]


def _read(
    tensors: dict[str, Any], reader: dcp.HuggingFaceStorageReader, group: ProcessGroup | None
) -> None:
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=alone)


@contextmanager
def _replaced(optimizer: Optimizer) -> Iterator[None]:
    """Its state is empty at first; on an error it has its old one again."""
    before = dict(optimizer.state)
    optimizer.state.clear()
    try:
        yield
    except BaseException:
        optimizer.state.clear()
        optimizer.state.update(before)
        raise


@contextmanager
def _gradients_aside(optimizer: Optimizer) -> Iterator[None]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient


def _parameter(name: str) -> str:
    """Whose an optimizer's tensor is: "state.blocks.0.weight" of "state.blocks.0.weight.step"."""
    return name.rpartition(".")[0]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of an optimizer's flat state, whose options are left out; numbers as tensors."""
    values = {name: value for name, value in state.items() if name.startswith("state.")}
    return {
        name: value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=_NUMBERS[type(value)])
        for name, value in values.items()
        if isinstance(value, Tensor) or type(value) in _NUMBERS
    }
