"""Caches: what is stored where, by the kernel and its reference, and what is refused."""

import re

import pytest
import torch

from tests.support.compare import assert_fair
from tests.support.devices import DEVICE
from tests.support.layouts import contiguous, every_other, transposed
from trilith.blocks import KVCache, PagedKVCache
from trilith.kernels import attention
from trilith.kernels.attention.cache import CACHE_APPEND

B, HKV, D, DV, ROOM, PAGE = 3, 2, 8, 12, 20, 4


def tokens(T, dtype=torch.float32):
    shapes = ((B, HKV, T, D), (B, HKV, T, DV))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def make(kind, blocks=16):
    return KVCache(ROOM) if kind == "rows" else PagedKVCache(blocks, PAGE, ROOM)


def state(cache):
    tensors = {name: t.clone() for name, t in cache.named_buffers() if t is not None}
    lists = {n: [*getattr(cache, n, [])] for n in ("filled", "free_blocks")}
    return tensors, lists, [list(own) for own in getattr(cache, "blocks", [])]


def assert_unchanged(cache, before):
    tensors, *lists = state(cache)
    assert lists == list(before[1:])
    assert all(torch.equal(t, before[0][name]) for name, t in tensors.items())


by_kind = pytest.mark.parametrize("kind", ["rows", "pages"])
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


@by_dtype
@by_kind
def test_attention_over_a_cache_is_attention_over_what_came(kind, dtype):
    cache, stored = make(kind), [[] for _ in range(B)]
    for T, counts in ((5, (5, 2, 0)), (1, None), (3, (3, 3, 3)), (2, (0, 2, 1))):
        k, v = tokens(T, dtype)
        cache.expect(counts)
        cache.append(k, v)
        for b, n in enumerate(counts or [T] * B):
            stored[b].append((k[b, :, :n], v[b, :, :n]))
        assert cache.filled == cache.lengths.tolist()
    assert cache.filled == [9, 8, 5]
    q = torch.randn(B, 4, 1, D, device=DEVICE).to(dtype)
    out = cache.attend(q)
    for b, parts in enumerate(stored):
        given = [q[b : b + 1], *(torch.cat(side, 1)[None] for side in zip(*parts, strict=True))]
        expected = attention(*given)
        if dtype == torch.bfloat16:
            assert_fair(out[b : b + 1], attention(*(t.double() for t in given)), expected)
        else:
            torch.testing.assert_close(out[b : b + 1], expected)


