"""Caches of keys and values for decoding. Lengths are counted on the host and on the device.

The host's count finds out that room runs out without asking the device; the device's is what the
kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilith.blocks.cache_checks import (
    counts_of,
    on_device,
    require_fit,
    require_positive,
    require_sequences,
    require_stored,
    shorter,
)
from trilith.kernels import decode_attention
from trilith.kernels.attention.cache import CACHE_APPEND


class KVCache(nn.Module):
    """Rows of keys and values, one a sequence, each with `max_len` places.

    Memory is taken at the first append: k (B, Hkv, max_len, D) and v (B, Hkv, max_len, Dv) in the
    dtype and on the device of what comes. `lengths` (B,) int32 lies on the device, `filled` has the
    same numbers as Python ints.

    Args:
        max_len: places of each sequence; not positive is a ValueError.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor

    def __init__(self, max_len: int) -> None:
        super().__init__()
        require_positive("KVCache", max_len=max_len)
        self.max_len = max_len
        self.filled: list[int] = []
        for name in ("k", "v", "lengths"):
            self.register_buffer(name, None, persistent=False)
        self._expected: Sequence[int] | None = None

    def expect(self, counts: Sequence[int] | None) -> None:
        """How many tokens of each sequence the next append takes; those after are padding."""
        self._expected = counts

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Store keys (B, Hkv, T, D) and values (B, Hkv, T, Dv) after what is there.

        Raises:
            ValueError: a sequence has no room for them, or shapes do not fit; nothing is changed.
        """
        counts = counts_of("KVCache", self._expected, self.filled, k, v)
        filled = [n + new for n, new in zip(self.filled or [0] * len(counts), counts, strict=True)]
        if max(filled, default=0) > self.max_len:
            raise ValueError(
                f"KVCache: a sequence must have at most max_len={self.max_len} tokens, got "
                f"{max(filled)}; make a larger cache, or reset this one"
            )
        if self.k is None:
            self.k, self.v = (t.new_zeros(*t.shape[:2], self.max_len, t.shape[3]) for t in (k, v))
            self.lengths = torch.zeros(len(k), dtype=torch.int32, device=k.device)
        require_fit("KVCache", k, self.k[:, :, :1])
        require_fit("KVCache", v, self.v[:, :, :1])
        new = on_device(counts, k)
        caches = (self.k.transpose(1, 2), self.v.transpose(1, 2))
        CACHE_APPEND(*caches, k, v, self.lengths, new, None)
        self.lengths += k.shape[2] if new is None else new
        self.filled, self._expected = filled, None

    def attend(self, q: Tensor, **options: Any) -> Any:
        """`decode_attention` of the last tokens' queries (B, H, T, D) over all that is stored.

        Raises:
            ValueError: nothing is stored yet.
        """
        require_stored(self)
        return decode_attention(q, self.k, self.v, self.lengths, **options)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what a sequence has beyond `length`; 0 makes its row free for another."""
        self.filled[sequence] = shorter("KVCache", self.filled, sequence, length)
        self.lengths[sequence] = length

    @torch.no_grad()
    def reorder(self, sequences: Sequence[int]) -> None:
        """Row i becomes what row sequences[i] was, as beam search wants it."""
        require_stored(self)
        require_sequences("KVCache", self.filled, sequences)
        at = torch.tensor(sequences, device=self.k.device)
        self.k, self.v, self.lengths = self.k[at], self.v[at], self.lengths[at]
        self.filled = [self.filled[i] for i in sequences]

    def reset(self) -> None:
        """Forget everything; memory is kept, for the same number of sequences."""
        self.filled = [0] * len(self.filled)
        if self.lengths is not None:
            self.lengths.zero_()

    def extra_repr(self) -> str:
        return f"max_len={self.max_len}, filled={self.filled}"


