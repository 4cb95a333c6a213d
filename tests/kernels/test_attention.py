"""Attention against its reference in float64, beside eager PyTorch with the same roundings."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import trilith
from tests.kernels.eager_attention import eager
from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE, DTYPES, INTERPRETING, dtype_name
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import observers
from trilith.kernels._runtime.random import reference_keep_mask
from trilith.kernels.attention import attention, launchers, scaled_dot_product_attention
from trilith.kernels.attention.op import ATTENTION
from trilith.kernels.attention.tiles import band_range
from trilith.plugins.conformance.compare import assert_same

LENGTHS = (1, 2, 31, 33, 64, 65, 127)

TERMS = ("bias", "key_mask", "slopes", "sinks", "seed")

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def call(q, k, v, **given):
    """The op's arguments, in order."""
    scalars = {"scale": q.shape[-1] ** -0.5, "softcap": 0.0, "p": 0.0}
    band = {"alignment": "top_left", "left": -1, "right": -1}
    return [q, k, v, *(dict.fromkeys(TERMS) | scalars | band | given).values()]


def qkv(T, S, D=16, Dv=None, B=2, H=2, Hkv=None, dtype=torch.float32):
    Hkv, Dv = Hkv or H, Dv or D
    shapes = ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
    return [randn(*shape, dtype=dtype) for shape in shapes]


def differentiable(args):
    return [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def run(function, args, dout, dlse):
    """[out, lse, gradients...] of a function of the op's arguments."""
    chosen = differentiable(args)
    leaves = [a.detach().requires_grad_() if i in chosen else a for i, a in enumerate(args)]
    out, lse = function(*leaves)
    wanted = [leaves[i] for i in chosen]
    upstream = [dout.to(out.dtype), dlse.to(lse.dtype)]
    found = torch.autograd.grad([out, lse], wanted, upstream, allow_unused=True)
    return [out.detach(), lse.detach(), *found]


def check(args, pull=1.0):
    q, _, v = args[:3]
    dout = (pull * randn(*q.shape[:3], v.shape[3])).to(q.dtype)
    dlse = randn(*q.shape[:3])
    chosen = differentiable(args)
    double = [a.double() if i in chosen else a for i, a in enumerate(args)]
    actual = run(ATTENTION, args, dout, dlse)
    expected = run(ATTENTION.spec.reference, double, dout.double(), dlse.double())
    yardstick = eager(args, dout, dlse)
    for a, e, p in zip(actual, expected, yardstick, strict=True):
        assert_like_eager(a, e, p)


CAUSAL = (
    {},
    {"right": 0},
    {"alignment": "bottom_right", "right": 0},
    {"alignment": "bottom_right", "left": 17, "right": 3},
)


@pytest.mark.parametrize(("T", "S"), list(itertools.product(LENGTHS, LENGTHS)))
def test_lengths(T, S):
    band = CAUSAL[(LENGTHS.index(T) + LENGTHS.index(S)) % len(CAUSAL)]
    check(call(*qkv(T, S, B=1), **band))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_name)
def test_features_together(dtype):
    """Few and large; every pair of features is in test_attention_pairs."""
    slopes = randn(1, 2).abs() / 8
    given = {"bias": randn(1, 2, 65, 47, dtype=dtype), "sinks": randn(2, dtype=dtype)}
    given |= {"slopes": slopes.to(dtype), "softcap": 1.5, "left": 30, "right": 4}
    check(call(*qkv(65, 47, Dv=24, Hkv=1, dtype=dtype), **given))


# Beside those of test_attention_pairs.
HEAD_DIMS = ((40, 40), (64, 128), (96, 160), (64, 387), (512, 512))


@pytest.mark.parametrize(("D", "Dv"), HEAD_DIMS)
def test_head_dims(D, Dv):
    dtype = torch.float32 if D == 512 else torch.float16
    check(call(*qkv(33, 34, D, Dv, B=1, Hkv=1, dtype=dtype), right=0))