@pytest.mark.parametrize("layout", [contiguous, every_other, transposed])
@by_kind
def test_the_kernel_stores_what_the_reference_stores(kind, layout):
    """Of tokens, and into a cache, in any layout."""
    k, v = (layout(t) for t in tokens(4))
    lengths = torch.tensor([0, 5, 18], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([4, 2, 4], dtype=torch.int32, device=DEVICE)
    table = None
    if kind == "pages":
        order = torch.randperm(B * 5).reshape(B, 5)
        order[0, 0], order[1, 1] = 99, -1
        table = order.to(torch.int32).to(DEVICE)
    rows = (B, ROOM) if table is None else (B * 5, PAGE)
    ours, theirs = (
        [layout(torch.full((*rows, HKV, n), 7.0, device=DEVICE)) for n in (D, DV)] for _ in range(2)
    )
    CACHE_APPEND(*ours, k, v, lengths, counts, table)
    CACHE_APPEND.reference(*theirs, k, v, lengths, counts, table)
    for a, e in zip(ours, theirs, strict=True):
        assert torch.equal(a, e)
        assert (a != 7).any() and (a == 7).any()


def test_the_op_is_one_that_torch_knows():
    k, v = tokens(2)
    caches = [torch.zeros(B, ROOM, HKV, n, device=DEVICE) for n in (D, DV)]
    lengths = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(CACHE_APPEND.op, (*caches, k, v, lengths, None, None))

    def step(k_cache, v_cache, k, v, lengths):
        CACHE_APPEND(k_cache, v_cache, k, v, lengths, None, None)
        return k_cache.sum() + v_cache.sum()

    copies = [c.clone() for c in caches]
    total = torch.compile(step, fullgraph=True, backend="aot_eager")(*copies, k, v, lengths)
    torch.testing.assert_close(total, step(*caches, k, v, lengths))
    assert all(map(torch.equal, copies, caches))


@by_kind
def test_no_room_is_an_error_and_changes_nothing(kind):
    cache = make(kind)
    cache.append(*tokens(ROOM - 1))
    before = state(cache)
    with pytest.raises(ValueError, match=f"max_len={ROOM}"):
        cache.append(*tokens(2))
    assert_unchanged(cache, before)
    cache.append(*tokens(1))
    assert cache.filled == [ROOM] * B


def test_pages_hold_max_len_tokens_whatever_their_size():
    cache = PagedKVCache(16, PAGE, ROOM - 1)
    cache.append(*tokens(ROOM - 2))
    before = state(cache)
    with pytest.raises(ValueError, match=f"sequences of {ROOM}, got 1 free blocks and max_len"):
        cache.append(*tokens(2))
    assert_unchanged(cache, before)
    cache.append(*tokens(1))
    assert cache.filled == [ROOM - 1] * B and cache.block_table.shape == (B, ROOM // PAGE)


@by_kind
def test_what_is_expected_is_of_one_append(kind):
    cache = make(kind)
    cache.expect([1, 0, 2])
    cache.append(*tokens(2))
    cache.append(*tokens(3))
    assert cache.filled == cache.lengths.tolist() == [4, 3, 5]


def test_blocks_that_run_out_are_an_error_until_a_sequence_is_freed():
    cache = make("pages", blocks=4)
    cache.append(*tokens(PAGE))
    before = state(cache)
    with pytest.raises(ValueError, match="room for 3 more blocks .* got 1 free blocks"):
        cache.append(*tokens(1))
    assert_unchanged(cache, before)
    cache.free(0)
    cache.expect([0, 1, 1])
    cache.append(*tokens(1))
    assert cache.filled == [0, PAGE + 1, PAGE + 1] and not cache.free_blocks
    owned = [page for own in cache.blocks for page in own]
    assert sorted(owned) == [0, 1, 2, 3]


@by_kind
def test_tokens_that_do_not_fit_change_nothing(kind):
    cache = make(kind)
    k, v = tokens(2)
    cache.append(k, v)
    before = state(cache)
    for wrong in ((k.half(), v.half()), (k[:2], v[:2]), (k[:, :1], v), (k, v[..., :3])):
        with pytest.raises(ValueError, match="KVCache: keys"):
            cache.append(*wrong)
    with pytest.raises(ValueError, match=r"one B, Hkv and T, got \(3, 2, 2, 8\)"):
        cache.append(k, v[:, :, :1])
    cache.expect([1])
    with pytest.raises(ValueError, match=r"expect must be given 3 counts, got \[1\]"):
        cache.append(k, v)
    for wrong in ([1, 2, 3], [1, -1, 2]):
        cache.expect(wrong)
        with pytest.raises(ValueError, match=re.escape(f"counts must be from 0 to 2, got {wrong}")):
            cache.append(k, v)
    cache.expect([1.5, 2, 2])
    with pytest.raises(TypeError, match=r"counts must be ints, got \[1.5, 2, 2\]"):
        cache.append(k, v)
    with pytest.raises(ValueError, match="must have one dtype and device, got torch.float32 on"):
        make(kind).append(k, v.half())
    assert_unchanged(cache, before)


@by_kind
def test_what_is_truncated_or_reset_can_be_filled_again(kind):
    cache, (k, v) = make(kind), tokens(6)
    cache.append(k, v)
    cache.truncate(1, 2)
    assert cache.lengths.tolist() == cache.filled == [6, 2, 6]
    with pytest.raises(ValueError, match="length must be from 0 to 2, got 5"):
        cache.truncate(1, 5)
    for other in (-1, B):
        with pytest.raises(ValueError, match=f"numbers of the 3 stored, got \\[{other}"):
            cache.truncate(other, 0)
    q = torch.randn(B, 2, 1, D, device=DEVICE)
    expected = attention(q[1:2], k[1:2, :, :2], v[1:2, :, :2])
    torch.testing.assert_close(cache.attend(q)[1:2], expected)
    cache.reset()
    assert cache.lengths.tolist() == cache.filled == [0] * B
    cache.append(k, v)
    torch.testing.assert_close(cache.attend(q), attention(q, k, v))


def test_rows_are_reordered():
    cache, (k, v) = make("rows"), tokens(4)
    cache.expect([4, 1, 2])
    cache.append(k, v)
    q = torch.randn(B, 2, 1, D, device=DEVICE)
    before = cache.attend(q)
    cache.reorder([2, 2, 0])
    assert cache.filled == cache.lengths.tolist() == [2, 2, 4]
    torch.testing.assert_close(cache.attend(q[[2, 2, 0]]), before[[2, 2, 0]])
    with pytest.raises(ValueError, match=r"sequences must be numbers of the 3 stored, got \[0, 3"):
        cache.reorder([0, 3, 1])


@by_kind
def test_a_cache_is_not_part_of_a_models_state(kind):
    cache = make(kind)
    cache.append(*tokens(2))
    assert not cache.state_dict()
    with pytest.raises(ValueError, match="something must be appended first"):
        make(kind).attend(torch.zeros(B, 2, 1, D))
    for wrong in ({"rows": lambda: KVCache(0), "pages": lambda: PagedKVCache(0, 4, 8)}[kind],):
        with pytest.raises(ValueError, match="must be positive, got 0"):
            wrong()
