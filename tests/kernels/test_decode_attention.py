"""Decoding against its reference in float64, and against attention over what the cache holds."""

import pytest
import torch

import trilith
from tests.support.compare import assert_fair, assert_like_eager
from tests.support.covering import pairwise
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import attention, decode_attention
from trilith.kernels._runtime.launch import observers
from trilith.kernels.attention.decode import DECODE_ATTENTION as OP
from trilith.plugins.conformance.compare import assert_same

LENGTHS = (0, 1, 2, 15, 16, 17, 40, 77, 95, 96)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def counts(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def draw(lengths, H=2, Hkv=None, T=1, S=96, D=16, Dv=None, dtype=torch.float32):
    """q, caches with NaN where nothing was stored, lengths."""
    Hkv, B = Hkv or H, len(lengths)
    caches = [randn(B, Hkv, S, n, dtype=dtype) for n in (D, Dv or D)]
    for cache in caches:
        for b, length in enumerate(lengths):
            cache[b, :, length:] = torch.nan
    return randn(B, H, T, D, dtype=dtype), *caches, counts(*lengths)


def eager(q, k, v, lengths, table, slopes, sinks, scale, softcap, left):
    """The reference with the kernel's one inner rounding, of the probabilities."""
    args = (lengths, table, slopes, sinks, scale, softcap, left)
    _, lse = OP.spec.reference(q, k, v, *args)
    one_hot = torch.eye(k.shape[0] * k.shape[1], device=q.device)
    one_hot = one_hot.reshape(*k.shape[:2], 1, -1).expand(-1, -1, k.shape[2], -1)
    weights, _ = OP.spec.reference(q.float(), k.float(), one_hot, *args)
    values = v.float().nan_to_num(0).transpose(1, 2)
    heads = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[2])
    values = values.transpose(0, 1).flatten(1, 2)[heads]
    return (weights.to(q.dtype).float() @ values).to(q.dtype), lse


def check(
    q,
    k,
    v,
    lengths,
    table=None,
    *,
    slopes=None,
    sinks=None,
    softcap=0.0,
    left=-1,
    scale=0.3,
    judge=assert_like_eager,
):
    if table is None:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    rest = (lengths, table, slopes, sinks, scale, softcap, left)
    wide = [t.double() for t in (q, k, v)]
    wide += [t.double() if t is not None and t.is_floating_point() else t for t in rest[:4]]
    actual = OP(q, k, v, *rest)
    expected = OP.spec.reference(*wide, *rest[4:])
    for a, e, p in zip(actual, expected, eager(q, k, v, *rest), strict=True):
        judge(a, e, p)
    return actual


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, T, poison):
    out, lse = check(*draw([length, 96], T=T))
    unseeing = max(0, T - length)
    assert (out[0, :, :unseeing] == 0).all() and (lse[0, :, :unseeing] == -torch.inf).all()
    assert lse[0, :, unseeing:].isfinite().all()