@pytest.mark.parametrize(("D", "Dv"), HEAD_DIMS[-2:] + ((300, 40),))
def test_wide_head_dims_with_a_bias(D, Dv):
    q, k, v = qkv(33, 34, D, Dv, B=1)
    seed = torch.tensor([12345], device=DEVICE)
    check(call(q, k, v, bias=randn(1, 2, 33, 34), p=0.3, seed=seed, left=20, right=0))


def test_tf32_is_float32s_by_choice():
    asked = []
    observers.append(lambda kernel, grid, args, options: asked.append(options.get("PRECISION")))
    try:
        q, k, v = qkv(35, 43)
        attention(q, k, v, precision="tf32")
        attention(q, k, v)
        attention(q.half(), k.half(), v.half(), precision="tf32")
    finally:
        observers.pop()
    assert asked == ["tf32", None, None]


@pytest.mark.skipif(not INTERPRETING, reason="looks at each product as it is interpreted")
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_one_precision_in_every_product(precision, monkeypatch):
    """Those of wide heads, of masked tiles and of a bias's gradient too."""
    from triton.runtime.interpreter import InterpreterBuilder

    products, dot = [], InterpreterBuilder.create_dot

    def observed(self, a, b, d, asked, *rest):
        products.append(str(asked).rpartition(".")[2].lower())
        return dot(self, a, b, d, asked, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", observed)
    q, k, v = qkv(3, 33, 130, B=1, H=1)
    leaves = [t.requires_grad_() for t in (q, k, v, randn(3, 33))]
    out = attention(*leaves[:3], bias=leaves[3], precision=precision)
    torch.autograd.grad(out.sum(), leaves)
    assert len(products) > 20 and set(products) == {precision}


@pytest.mark.parametrize("function", [attention, scaled_dot_product_attention])
@pytest.mark.parametrize("D", [1, 3, 17, 40])
def test_the_default_scale_is_of_the_head_dim(function, D):
    q, k, v = qkv(5, 7, D)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(function(q, k, v).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("Hkv", [1, 2, 6])
def test_grouped_heads_equal_repeated_ones(Hkv):
    q, k, v = qkv(7, 40, H=6, Hkv=Hkv)
    repeated = [t.repeat_interleave(6 // Hkv, 1) for t in (k, v)]
    torch.testing.assert_close(attention(q, k, v), attention(q, *repeated), rtol=0, atol=0)
    check(call(q, k, v))


REGIMES = {
    "mean_1e4": (lambda x: x + 1e4, 1e4),
    "std_1e-4": (lambda x: x * 1e-4, 1.0),
    "constant": (lambda x: torch.ones_like(x) * 3, 1.0),
    "confident": (lambda x: x * 6, 1.0),
    "largest_half": (lambda x: torch.sign(x) * 6e4, 6e4),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's tables say so, for head dims over 128")
@pytest.mark.parametrize("Dv", [16, 40])
def test_dk_and_dv_of_a_launch_each_are_those_of_one(Dv, monkeypatch):
    q, k, v = (t.requires_grad_() for t in qkv(35, 70, D=24, Dv=Dv, H=4, Hkv=2))
    launched = []

    def gradients():
        def observer(kernel, grid, args, options):
            launched.append(kernel.fn.__name__)

        out = attention(q, k, v, causal="bottom_right", window=(40, 0))
        observers.append(observer)
        try:
            return torch.autograd.grad(out, (k, v), torch.ones_like(out))
        finally:
            observers.remove(observer)

    together = gradients()
    assert launched.count("attention_bwd_dkdv_kernel") == 1
    monkeypatch.setattr(launchers, "has_parts", lambda q, head_dim: True)
    apart = gradients()
    assert launched.count("attention_bwd_dkdv_kernel") == 3
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


def regimes():
    for regime in REGIMES:
        for which in ("q", "k", "v", "all"):
            for dtype in (torch.float32, torch.float16):
                if dtype == torch.float32 or regime in ("std_1e-4", "largest_half"):
                    yield pytest.param(
                        regime, which, dtype, id=f"{regime}-{which}-{dtype_name(dtype)}"
                    )


@pytest.fixture
def sums_in_one_order(monkeypatch):
    """A product the other way round has the same bits, as on a GPU, which sums along the inner dim.

    numpy does not, and where scores are large, a key that has all the weight then no longer has
    exactly 1 in backward.
    """
    if DEVICE != "cpu":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, c, *options):
        total = c.data.copy()
        for i in range(a.data.shape[1]):
            column, row = a.data[:, i, None], b.data[None, i]
            total += column.astype(total.dtype) * row.astype(total.dtype)
        return TensorHandle(total, c.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.mark.usefixtures("sums_in_one_order")
@pytest.mark.parametrize(("regime", "which", "dtype"), list(regimes()))
def test_regimes(regime, which, dtype):
    """Scores stay in exp's range and score gradients in fp16's: the rest has any magnitude."""
    change, magnitude = REGIMES[regime]
    chosen = "qkv" if which == "all" else which
    tensors = dict(zip("qkv", qkv(34, 37, B=1), strict=True))
    tensors = {n: change(t) if n in chosen else t for n, t in tensors.items()}
    scale = 0.3 / magnitude ** sum(n in "qk" for n in chosen)
    args = call(*(t.to(dtype) for t in tensors.values()), right=0, scale=scale)
    check(args, pull=1 / magnitude if "v" in chosen else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("which", range(3), ids="qkv")
def test_non_finite_values_stay_where_they_belong(which, value):
    tensors = qkv(33, 33, B=1)
    tensors[which][0, 1, 20, 3] = value
    args = call(*tensors, right=0)
    out, lse = ATTENTION(*args)
    expected, expected_lse = ATTENTION.spec.reference(*args)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(lse.isfinite(), expected_lse.isfinite())
    assert out[0, 0].isfinite().all()
    assert out[0, 1, :20].isfinite().all() or which == 2


@pytest.mark.parametrize(("T", "S"), [(5, 9), (9, 5)])
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_each_alignment_is_that_of_torch_given_by_a_mask(causal, T, S):
    q, k, v = qkv(T, S)
    seen = torch.ones(T, S, dtype=torch.bool, device=DEVICE)
    seen = seen.tril(S - T if causal == "bottom_right" else 0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, *(t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v)), seen
    )
    expected = torch.where(seen.any(1)[:, None], expected, 0)
    torch.testing.assert_close(attention(q, k, v, causal=causal), expected, rtol=1e-5, atol=1e-5)


ALL_MASKED = {
    "boolean": lambda T, S: {"bias": torch.arange(T, device=DEVICE)[:, None].expand(T, S) != 5},
    "additive": lambda T, S: {
        "bias": torch.where(torch.arange(T, device=DEVICE)[:, None] == 5, -torch.inf, 0.0)
    },
    "bottom_right": lambda T, S: {"causal": "bottom_right"},
    "window": lambda T, S: {"causal": "top_left", "window": (3, 0)},
    "key_padding": lambda T, S: {
        "key_padding_mask": torch.tensor([[True], [False]], device=DEVICE).expand(2, S)
    },
}


@by_dtype
@pytest.mark.parametrize("how", ALL_MASKED)
def test_rows_that_see_no_key_are_exactly_zero(how, dtype):
    T, S = 45, 33
    given = ALL_MASKED[how](T, S)
    q, k, v = (t.requires_grad_() for t in qkv(T, S, dtype=dtype))
    out, lse = attention(q, k, v, return_lse=True, **given)
    (out.float().sum() + torch.where(lse == -torch.inf, 0, lse).sum()).backward()
    dead = lse == -torch.inf
    assert dead.any() and not dead.all()
    assert (out[dead] == 0).all() and (q.grad[dead] == 0).all()
    assert (out[~dead] != 0).any(-1).all()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_a_sink_alone_leaves_a_masked_row_at_zero_with_the_sinks_lse():
    q, k, v = qkv(40, 33)
    sinks = randn(2)
    out, lse = attention(q, k, v, causal="bottom_right", sinks=sinks, return_lse=True)
    assert (out[:, :, :7] == 0).all()
    torch.testing.assert_close(lse[:, :, :7], sinks[None, :, None].expand(2, 2, 7))


def test_nothing_beyond_the_tails_is_read():
    frames = [torch.full((2, 2, 60, 40), math.nan, device=DEVICE) for _ in range(3)]
    inner = qkv(35, 35, 20)
    for frame, tensor in zip(frames, inner, strict=True):
        frame[:, :, :35, :20] = tensor
    views = [f[:, :, :35, :20].requires_grad_() for f in frames]
    out = attention(*views)
    grads = torch.autograd.grad(out.sum(), views)
    assert_same("out", out, attention(*inner))
    assert all(g.isfinite().all() for g in grads)


def layouts():
    packed = randn(2, 37, 3, 2, 16)
    yield "packed", packed.permute(2, 0, 3, 1, 4).unbind()
    yield "heads_inside", [randn(2, 37, 2, 16).transpose(1, 2) for _ in range(3)]
    yield "features_apart", [randn(2, 2, 16, 37).mT for _ in range(3)]
    yield "shared", [randn(1, 1, 37, 16).expand(2, 2, 37, 16) for _ in range(3)]


@pytest.mark.parametrize("layout", ["packed", "heads_inside", "features_apart", "shared"])
def test_layouts_give_the_same(layout):
    views = dict(layouts())[layout]
    dense = [t.contiguous() for t in views]
    dout, dlse = randn(2, 37, 2, 16).transpose(1, 2), randn().expand(2, 2, 37)
    plain = run(ATTENTION, call(*dense, right=0), dout.contiguous(), dlse.contiguous())
    for a, b in zip(run(ATTENTION, call(*views, right=0), dout, dlse), plain, strict=True):
        assert_same(layout, a, b)


@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_a_causal_window_sees_nothing_ahead(causal):
    q, k, v = qkv(5, 9)
    assert_same(
        "out",
        attention(q, k, v, causal=causal, window=(3, 2)),
        attention(q, k, v, causal=causal, window=(3, 0)),
    )


@pytest.mark.parametrize("window", [(2, None), (2, 0), (1, 0)], ids=str)
def test_a_window_counts_where_no_kernel_runs(window):
    q, k, v = qkv(6, 6)
    expected = attention(q.double(), k.double(), v.double(), window=window)
    with trilith.use_implementation("trilith::attention", "reference"):
        out = attention(q, k, v, window=window)
    torch.testing.assert_close(out, expected.float())


def test_a_stride_0_mask_equals_the_whole_one():
    q, k, v = qkv(33, 40)
    mask = randn(33, 1) > -2
    whole = mask.expand(2, 2, 33, 40).contiguous()
    assert_same("out", attention(q, k, v, bias=mask), attention(q, k, v, bias=whole))


@pytest.mark.parametrize("shape", [(40,), (33, 1), (2, 1, 1, 40), (2, 33, 40), (1, 1, 1, 1)])
def test_the_gradient_of_a_bias_is_summed_where_it_broadcasts(shape):
    q, k, v = qkv(33, 40)
    bias = randn(*shape).requires_grad_()
    weight = randn(2, 2, 33, 16)
    (actual,) = torch.autograd.grad((attention(q, k, v, bias=bias) * weight).sum(), bias)
    wide = [t.double() for t in (q, k, v, bias)]
    out = F.scaled_dot_product_attention(*wide[:3], wide[3].expand(2, 2, 33, 40))
    (expected,) = torch.autograd.grad((out * weight).sum(), bias)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_the_gradient_of_lse_alone():
    q, k, v = (t.requires_grad_() for t in qkv(33, 40))
    lse = attention(q, k, v, return_lse=True)[1]
    weight = randn(2, 2, 33)
    actual = torch.autograd.grad((lse * weight).sum(), (q, k, v), allow_unused=True)
    scores = (q.double() @ k.double().mT) / 4
    expected = torch.autograd.grad((scores.logsumexp(-1) * weight).sum(), (q, k))
    for a, e in zip(actual, expected, strict=False):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    assert actual[2] is None or (actual[2] == 0).all()


def test_two_halves_of_the_keys_merge_by_their_lse():
    q, k, v = qkv(33, 64)
    whole, whole_lse = attention(q, k, v, return_lse=True)
    parts = [attention(q, k[:, :, h], v[:, :, h], return_lse=True) for h in halves(64)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * (s - lse).exp()[..., None] for o, s in parts)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


def halves(length):
    return slice(0, length // 2), slice(length // 2, length)


def test_dropout_drops_what_the_seed_says():
    B, H, T, S, p = 2, 2, 34, 37, 0.4
    q, k = torch.zeros(B, H, T, 16, device=DEVICE), torch.zeros(B, H, S, 16, device=DEVICE)
    v = torch.eye(S, device=DEVICE).expand(B, H, S, S)
    seed = torch.tensor([12345], device=DEVICE)
    out, _ = ATTENTION(*call(q, k, v, p=p, seed=seed))
    kept = reference_keep_mask(seed, (B, H, T, S), p)
    torch.testing.assert_close(out, kept / (S * (1 - p)))
    assert torch.equal(out == 0, ~kept)


def test_dropout_draws_anew_and_follows_the_generator():
    q, k, v = qkv(33, 40)
    torch.manual_seed(5)
    first, second = (attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_everything_is_dropped_at_probability_one():
    q, k, v = (t.requires_grad_() for t in qkv(33, 40))
    out = attention(q, k, v, dropout_p=1.0)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all((t == 0).all() for t in (out, *grads))


@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(T, S):
    q, k, v = (t.requires_grad_() for t in qkv(T, S))
    out, lse = attention(q, k, v, return_lse=True)
    assert out.shape == (2, 2, T, 16) and (out == 0).all() and (lse == -torch.inf).all()
    assert (scaled_dot_product_attention(q, k, v) == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
    assert all(g is None or (g == 0).all() for g in grads)


@triton.jit
def band_kernel(
    result_ptr, start, stop, limit, low, high, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr
):
    begin, full_begin, full_end, end = band_range(
        start, stop, limit, low, high, HAS_LOW, HAS_HIGH, 8
    )
    tl.store(result_ptr, begin)
    tl.store(result_ptr + 1, full_begin)
    tl.store(result_ptr + 2, full_end)
    tl.store(result_ptr + 3, end)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (None, 0),
        (None, -9),
        (None, 13),
        (-4, 0),
        (-30, 5),
        (3, 40),
        (60, 70),
        (-2, None),
        (None, None),
    ],
)
@pytest.mark.parametrize("limit", [1, 8, 37])
def test_ranges_hold_every_tile_that_meets_and_no_other(limit, low, high):
    result = torch.empty(4, dtype=torch.int32, device=DEVICE)
    for start in range(0, 48, 16):
        stop = min(start + 16, 45)
        args = (start, stop, limit, low or 0, high or 0, low is not None, high is not None)
        band_kernel[(1,)](result, *args)
        begin, full_begin, full_end, end = result.tolist()
        meets = torch.tensor(
            [
                [
                    (low is None or j >= i + low) and (high is None or j <= i + high)
                    for i in range(start, stop)
                ]
                for j in range(limit)
            ]
        )
        seen = [j for j in range(limit) if begin <= j < end]
        assert not meets[[j for j in range(limit) if j not in seen]].any()
        assert meets[full_begin:full_end].all()
        assert begin % 8 == 0 and (full_end - full_begin) % 8 == 0
        assert full_begin % 8 == 0 or full_begin == full_end
        tiles = [meets[j : j + 8] for j in range(begin, end, 8)]
        assert all(tile.any() for tile in tiles)
        whole = [t for t in tiles if t.all() and len(t) == 8]
        assert (full_end - full_begin) // 8 == len(whole)


def test_double_precision_takes_torchs_path():
    q, k, v = (t.double().requires_grad_() for t in qkv(33, 40))
    for given in ({"causal": "top_left"}, {"bias": randn(33, 40) > 0}, {"causal": "bottom_right"}):
        out = attention(q, k, v, **given)
        again, lse = attention(q, k, v, return_lse=True, **given)
        torch.testing.assert_close(out, again)
        assert out.dtype == lse.dtype == torch.float64


def test_compiles_without_a_break():
    q, k, v = (t.requires_grad_() for t in qkv(33, 33))
    compiled = torch.compile(
        lambda *t: attention(*t, causal=True), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(q, k, v), attention(q, k, v, causal=True))
