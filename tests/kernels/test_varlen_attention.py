"""Packed sequences against each sequence by itself, and against the reference in float64."""

import math
import re

import pytest
import torch

from tests.kernels.eager_attention import sequences as slices
from tests.kernels.test_attention import run
from tests.support.devices import DEVICE, dtype_name
from trilith.kernels._runtime.launch import observers
from trilith.kernels.attention import attention, varlen_attention
from trilith.kernels.attention.varlen import VARLEN_ATTENTION as OP
from trilith.plugins.conformance.compare import assert_same

QUERIES, KEYS = (5, 0, 34, 1, 3), (17, 4, 33, 1, 0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def packed(D=16, Dv=None, H=2, Hkv=2, dtype=torch.float32, lengths=(QUERIES, KEYS)):
    total_q, total_k = map(sum, lengths)
    shapes = ((total_q, H, D), (total_k, Hkv, D), (total_k, Hkv, Dv or D))
    return [randn(*shape, dtype=dtype) for shape in shapes]


def call(q, k, v, lengths=(QUERIES, KEYS), **given):
    """The op's arguments, in order."""
    terms = dict.fromkeys(("bias", "slopes", "sinks", "seed"))
    scalars = {"scale": q.shape[-1] ** -0.5, "softcap": 0.0, "p": 0.0}
    band = {"alignment": "bottom_right", "left": -1, "right": -1}
    return [q, k, v, *map(starts, lengths), *(terms | scalars | band | given).values()]


def sequences(lengths=(QUERIES, KEYS)):
    return slices(*(starts(n).tolist() for n in lengths))


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_each_sequence_gives_what_it_gives_alone(causal):
    q, k, v = packed()
    cu_q, cu_k = (starts(n, torch.int64) for n in (QUERIES, KEYS))
    out, lse = varlen_attention(q, k, v, cu_q, cu_k, causal=causal, return_lse=True)
    for rows, cols in sequences():
        alone = [t[s].transpose(0, 1)[None] for t, s in ((q, rows), (k, cols), (v, cols))]
        own, own_lse = attention(*alone, causal=causal, return_lse=True)
        assert_same("out", out[rows].transpose(0, 1), own[0])
        assert_same("lse", lse[:, rows], own_lse[0])


def test_neighbours_are_neither_read_nor_written():
    """NaN in every other sequence, and around all of them, reaches none of the rest."""
    lengths = ((3, 20, 35, 2), (4, 33, 18, 5))
    q, k, v = packed(lengths=lengths)
    clean = run(
        OP, call(q, k, v, lengths, right=0), torch.ones_like(q), torch.ones_like(q[..., 0].T)
    )
    marked = list(sequences(lengths))[1::2]
    for rows, cols in marked:
        q[rows], k[cols], v[cols] = math.nan, math.nan, math.nan
    frames = [
        torch.full((t.shape[0] + 40, *t.shape[1:]), math.nan, device=DEVICE) for t in (q, k, v)
    ]
    for frame, tensor in zip(frames, (q, k, v), strict=True):
        frame[20:-20] = tensor
    views = [f[20:-20] for f in frames]
    dirty = run(
        OP, call(*views, lengths, right=0), torch.ones_like(q), torch.ones_like(q[..., 0].T)
    )
    for rows, cols in list(sequences(lengths))[::2]:
        assert torch.equal(dirty[1][:, rows], clean[1][:, rows])
        for i, at in ((0, rows), (2, rows), (3, cols), (4, cols)):
            assert torch.equal(dirty[i][at], clean[i][at])
    for rows, cols in marked:
        assert all(dirty[i][at].isnan().all() for i, at in ((0, rows), (2, rows), (3, cols)))


def test_gradient_of_slopes_is_summed_over_long_sequences():
    lengths = ((3, 1030, 1100), (5, 4, 2))
    q, k, v = packed(lengths=lengths)
    slopes = randn(3, 2).abs().requires_grad_()
    cu = [starts(n) for n in lengths]
    dout = torch.randn_like(q)
    out = varlen_attention(q, k, v, *cu, alibi_slopes=slopes / 1e3)
    (packed_sums,) = torch.autograd.grad(out, slopes, dout)
    found = []
    for n, (rows, cols) in enumerate(sequences(lengths)):
        alone = [t[s].transpose(0, 1)[None].double() for t, s in ((q, rows), (k, cols), (v, cols))]
        own = attention(*alone, alibi_slopes=slopes[n].double() / 1e3)
        found.append(torch.autograd.grad(own[0], slopes, dout[rows].transpose(0, 1).double())[0][n])
    torch.testing.assert_close(packed_sums, torch.stack(found), rtol=1e-4, atol=1e-5)


def test_features_need_not_lie_together():
    q, k, v = packed()
    spread = [
        torch.stack([t, t], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
        for t in (q, k, v)
    ]
    wide = [torch.stack([t, t], -1)[..., 0] for t in (q, k, v)]
    cu = starts(QUERIES), starts(KEYS)
    for views in (spread, wide):
        assert_same("views", varlen_attention(*views, *cu), varlen_attention(q, k, v, *cu))


def test_the_grid_has_a_tile_more_for_each_sequence():
    grids = []

    def observe(kernel, grid, args, options):
        grids.append((grid, options))

    observers.append(observe)
    try:
        varlen_attention(*packed(), starts(QUERIES), starts(KEYS))
    finally:
        observers.remove(observe)
    ((grid, options),) = grids
    assert grid == (2 * (sum(QUERIES) // options["BLOCK_M"] + len(QUERIES) + 1), 1)


@pytest.mark.parametrize("longest", [{}, {"max_seqlen_q": 11, "max_seqlen_k": 9}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 9), (3, 2, 11, 1), (1, 2, 1, 1)])
def test_a_bias_of_one_row_or_column_is_that_of_all(shape, longest):
    cu_q = torch.tensor([0, 11, 12, 20], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 5, 14, 14], dtype=torch.int32, device=DEVICE)
    q, k, v = randn(20, 2, 16), randn(14, 2, 16), randn(14, 2, 16)
    short = randn(*shape).requires_grad_()
    whole = short.expand(-1, -1, 11, 9)
    weight = randn(20, 2, 16)
    results = []
    for bias, given in ((short, longest), (whole, {})):
        out = varlen_attention(q, k, v, cu_q, cu_k, bias=bias, **given)
        results.append((out, *torch.autograd.grad((out * weight).sum(), short)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("boolean", [False, True])
def test_a_bias_that_is_too_short_reads_as_zero(boolean, dtype):
    lengths = ((20, 3), (20, 3))
    q, k, v = packed(lengths=lengths, dtype=dtype)
    cu = starts(lengths[0])
    bias = randn(1, 1, 18, 19, dtype=dtype)
    bias = bias > 0 if boolean else bias
    whole = torch.nn.functional.pad(bias, (0, 1, 0, 2))
    assert torch.equal(
        varlen_attention(q, k, v, cu, cu, bias=bias), varlen_attention(q, k, v, cu, cu, bias=whole)
    )


def test_dropout_draws_anew_in_each_sequence():
    lengths = ((1,) * 64, (16,) * 64)
    q, k, v = torch.zeros(64, 1, 16), torch.zeros(64 * 16, 1, 16), torch.ones(64 * 16, 1, 1)
    v = torch.eye(16).repeat(64, 1)[:, None]
    cu = [starts(n) for n in lengths]
    kept = varlen_attention(*(t.to(DEVICE) for t in (q, k, v)), *cu, dropout_p=0.5)[:, 0] != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert len({tuple(row) for row in kept.tolist()}) > 60


def test_compiles_without_a_break():
    q, k, v = (t.requires_grad_() for t in packed())
    cu = starts(QUERIES), starts(KEYS)
    compiled = torch.compile(
        lambda *t: varlen_attention(*t, causal="bottom_right"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(
        compiled(q, k, v, *cu), varlen_attention(q, k, v, *cu, causal="bottom_right")
    )


CU = starts((3, 4))
BAD_CALLS = {
    "four_dims": (lambda q, k, v: varlen_attention(q[None], k, v, CU, CU), ValueError, "be 3-D"),
    "causal": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU.clone(), causal=True),
        ValueError,
        '"top_left" or "bottom_right", got True',
    ),
    "starts": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU[:2]),
        ValueError,
        "cu_seqlens_k must be (B + 1,), as long as cu_seqlens_q, got (2,)",
    ),
    "starts_dtype": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU.float()),
        TypeError,
        "cu_seqlens_k must be a tensor of int32 or int64, got torch.float32",
    ),
    "starts_listed": (
        lambda q, k, v: varlen_attention(q, k, v, [0, 3, 7], CU),
        TypeError,
        "cu_seqlens_q must be a tensor of int32 or int64, got list",
    ),
    "starts_device": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU.to("meta")),
        ValueError,
        "cu_seqlens_k must be on the input's device",
    ),
    "longest": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU, max_seqlen_q=-1),
        ValueError,
        "max_seqlen_q must not be negative, got -1",
    ),
    "window": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU, window=(0, -1)),
        ValueError,
        "window must be (left, right)",
    ),
    "bias": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU, bias=randn(7, 7)),
        ValueError,
        "bias must be (2 or 1, 2 or 1, longest queries, longest keys), got (7, 7)",
    ),
    "slopes": (
        lambda q, k, v: varlen_attention(q, k, v, CU, CU, alibi_slopes=randn(3)),
        ValueError,
        "alibi_slopes must be (2,) or (2, 2), got (3,)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_arguments_are_named(case):
    function, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        function(*packed(lengths=((3, 4), (3, 4))))


@pytest.mark.skipif(DEVICE != "cpu", reason="would wait for the device")
@pytest.mark.parametrize("values", [(1, 3, 7), (0, 5, 3), (0, -1, 7), (0, 3, 8)], ids=str)
@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_starts_that_do_not_rise_in_the_rows_are_refused_on_a_host(which, values):
    given = {"cu_seqlens_q": CU, "cu_seqlens_k": CU, which: torch.tensor(values)}
    message = f"{which} must rise from 0 to at most the 7 rows, got {list(values)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        varlen_attention(*packed(lengths=((3, 4), (3, 4))), **given)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("past", [4, 32, 70])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_past_the_last_sequence_are_zero(past, sinks):
    q, k, v = (t.requires_grad_() for t in packed(lengths=((8, past), (10, past))))
    cu = [starts(n) for n in ((3, 5), (4, 6))]
    terms = {"sinks": randn(2).requires_grad_()} if sinks else {}
    out, lse = varlen_attention(q, k, v, *cu, return_lse=True, **terms)
    dq, dk, dv, *rest = torch.autograd.grad(out.sum(), (q, k, v, *terms.values()))
    assert (out[8:] == 0).all() and (lse[:, 8:] == -torch.inf).all()
    assert (dq[8:] == 0).all() and (dk[10:] == 0).all() and (dv[10:] == 0).all()
    assert all(t.isfinite().all() for t in (out, lse[:, :8], dq, dk, dv, *rest))