def paged(k, v, lengths, size=16, spare=2):
    """The same caches in shuffled blocks, NaN in those of nobody, nonsense past each length."""
    B, _, S, _ = k.shape
    most = -(-S // size)
    order = torch.randperm(B * most + spare, device=DEVICE)
    table = order[: B * most].reshape(B, most).to(torch.int32)
    pools = []
    for cache in (k, v):
        pool = torch.full(
            (len(order), size, *cache.shape[1::2]), torch.nan, device=DEVICE, dtype=cache.dtype
        )
        for b in range(B):
            for n, page in enumerate(table[b].tolist()):
                rows = cache[b, :, n * size : (n + 1) * size].transpose(0, 1)
                pool[page, : rows.shape[0]] = rows
        pools.append(pool)
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-length // size) :] = 10**6 * (-1) ** b
    return *pools, table


DIMS = {"1": (1, 1), "3-17": (3, 17), "40": (40, 40), "80-24": (80, 24), "128-64": (128, 64)}
DIMS |= {"257-512": (257, 512)}
HEADS = {"equal": (2, 2), "grouped": (6, 2), "one": (8, 1), "beyond_a_tile": (17, 1)}
FACTORS = {
    "dims": tuple(DIMS),
    "heads": tuple(HEADS),
    "dtype": {dtype_name(dtype): dtype for dtype in DTYPES},
    "queries": ("1", "3"),
    "lengths": {"short": (40, 7, 0), "whole": (40, 40, 40), "ends": (16, 17, 1)},
    "pages": ("rows", "1", "16"),
    "window": {"any": -1, "20": 20, "0": 0},
    "softcap": ("none", "capped"),
    "slopes": {"none": 0, "of_heads": 1, "of_batch": 3},
    "sinks": ("none", "sinks"),
    "scale": {"positive": 0.3, "negative": -0.4},
    "layout": ("dense", "heads_inside"),
}
ROWS = pairwise({name: tuple(choices) for name, choices in FACTORS.items()})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_pairs_of_features(row):
    (D, Dv), (H, Hkv) = DIMS[row["dims"]], HEADS[row["heads"]]
    dtype, slopes = FACTORS["dtype"][row["dtype"]], FACTORS["slopes"][row["slopes"]]
    lengths, T = FACTORS["lengths"][row["lengths"]], int(row["queries"])
    q, k, v, counted = draw(lengths, H=H, Hkv=Hkv, T=T, S=40, D=D, Dv=Dv, dtype=dtype)
    if row["layout"] == "heads_inside":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    table = None
    if row["pages"] != "rows":
        k, v, table = paged(k, v, counted, int(row["pages"]))
    check(
        *(q, k, v, counted, table),
        left=FACTORS["window"][row["window"]],
        softcap=1.5 if row["softcap"] == "capped" else 0.0,
        slopes=randn(slopes, H).abs() / 8 if slopes else None,
        sinks=randn(H, dtype=dtype) if row["sinks"] == "sinks" else None,
        scale=FACTORS["scale"][row["scale"]],
        judge=assert_fair,
    )


@by_dtype
@pytest.mark.parametrize("T", [1, 3])
def test_pages_equal_rows(T, dtype, poison):
    q, k, v, lengths = draw([96, 0, 49, 16], H=4, Hkv=2, T=T, dtype=dtype)
    *pools, table = paged(k, v, lengths)
    rows = decode_attention(q, k, v, lengths, return_lse=True)
    pages = decode_attention(q, *pools, lengths, block_table=table, return_lse=True)
    for a, b in zip(pages, rows, strict=True):
        assert_same("of pages", a, b)
    check(q, *pools, lengths, table, left=21)


@pytest.mark.parametrize("page", [7, -1, 2**30])
def test_a_block_that_does_not_exist_spoils_its_sequence_alone(page):
    q, k, v, lengths = draw([40, 40], S=48)
    *pools, table = paged(k.nan_to_num(0), v.nan_to_num(0), lengths, spare=1)
    # Behind the pools is memory that can be read, and must not be.
    pools = [torch.cat([pool, torch.ones_like(pool)])[: len(pool)] for pool in pools]
    expected = decode_attention(q, *pools, lengths, block_table=table)
    table[0, 1] = page
    out = decode_attention(q, *pools, lengths, block_table=table)
    assert out[0].isnan().all() and torch.equal(out[1], expected[1])


def test_a_row_of_a_larger_cache_is_a_block():
    q, k, v, lengths = draw([96, 0, 49], T=2)
    expected = decode_attention(q, k, v, lengths)
    rows = counts(3, 0, 2)
    pools = [torch.full((5, 96, 2, 16), torch.nan, device=DEVICE) for _ in range(2)]
    for pool, cache in zip(pools, (k, v), strict=True):
        pool[rows.long()] = cache.transpose(1, 2)
    out = decode_attention(q, *pools, lengths, block_table=rows[:, None])
    assert_same("of rows by index", out, expected)


def test_padding_on_the_left_is_left_out_by_blocks_of_one_position():
    q, k, v, lengths = draw([61, 0, 49], T=2)
    options = {"alibi_slopes": randn(2).abs(), "window": (40, 0), "return_lse": True}
    expected = decode_attention(q, k, v, lengths, **options)
    padding = counts(35, 96, 20)
    pools = [torch.full((3, 96, 2, 16), torch.nan, device=DEVICE) for _ in range(2)]
    for pool, cache in zip(pools, (k, v), strict=True):
        for row, keys, p, n in zip(pool, cache, padding.tolist(), lengths.tolist(), strict=True):
            row[p : p + n] = keys[:, :n].transpose(0, 1)
    places = torch.arange(96, device=DEVICE) + 96 * torch.arange(3, device=DEVICE)[:, None]
    pools = [pool.view(3 * 96, 1, 2, 16) for pool in pools]
    table = (padding[:, None] + places).int()
    actual = decode_attention(q, *pools, lengths, block_table=table, **options)
    for a, b in zip(actual, expected, strict=True):
        assert_same("of padded rows", a, b)


@pytest.mark.parametrize("sinks", [False, True])
def test_queries_as_heads_see_all_keys(sinks):
    q, k, v, lengths = draw([96, 49], H=4, Hkv=2, T=3)
    given = {"sinks": randn(4) if sinks else None}
    seen = (torch.arange(96, device=DEVICE) < lengths[:, None])[:, None, None]
    expected = attention(q, k.nan_to_num(0), v.nan_to_num(0), bias=seen, **given)
    if sinks:
        given["sinks"] = given["sinks"].repeat_interleave(3)
    out = decode_attention(q.reshape(2, 12, 1, 16), k, v, lengths, **given).view(2, 4, 3, 16)
    torch.testing.assert_close(out, expected)


def test_equals_attention_of_the_last_queries():
    q, k, v, _ = draw([96], H=4, Hkv=2, T=5)
    options = {"window": (30, 0), "softcap": 3.0, "sinks": randn(4), "alibi_slopes": randn(4).abs()}
    expected = attention(q, k, v, causal="bottom_right", return_lse=True, **options)
    actual = decode_attention(q, k, v, counts(96), return_lse=True, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("term", ["sinks", "softcap"])
def test_full_rows_have_sinks_and_softcap_where_no_kernel_runs(term):
    q, k, v, lengths = draw([5, 5], S=5)
    given = {term: randn(2) if term == "sinks" else 1.0}
    with trilith.use_implementation("trilith::decode_attention", "reference"):
        out = decode_attention(q, k, v, lengths, **given)
    torch.testing.assert_close(out, attention(q, k, v, **given))


def test_the_splits_are_of_shapes_alone():
    grids = []

    def observe(kernel, grid, args, options):
        grids.append((kernel.__name__, grid))

    observers.append(observe)
    try:
        for lengths in ([96, 96], [1, 0], [5, 90]):
            decode_attention(*draw(lengths))
    finally:
        observers.remove(observe)
    assert len(set(grids)) == 2 and len(grids) == 6
    assert next(grid for name, grid in grids if "decode" in name)[1] > 1


def test_a_length_beyond_the_room_is_all_of_it():
    q, k, v, _ = draw([96, 96])
    expected = decode_attention(q, k, v, counts(96, 96))
    assert torch.equal(decode_attention(q, k, v, counts(200, 97)), expected)
    assert (decode_attention(q, k, v, counts(-3, 96))[0] == 0).all()


def test_strided_arguments():
    q, k, v, lengths = draw([96, 40], T=2)
    table = {"alibi_slopes": randn(2, 2).abs(), "sinks": randn(2)}
    expected = decode_attention(q, k, v, lengths, **table)
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    spread = {n: torch.stack([t, t], -1)[..., 0] for n, t in table.items()}
    lengths = torch.stack([lengths, lengths], 1).long()[:, 0]
    assert not lengths.is_contiguous()
    assert_same("moved", decode_attention(*moved, lengths, **spread), expected)


@pytest.mark.parametrize("wanted", range(3), ids=["q", "k", "v"])
def test_a_gradient_is_refused_with_advice(wanted):
    given = draw([9], S=9)
    given[wanted].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"no gradient; call it under torch.no_grad"):
        decode_attention(*given)
    with torch.no_grad():
        decode_attention(*given)


Q, K, N = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, dtype=torch.int32)
ERRORS = {
    "lengths": (ValueError, r"cache_lengths must have shape \(2,\)", (Q, K, K, N[:1]), {}),
    "listed_lengths": (TypeError, "cache_lengths must be a tensor of int32 or int64, got list")
    + ((Q, K, K, [5, 5]), {}),
    "no_lengths": (TypeError, "cache_lengths must be a tensor of int32 or int64, got NoneType")
    + ((Q, K, K, None), {}),
    "no_tensor": (TypeError, "k_cache must be a tensor, got list", (Q, [1], K, N), {}),
    "no_blocks": (ValueError, "k_cache must have at least one block, got 0")
    + ((Q, *2 * (torch.zeros(0, 5, 2, 8),), N), {"block_table": torch.zeros(2, 3).int()}),
    "softcap_inf": (ValueError, "softcap must be positive", (Q, K, K, N), {"softcap": torch.inf}),
    "window_alone": (ValueError, "window must be .* got 4", (Q, K, K, N), {"window": 4}),
    "float_lengths": (
        TypeError,
        "cache_lengths must be a tensor of int32 or int64",
        (Q, K, K, N.float()),
        {},
    ),
    "head_dim": (ValueError, "k_cache must have shape", (Q, K[..., :4], K, N), {}),
    "values": (ValueError, "v_cache must have shape", (Q, K, K[:, :, :4], N), {}),
    "heads": (ValueError, "multiple of the keys' 2, got 3", (Q[:, :3], K, K, N), {}),
    "dtype": (TypeError, "must have one dtype", (Q, K.half(), K, N), {}),
    "table": (ValueError, "block_table must be", (Q, K, K, N), {"block_table": N}),
    "softcap": (ValueError, "softcap must be positive", (Q, K, K, N), {"softcap": -1.0}),
    "window": (ValueError, "window must be", (Q, K, K, N), {"window": (-1, 0)}),
    "sinks": (ValueError, r"sinks must have shape \(4,\)", (Q, K, K, N), {"sinks": Q[0, :2, 0, 0]}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_and_value(name):
    error, match, args, options = ERRORS[name]
    with pytest.raises(error, match=f"decode_attention: .*{match}"):
        decode_attention(*args, **options)


@pytest.mark.parametrize("lengths", [(40, 40), (40, 7), (0, 0), (2, 0), (200, 96)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (9, 0), "softcap": 2.0}], ids=["plain", "more"])
def test_on_a_host_the_room_beyond_the_longest_sequence_is_not_read(lengths, options):
    q, k, v, counted = draw(lengths, H=4, Hkv=2, T=3, dtype=torch.float64)
    full = [t.clone().nan_to_num(0) for t in (k, v)]
    rest = (counted, None, None, None, 0.25, options.get("softcap", 0.0), 9 if options else -1)
    expected, expected_lse = OP.spec.reference(q, *(t.transpose(1, 2) for t in full), *rest)
    out = decode_attention(q, k, v, counted, scale=0.25, **options)
    _, lse = decode_attention(q, k, v, counted, scale=0.25, return_lse=True, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    *pools, table = paged(k, v, counted.clamp(max=96))
    pages = decode_attention(q, *pools, counted, block_table=table, scale=0.25, **options)
    torch.testing.assert_close(pages, expected)


def test_compiles_without_a_break_for_all_lengths():
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    for lengths in ((40, 40), (7, 0)):
        args = draw(lengths, dtype=torch.float64, S=48)
        args = [t.nan_to_num(0) if t.is_floating_point() else t for t in args]
        torch.testing.assert_close(compiled(*args), decode_attention(*args))
