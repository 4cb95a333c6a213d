"""Rotary: every pairing, partial width and layout against float64, and the formula itself."""

import importlib

import pytest
import torch

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE, DTYPES, dtype_name
from trilith.kernels.rotary import rotary
from trilith.plugins import registry

OP = registry.op("trilith::rotary")
# B, H, T, D, R: tile boundaries in T, heads that don't fill a program, partial widths.
SHAPES = (
    (1, 1, 1, 2, 2),
    (2, 3, 5, 8, 8),
    (1, 2, 17, 80, 80),
    (1, 5, 33, 64, 32),
    (2, 17, 3, 20, 6),
    (1, 1, 1025, 2, 2),
    (1, 2, 31, 66, 64),
    (40, 3, 2, 4, 4),
)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def tables(*shape, dtype=torch.float32):
    angle = 7 * torch.rand(shape, device=DEVICE)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check(x, cos, sin, interleaved, dy=None):
    """Kernel against float64, by the one-rounding rule, and exact copies past R."""
    dy = torch.randn_like(x) if dy is None else dy
    leaf, leaf64 = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y, y64 = OP(leaf, cos, sin, interleaved), OP(leaf64, cos, sin, interleaved)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    (dx64,) = torch.autograd.grad(y64, leaf64, dy.double())
    width = 2 * cos.shape[-1]
    for result, result64, source in ((y, y64, x), (dx, dx64, dy)):
        assert result.is_contiguous() and result.dtype == x.dtype
        scale = source.double().nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True)
        assert_one_rounding(result.detach(), result64.detach(), scale=2 * scale)
        assert torch.equal(result[..., width:], source[..., width:])
    return y.detach(), dx


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("per_batch", [False, True], ids=["shared", "per-batch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_matches_float64(dtype, shape, per_batch, interleaved, poison):
    b, h, t, d, r = shape
    lead = (b, t) if per_batch else (t,)
    check(draw(b, h, t, d, dtype=dtype), *tables(*lead, r // 2), interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_a_pair_turns_by_its_angle_and_keeps_its_length(interleaved):
    x = draw(1, 2, 3, 8)
    angle = torch.rand(3, 3, device=DEVICE)
    y = rotary(x, angle.cos(), angle.sin(), interleaved=interleaved)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 3) for i in range(3)]
    for i, (first, second) in enumerate(pairs):
        turned = torch.complex(x[..., first], x[..., second]) * torch.exp(1j * angle[:, i])
        torch.testing.assert_close(torch.complex(y[..., first], y[..., second]), turned)
    torch.testing.assert_close(y[..., 6:], x[..., 6:], rtol=0, atol=0)


def test_scores_depend_on_the_distance_alone():
    position = torch.arange(12, device=DEVICE)
    angle = torch.outer(position, 100.0 ** -(torch.arange(4, device=DEVICE) / 4))
    q, k = (draw(1, 1, 1, 8).expand(1, 1, 12, 8) for _ in range(2))
    q, k = (rotary(x, angle.cos(), angle.sin()) for x in (q, k))
    scores = (q @ k.mT)[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_transpose_for_tables_that_are_no_rotation():
    x, cos, sin = draw(1, 2, 5, 6), draw(5, 3), draw(5, 3)
    dy = torch.randn_like(x)
    y, dx = check(x, cos, sin, False, dy)
    torch.testing.assert_close((y * dy).sum(), (x * dx).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_views_of_a_packed_projection(interleaved, dtype):
    packed = draw(2, 9, 3, 5, 12, dtype=dtype)
    cos, sin = tables(9, 4)
    for i in range(3):
        x = packed[:, :, i].transpose(1, 2)
        expected = rotary(x.contiguous(), cos, sin, interleaved=interleaved)
        assert torch.equal(rotary(x, cos, sin, interleaved=interleaved), expected)
        check(x, cos, sin, interleaved, packed[:, :, 2 - i].transpose(1, 2))
    check(packed[:, :, 0].permute(0, 3, 1, 2), *tables(9, 2), interleaved)


def test_strided_and_expanded_tables():
    x, (cos, sin) = draw(2, 3, 4, 8), tables(4, 8)
    expected = rotary(x, cos[:, ::2].contiguous(), sin[:, ::2].contiguous())
    assert torch.equal(rotary(x, cos[:, ::2], sin[:, ::2]), expected)
    transposed = cos[:, ::2].t().contiguous().t()
    assert torch.equal(rotary(x, transposed, sin[:, ::2]), expected)
    batched = [t[:, ::2].expand(2, 4, 4) for t in (cos, sin)]
    assert torch.equal(rotary(x, *batched), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("table_dtype", DTYPES, ids=dtype_name)
def test_tables_of_another_dtype(dtype, table_dtype):
    check(draw(1, 2, 5, 8, dtype=dtype), *tables(5, 4, dtype=table_dtype), False)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_extreme_values(interleaved):
    cos, sin = tables(5, 4)
    check(draw(1, 2, 5, 8) + 1e4, cos, sin, interleaved)
    check(1e-4 * draw(1, 2, 5, 8), cos, sin, interleaved)
    check(6e4 * draw(1, 2, 5, 8).sign().half(), cos, sin, interleaved)
    x = draw(1, 2, 5, 12)
    x[0, 0, 0, 1], x[0, 1, 2, 4], x[0, 1, 3, 10] = float("nan"), float("inf"), float("-inf")
    check(x, cos, sin, interleaved)


def test_the_double_gradient():
    x, (cos, sin) = draw(1, 2, 3, 4).requires_grad_(), tables(3, 2)
    dy = draw(1, 2, 3, 4).requires_grad_()
    (dx,) = torch.autograd.grad(rotary(x, cos, sin), x, dy, create_graph=True)
    v = torch.randn_like(dx)
    (back,) = torch.autograd.grad(dx, dy, v)
    torch.testing.assert_close(back, rotary(v, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_heads_that_do_not_fill_a_program_stay_inside(interleaved, monkeypatch):
    buffer = torch.full((40 * 3 * 2 * 6 + 1024,), float("nan"), device=DEVICE)
    module = importlib.import_module("trilith.kernels.rotary")
    monkeypatch.setattr(module, "_rotary_out", lambda x, *_: buffer[: x.numel()].view(x.shape))
    y = rotary(draw(40, 3, 2, 6), *tables(2, 2), interleaved=interleaved)
    assert y.isfinite().all() and buffer[y.numel() :].isnan().all()


def test_no_width_at_all_copies():
    x = draw(1, 2, 3, 4)
    assert torch.equal(rotary(x, *tables(3, 0)), x)


X, COS = torch.randn(2, 3, 5, 8), torch.ones(5, 4)
ERRORS = {
    "positions": (ValueError, "T = 5 positions, got 7", (X, torch.ones(7, 4), torch.ones(7, 4))),
    "wide": (ValueError, "at most 8 / 2 columns.*got 5", (X, torch.ones(5, 5), torch.ones(5, 5))),
    "sin": (ValueError, r"sin must have cos's shape \(5, 4\), got \(5, 3\)", (X, COS, COS[:, :3])),
    "batch": (ValueError, "batch size 2", (X, COS.expand(3, 5, 4), COS.expand(3, 5, 4))),
    "table": (ValueError, r"\(T, R/2\) or", (X, COS[0], COS[0])),
    "x": (ValueError, r"\(B, H, T, D\)", (X[0], COS, COS)),
    "integers": (TypeError, "cos must be a floating-point", (X, COS.long(), COS)),
    "grad": (ValueError, "detach", (X, COS.clone().requires_grad_(), COS)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_and_value(name):
    error, match, args = ERRORS[name]
    with pytest.raises(error, match=match):
        rotary(*args)
