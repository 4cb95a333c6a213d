"""Merged parts against float64, against attention over all keys, and over two processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels import attention, merge_attention
from trilith.kernels.attention.merge import MERGE_ATTENTION as OP

ROOT = Path(__file__).parents[2]
# P, *, Dv: one part, rows around a program's, value dims around a power of two.
SHAPES = ((1, 1, 1), (2, 3, 17, 33), (3, 2, 2, 31, 16), (5, 65, 8), (2, 1, 3, 5, 257), (9, 2, 64))


def draw(*shape, dtype=torch.float32, spread=3.0):
    outs = torch.randn(shape, device=DEVICE).to(dtype)
    return outs, spread * torch.randn(shape[:-1], device=DEVICE)


def differentiated(function, outs, lses, dout, dlse):
    leaves = [outs.detach().requires_grad_(), lses.detach().requires_grad_()]
    out, lse = function(*leaves)
    found = torch.autograd.grad([out, lse], leaves, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return [t.detach() for t in (out, lse, *found)]


def check(outs, lses):
    dout, dlse = torch.randn_like(outs[0]), torch.randn_like(lses[0])
    actual = differentiated(merge_attention, outs, lses, dout, dlse)
    wide = [t.double() for t in (outs, lses, dout, dlse)]
    expected = differentiated(OP.spec.reference, *wide)
    largest = outs.double().nan_to_num(0, 0, 0).abs().amax((0, -1))
    reach = (largest * dout.double().abs().sum(-1) + dlse.abs()).expand_as(lses)
    level = lses.double().nan_to_num(0, 0, 0).abs().amax(0)
    scales = (
        largest[..., None] * (1 + level[..., None]),
        1 + level,
        (dout.double().abs() * (1 + level[..., None])).expand_as(outs),
        reach * (1 + level),
    )
    for a, e, scale in zip(actual, expected, scales, strict=True):
        assert_one_rounding(a, e, scale=scale, terms=len(outs))
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_parts_match_float64(dtype, shape, poison):
    check(*draw(*shape, dtype=dtype))


def test_an_infinite_gradient_does_not_reach_a_part_that_saw_nothing():
    outs, lses = draw(3, 5, 16)
    lses[1] = -torch.inf
    dout = torch.full_like(outs[0], torch.inf)
    _, _, douts, dlses = differentiated(merge_attention, outs, lses, dout, torch.ones_like(lses[0]))
    assert (douts[1] == 0).all() and (dlses[1] == 0).all()
    assert douts[[0, 2]].isinf().all()


@pytest.mark.parametrize("spread", [0.0, 1e-4, 60.0, 1e4])
def test_lses_of_any_size(spread):
    check(*draw(3, 7, 16, spread=spread))
    outs, lses = draw(3, 7, 16)
    check(outs, lses + spread)
    check(outs, lses - spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_part_that_saw_no_key_is_not_read(dtype):
    outs, lses = draw(3, 2, 9, 16, dtype=dtype)
    lses[1] = -torch.inf
    outs[1] = torch.nan
    out, lse, douts, dlses = check(outs, lses)
    assert (douts[1] == 0).all() and (dlses[1] == 0).all()
    kept = merge_attention(outs[[0, 2]], lses[[0, 2]])
    assert torch.equal(out, kept[0]) and torch.equal(lse, kept[1])


def test_a_row_that_no_part_saw_is_zero():
    outs, lses = draw(2, 5, 16)
    lses[:, 3] = -torch.inf
    out, lse, douts, dlses = check(outs, lses)
    assert (out[3] == 0).all() and lse[3] == -torch.inf
    assert (douts[:, 3] == 0).all() and (dlses[:, 3] == 0).all()


def test_nan_and_inf_spoil_their_row_alone():
    outs, lses = draw(2, 5, 16)
    outs[0, 1, 4], lses[1, 3] = torch.inf, torch.nan
    out, lse = merge_attention(outs, lses)
    assert out[1, 4] == torch.inf and out[3].isnan().all() and lse[3].isnan()
    out[1, 4] = 0
    assert out[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
@pytest.mark.parametrize("causal", [False, "bottom_right"])
def test_chunks_of_keys_equal_all_of_them(chunks, causal):
    """Queries are the last 9 of 40 positions; a chunk of keys ends where the mask says."""
    q, k, v = (torch.randn(2, h, n, 16, device=DEVICE) for h, n in ((4, 9), (2, 40), (2, 40)))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    position = torch.arange(40, device=DEVICE)
    visible = position <= position[-9:, None] if causal else torch.ones(9, 40, device=DEVICE) > 0
    parts = [
        attention(q, *kv, bias=mask, return_lse=True)
        for *kv, mask in zip(
            k.chunk(chunks, 2), v.chunk(chunks, 2), visible.chunk(chunks, 1), strict=True
        )
    ]
    merged = merge_attention(*zip(*parts, strict=True))
    whole = attention(q, k, v, causal=causal, return_lse=True)
    upstream = [torch.randn_like(t) for t in whole]
    for ours, theirs in zip(
        [*merged, *torch.autograd.grad(merged, leaves, upstream)],
        [*whole, *torch.autograd.grad(whole, leaves, upstream)],
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_views_and_expanded_tensors():
    outs, lses = draw(2, 3, 5, 16)
    expected = merge_attention(outs, lses)
    moved = outs.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for other in (
        merge_attention(list(outs), list(lses)),
        merge_attention(moved, lses.mT.contiguous().mT),
        merge_attention(outs[..., None].expand(*outs.shape, 2)[..., 0], lses),
    ):
        assert all(torch.equal(a, e) for a, e in zip(other, expected, strict=True))


def test_two_ranks_equal_one(tmp_path):
    """Ring attention: each of two processes has half of the queries and half of the keys."""
    torch.manual_seed(3)
    q, k, v, dout = torch.randn(4, 2, 2, 22, 16).unbind()
    dlse = torch.randn(2, 2, 22)
    torch.save([q, k, v, dout, dlse], tmp_path / "inputs.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.ring", str(rank), "2", str(tmp_path)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert not any(process.returncode for process in ranks), "\n".join(errors)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    leaves = [t.to(DEVICE).requires_grad_() for t in (q, k, v)]
    whole = attention(*leaves, causal=True, return_lse=True)
    upstream = [dout.to(DEVICE), dlse.to(DEVICE)]
    expected = [*whole, *torch.autograd.grad(whole, leaves, upstream)]
    for i, theirs in enumerate(expected):
        ours = torch.cat([share[i] for share in shares], dim=2)
        torch.testing.assert_close(ours, theirs.detach().cpu(), rtol=1e-5, atol=1e-5)


OUTS, LSES = torch.zeros(2, 3, 4), torch.zeros(2, 3)
ERRORS = {
    "none": (ValueError, "outputs must have at least one part, got 0", ([], [])),
    "empty": (ValueError, "at least one part", (OUTS[:0], LSES[:0])),
    "lse_shape": (ValueError, r"lses must have shape \(2, 3\), got \(2, 4\)", (OUTS, OUTS[:, 0])),
    "shapes": (ValueError, "outputs must have one shape", ([OUTS[0], OUTS[0, :2]], LSES)),
    "dtypes": (TypeError, "outputs must have one dtype", ([OUTS[0], OUTS[0].half()], LSES)),
    "integers": (TypeError, "lses must be a floating-point", (OUTS, LSES.long())),
    "scalars": (ValueError, "last dimension Dv", (LSES[0], LSES[0, 0])),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_and_value(name):
    error, match, args = ERRORS[name]
    with pytest.raises(error, match=f"merge_attention: .*{match}"):
        merge_attention(*args)
