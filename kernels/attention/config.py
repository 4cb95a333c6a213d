"""Tile sizes by kernel, architecture, dtype class and head dim: data that measurements change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.device import architecture
from trilith.plugins.spec import INTERPRETING


class Tiles(NamedTuple):
    """A program's queries and keys; the loop's side of them in masked tiles; warps and stages."""

    block_m: int
    block_n: int
    block_masked: int
    num_warps: int
    num_stages: int


_INTERPRETED = Tiles(32, 32, 16, 4, 1)
_CACHE_BYTES = 24 << 20

# By kernel and head dim, for plain scores, and for scores with a bias, mask, slope, cap or dropout,
# which hold more registers.
_HALF_SM80 = {
    "fwd": {
        64: (Tiles(128, 64, 64, 8, 3), Tiles(128, 64, 64, 8, 3)),
        128: (Tiles(128, 64, 64, 8, 3), Tiles(128, 32, 32, 8, 3)),
        256: (Tiles(64, 32, 32, 8, 2), Tiles(64, 32, 32, 8, 2)),
    },
    "dkdv": {
        64: (Tiles(64, 64, 32, 8, 2), Tiles(32, 128, 32, 8, 2)),
        128: (Tiles(32, 64, 32, 8, 2), Tiles(32, 64, 32, 8, 2)),
        256: (Tiles(16, 64, 16, 8, 2), Tiles(32, 32, 32, 8, 2)),
    },
    "dq": {
        64: (Tiles(128, 64, 64, 8, 2), Tiles(64, 32, 32, 8, 2)),
        128: (Tiles(64, 64, 64, 8, 2), Tiles(64, 64, 64, 8, 2)),
        256: (Tiles(64, 32, 32, 8, 2), Tiles(64, 32, 32, 8, 2)),
    },
    "dbias": {
        64: (Tiles(64, 64, 64, 8, 2),) * 2,
        128: (Tiles(64, 32, 32, 8, 2),) * 2,
        256: (Tiles(64, 32, 32, 8, 2),) * 2,
    },
}
_HALF_SM90 = {
    "fwd": {
        64: (Tiles(128, 128, 64, 8, 2), Tiles(128, 64, 64, 8, 2)),
        128: (Tiles(128, 128, 64, 8, 2), Tiles(128, 32, 32, 8, 2)),
        256: (Tiles(128, 64, 32, 8, 2), Tiles(64, 32, 16, 8, 2)),
    },
    "dkdv": {
        64: (Tiles(32, 128, 32, 8, 2), Tiles(32, 128, 32, 8, 2)),
        128: (Tiles(32, 128, 16, 8, 2), Tiles(32, 64, 32, 8, 2)),
        256: (Tiles(32, 32, 16, 8, 2), Tiles(16, 32, 16, 8, 2)),
    },
    "dq": {
        64: (Tiles(128, 64, 64, 8, 2), Tiles(128, 64, 64, 8, 2)),
        128: (Tiles(128, 64, 64, 8, 2), Tiles(128, 64, 64, 8, 2)),
        256: (Tiles(64, 32, 32, 8, 2), Tiles(64, 32, 32, 8, 2)),
    },
    "dbias": {
        64: (Tiles(64, 64, 64, 8, 2),) * 2,
        128: (Tiles(64, 64, 64, 8, 2),) * 2,
        256: (Tiles(64, 32, 32, 8, 2),) * 2,
    },
}
_HALF_SM100 = {
    "fwd": {
        64: (Tiles(128, 128, 64, 8, 2), Tiles(128, 64, 64, 8, 2)),
        128: (Tiles(128, 128, 64, 8, 2), Tiles(64, 64, 32, 8, 2)),
        256: (Tiles(128, 64, 32, 8, 2), Tiles(64, 32, 16, 8, 2)),
    },
    "dkdv": {
        64: (Tiles(32, 128, 32, 8, 2), Tiles(32, 128, 32, 8, 2)),
        128: (Tiles(32, 128, 32, 8, 2), Tiles(32, 128, 32, 8, 2)),
        256: (Tiles(32, 64, 32, 8, 2), Tiles(32, 64, 32, 8, 2)),
    },
    "dq": {
        64: (Tiles(128, 64, 64, 8, 2), Tiles(128, 64, 64, 8, 2)),
        128: (Tiles(128, 64, 64, 8, 2), Tiles(128, 64, 64, 8, 2)),
        256: (Tiles(64, 32, 32, 8, 2), Tiles(64, 16, 16, 8, 2)),
    },
    "dbias": {
        64: (Tiles(64, 64, 64, 8, 2),) * 2,
        128: (Tiles(64, 64, 64, 8, 2),) * 2,
        256: (Tiles(64, 32, 32, 8, 2),) * 2,
    },
}
_HALF_GFX942 = {
    "fwd": {
        64: (Tiles(128, 64, 64, 8, 1), Tiles(128, 64, 64, 8, 1)),
        128: (Tiles(128, 64, 64, 8, 1), Tiles(128, 32, 32, 8, 1)),
        256: (Tiles(128, 32, 32, 8, 1), Tiles(64, 32, 32, 4, 1)),
    },
    "dkdv": {
        64: (Tiles(32, 128, 32, 8, 1), Tiles(32, 128, 32, 8, 1)),
        128: (Tiles(16, 64, 16, 8, 1), Tiles(16, 64, 16, 8, 1)),
        256: (Tiles(16, 64, 16, 8, 1), Tiles(16, 64, 16, 8, 1)),
    },
    "dq": {
        64: (Tiles(128, 64, 64, 8, 1), Tiles(64, 64, 64, 4, 1)),
        128: (Tiles(64, 32, 32, 8, 1), Tiles(64, 32, 32, 4, 1)),
        256: (Tiles(64, 16, 16, 8, 1), Tiles(64, 16, 16, 8, 1)),
    },
    "dbias": {
        64: (Tiles(64, 64, 64, 8, 1),) * 2,
        128: (Tiles(64, 64, 64, 8, 1),) * 2,
        256: (Tiles(16, 16, 16, 4, 1),) * 2,
    },
}
# IEEE products of float32 have no matrix instruction on NVIDIA, where all take the same tiles.
_SINGLE = {
    "fwd": {
        64: (Tiles(64, 32, 32, 8, 1), Tiles(64, 32, 32, 8, 1)),
        128: (Tiles(32, 32, 32, 8, 1), Tiles(32, 16, 16, 8, 1)),
        256: (Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
    },
    "dkdv": {
        64: (Tiles(32, 32, 32, 8, 1), Tiles(32, 32, 32, 8, 1)),
        128: (Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
        256: (Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
    },
    "dq": {
        64: (Tiles(32, 32, 32, 4, 1), Tiles(32, 32, 32, 8, 1)),
        128: (Tiles(16, 16, 16, 8, 1), Tiles(32, 16, 16, 8, 1)),
        256: (Tiles(16, 16, 16, 8, 1), Tiles(16, 16, 16, 8, 1)),
    },
    "dbias": {
        64: (Tiles(32, 32, 32, 8, 1),) * 2,
        128: (Tiles(16, 16, 16, 4, 1),) * 2,
        256: (Tiles(16, 16, 16, 4, 1),) * 2,
    },
}
_SINGLE_GFX942 = {
    **_SINGLE,
    "dkdv": {**_SINGLE["dkdv"], 256: (Tiles(16, 16, 16, 4, 1),) * 2},
    "dq": {**_SINGLE["dq"], 256: (Tiles(16, 16, 16, 4, 1),) * 2},
}
_HALF = {"sm_80": _HALF_SM80, "sm_90": _HALF_SM90, "sm_100": _HALF_SM100, "gfx942": _HALF_GFX942}


def tiles_for(kernel: str, q: Tensor, block_d: int, block_dv: int, is_plain: bool) -> Tiles:
    """The tiles of `kernel` (fwd, dkdv, dq, dbias) for q's device and dtype."""
    if INTERPRETING and q.device.type == "cpu":
        return _INTERPRETED
    arch = architecture(q.device)
    if q.dtype == torch.float32:
        table = _SINGLE_GFX942 if arch == "gfx942" else _SINGLE
    else:
        table = _HALF[arch]
    plain, laden = table[kernel][max(64, block_d, block_dv)]
    return plain if is_plain else laden


def heads_together(first: Tensor, second: Tensor, group: int = 1) -> int:
    """How many heads, or groups of them, have both their matrices in the last-level cache."""
    head_bytes = first.shape[2] * (first.shape[3] + second.shape[3]) * first.element_size()
    return max(1, _CACHE_BYTES // (head_bytes * group))
