"""Which entry of the launch tables a call takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trilith.kernels._runtime.device import architecture
from trilith.kernels.attention.tables import TABLES
from trilith.plugins.spec import INTERPRETING

LARGEST_HEAD_DIM = 512


class Tiles(NamedTuple):
    """A program's queries and keys; the loop's side of them in masked tiles; warps and stages.

    A program makes its scores of `chunk` head dims at a time, and owns as many of its output.
    """

    block_m: int
    block_n: int
    block_masked: int
    num_warps: int
    num_stages: int
    chunk: int = LARGEST_HEAD_DIM


_INTERPRETED = Tiles(32, 32, 16, 4, 1, 128)
_CACHE_BYTES = 24 << 20


class Entry(NamedTuple):
    """Where a call's tiles are in the tables. tf32 takes those of 16 bits, with half the chunk."""

    architecture: str
    dtypes: str  # half, single, tf32
    kernel: str
    head_dim: int
    scores: str  # plain, laden

    def tiles(self) -> Tiles:
        table = TABLES[self.architecture]["half" if self.dtypes == "tf32" else self.dtypes]
        plain, laden = table[self.kernel, self.head_dim]
        chosen = laden if plain is None or self.scores == "laden" else plain
        assert chosen is not None, f"no entry for {self}"
        found = Tiles(*chosen)
        return found._replace(chunk=found.chunk // 2) if self.dtypes == "tf32" else found


def entry_for(kernel: str, q: Tensor, precision: str, head_dim: int, is_plain: bool) -> Entry:
    """The entry of a call, whose wider head dim is a power of two.

    With tf32 a row takes the bytes, and the matrix instructions, of a 16-bit row twice as long,
    more registers: never tiles for plain scores.
    """
    arch, head_dim = architecture(q.device), max(64, head_dim)
    if q.dtype == torch.float32 and precision != "ieee":
        return Entry(arch, "tf32", kernel, 2 * head_dim, "laden")
    dtypes = "single" if q.dtype == torch.float32 else "half"
    has_plain = TABLES[arch][dtypes][kernel, head_dim][0] is not None
    return Entry(arch, dtypes, kernel, head_dim, "plain" if is_plain and has_plain else "laden")


def tiles_for(kernel: str, q: Tensor, precision: str, head_dim: int, is_plain: bool) -> Tiles:
    """The tiles of `kernel` (fwd, dkdv, dk, dv, dq, dbias, decode) for q's device and dtype."""
    if INTERPRETING and q.device.type == "cpu":
        return _INTERPRETED
    return entry_for(kernel, q, precision, head_dim, is_plain).tiles()


def has_parts(q: Tensor, head_dim: int) -> bool:
    """Whether dk and dv of plain scores have tables of their own, for a launch of each."""
    if INTERPRETING and q.device.type == "cpu":
        return False
    dtypes = "single" if q.dtype == torch.float32 else "half"
    return ("dk", max(64, head_dim)) in TABLES[architecture(q.device)][dtypes]


def heads_together(first: Tensor, second: Tensor, group: int = 1) -> int:
    """How many heads, or groups of them, have both their matrices in the last-level cache."""
    head_bytes = first.shape[2] * (first.shape[3] + second.shape[3]) * first.element_size()
    return max(1, _CACHE_BYTES // (head_bytes * group))
