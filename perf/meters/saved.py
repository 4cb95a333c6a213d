"""Bytes that a forward pass keeps for backward: unique storages that autograd packs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], ignore: Iterable[Tensor] = ()) -> int:
    """Bytes kept by `forward()`, without the storages of `ignore`, such as the parameters'."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _same):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def _same(tensor: Tensor) -> Tensor:
    return tensor