class PagedKVCache(nn.Module):
    """Blocks of keys and values that sequences take as they grow, and give back.

    Args:
        num_blocks: how many there are, for all sequences together.
        block_size: tokens in a block.
        max_len: of one sequence.

    Memory is taken at the first append: k (num_blocks, block_size, Hkv, D), v likewise, and
    `block_table` (B, max_len / block_size) int32, as `decode_attention` reads them.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor
    block_table: Tensor

    def __init__(self, num_blocks: int, block_size: int, max_len: int) -> None:
        super().__init__()
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "max_len": max_len}
        require_positive("PagedKVCache", **sizes)
        self.block_size = block_size
        self.max_len = max_len
        self.filled: list[int] = []
        self.blocks: list[list[int]] = []
        self.free_blocks = list(reversed(range(num_blocks)))
        for name in ("k", "v", "lengths", "block_table"):
            self.register_buffer(name, None, persistent=False)
        self._expected: Sequence[int] | None = None

    expect = KVCache.expect

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Store keys (B, Hkv, T, D) and values (B, Hkv, T, Dv) after what is there.

        Raises:
            ValueError: a sequence grows too long, the blocks run out, or shapes do not fit;
                nothing is changed.
        """
        counts = counts_of("PagedKVCache", self._expected, self.filled, k, v)
        before = self.filled or [0] * len(counts)
        filled = [n + new for n, new in zip(before, counts, strict=True)]
        owned = self.blocks or [[] for _ in counts]
        wanted = [-(-n // self.block_size) - len(own) for n, own in zip(filled, owned, strict=True)]
        if max(filled, default=0) > self.max_len or sum(wanted) > len(self.free_blocks):
            raise ValueError(
                f"PagedKVCache: must have room for {sum(wanted)} more blocks and sequences of "
                f"{max(filled)}, got {len(self.free_blocks)} free blocks and max_len="
                f"{self.max_len}; free(sequence) gives blocks back"
            )
        if self.k is None:
            self._allocate(k, v)
        require_fit("PagedKVCache", k, self.k.transpose(1, 2)[:1], batch=False)
        require_fit("PagedKVCache", v, self.v.transpose(1, 2)[:1], batch=False)
        self.blocks, self.filled, self._expected = owned, filled, None
        self._take(wanted)
        new = on_device(counts, k)
        CACHE_APPEND(self.k, self.v, k, v, self.lengths, new, self.block_table)
        self.lengths += k.shape[2] if new is None else new

    def attend(self, q: Tensor, **options: Any) -> Any:
        """As `KVCache.attend`."""
        require_stored(self)
        table = self.block_table
        return decode_attention(q, self.k, self.v, self.lengths, block_table=table, **options)

    def free(self, sequence: int) -> None:
        """Forget a sequence; its blocks are another's to take, and so is its row."""
        self.truncate(sequence, 0)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget what a sequence has beyond `length`, and give back the blocks behind it."""
        self.filled[sequence] = shorter("PagedKVCache", self.filled, sequence, length)
        kept = -(-length // self.block_size)
        self.free_blocks += reversed(self.blocks[sequence][kept:])
        del self.blocks[sequence][kept:]
        self.lengths[sequence] = length

    def reset(self) -> None:
        """Forget every sequence."""
        for sequence in range(len(self.filled)):
            self.free(sequence)

    def _allocate(self, k: Tensor, v: Tensor) -> None:
        total = len(self.free_blocks) + sum(map(len, self.blocks))
        shape = (total, self.block_size, k.shape[1])
        self.k, self.v = (t.new_zeros(*shape, t.shape[3]) for t in (k, v))
        self.lengths = torch.zeros(len(k), dtype=torch.int32, device=k.device)
        most = -(-self.max_len // self.block_size)
        self.block_table = torch.zeros(len(k), most, dtype=torch.int32, device=k.device)

    def _take(self, wanted: Sequence[int]) -> None:
        rows, places, taken = [], [], []
        for row, (own, more) in enumerate(zip(self.blocks, wanted, strict=True)):
            for _ in range(more):
                rows.append(row)
                places.append(len(own))
                own.append(self.free_blocks.pop())
                taken.append(own[-1])
        if taken:
            table = self.block_table
            at = torch.tensor([rows, places, taken], dtype=torch.int32).to(table.device)
            table[at[0], at[1]] = at[2]

    def extra_repr(self) -> str:
        return (
            f"block_size={self.block_size}, max_len={self.max_len}, filled={self.filled}, "
            f"{len(self.free_blocks)} blocks free"
        )
