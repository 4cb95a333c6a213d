"""What caches of keys and values refuse, before anything is changed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trilith.kernels._runtime.checks import require_tensors

if TYPE_CHECKING:
    from trilith.blocks.cache import KVCache, PagedKVCache


def require_positive(name: str, **sizes: int) -> None:
    for arg, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name}: {arg} must be an int, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name}: {arg} must be positive, got {size}")


def counts_of(
    name: str, expected: Sequence[int] | None, filled: Sequence[int], k: Tensor, v: Tensor
) -> list[int]:
    require_tensors(name, keys=k, values=v)
    if k.ndim != 4 or v.shape[:3] != k.shape[:3] or v.ndim != 4:
        raise ValueError(
            f"{name}: keys and values must be (B, Hkv, T, dim) with one B, Hkv and T, got "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    B, _, T, _ = k.shape
    if filled and len(filled) != B:
        raise ValueError(f"{name}: keys must be of {len(filled)} sequences, got {B}")
    if (k.dtype, k.device) != (v.dtype, v.device):
        raise ValueError(
            f"{name}: keys and values must have one dtype and device, got {k.dtype} on {k.device} "
            f"and {v.dtype} on {v.device}"
        )
    counts = [T] * B if expected is None else ints(name, "counts", expected)
    if len(counts) != B:
        raise ValueError(f"{name}: expect must be given {B} counts, got {counts}")
    if not all(0 <= n <= T for n in counts):
        raise ValueError(f"{name}: counts must be from 0 to {T}, got {counts}")
    return counts


def ints(name: str, arg: str, given: Sequence[Any]) -> list[int]:
    try:
        return [operator.index(n) for n in given]
    except TypeError:
        raise TypeError(f"{name}: {arg} must be ints, got {given!r}") from None


def require_stored(cache: KVCache | PagedKVCache) -> None:
    if cache.k is None:
        raise ValueError(f"{type(cache).__name__}: something must be appended first, got nothing")


def on_device(counts: Sequence[int], k: Tensor) -> Tensor | None:
    """None where every sequence takes all of its tokens."""
    if all(n == k.shape[2] for n in counts):
        return None
    return torch.tensor(counts, dtype=torch.int32, device=k.device)


def require_fit(name: str, new: Tensor, like: Tensor, batch: bool = True) -> None:
    ours, theirs = ((*t.shape[0 if batch else 1 : 2], t.shape[3]) for t in (like, new))
    if ours != theirs or new.dtype != like.dtype or new.device != like.device:
        raise ValueError(
            f"{name}: keys and values must fit those stored, {like.dtype} {ours} on {like.device}, "
            f"got {new.dtype} {theirs} on {new.device}"
        )


def require_sequences(name: str, filled: Sequence[int], sequences: Sequence[int]) -> None:
    """That they are numbers of sequences: on a device a wrong one would end the process."""
    if not all(0 <= n < len(filled) for n in ints(name, "sequences", sequences)):
        raise ValueError(
            f"{name}: sequences must be numbers of the {len(filled)} stored, got {list(sequences)}"
        )


def shorter(name: str, filled: Sequence[int], sequence: int, length: int) -> int:
    require_sequences(name, filled, [sequence])
    (length,) = ints(name, "length", [length])
    if not 0 <= length <= filled[sequence]:
        raise ValueError(f"{name}: length must be from 0 to {filled[sequence]}, got {length}")
    return length
