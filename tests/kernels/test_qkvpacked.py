"""q, k and v in one tensor: to the bit what the functions of each by itself give."""

import math

import pytest
import torch

from perf.meters.launches import launches
from tests.support.devices import DEVICE, DTYPES, INTERPRETING, dtype_name
from trilith.kernels import attention, attention_qkvpacked, rotary, rotary_qkvpacked

runs_kernels = pytest.mark.skipif(not (INTERPRETING or DEVICE == "cuda"), reason="needs Triton")


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def parts(qkv, n_heads):
    """q, k and v, (B, heads, T, D)."""
    others = (qkv.shape[2] - n_heads) // 2
    return qkv.transpose(1, 2).split((n_heads, others, others), dim=1)


def tables(*shape):
    angle = 7 * torch.rand(shape, device=DEVICE)
    return angle.cos(), angle.sin()


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


OPTIONS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": "bottom_right", "window": (5, None)},
    "softcap": {"softcap": 2.0, "window": (3, 4), "scale": -0.2},
    "slopes": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.1, 0.3, 0.0], device=DEVICE)},
    "dropout": {"causal": True, "dropout_p": 0.3},
    "terms": {
        "bias": torch.linspace(-1, 1, 18 * 18, device=DEVICE).view(18, 18),
        "sinks": torch.arange(4.0, device=DEVICE),
        "key_padding_mask": torch.arange(18, device=DEVICE)[None] > 1,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_is_that_of_the_parts(options, key_heads, dtype):
    qkv = randn(1, 18, 4 + 2 * key_heads, 12, dtype=dtype).requires_grad_()
    torch.manual_seed(0)
    out, lse = attention_qkvpacked(qkv, 4, **options, return_lse=True)
    torch.manual_seed(0)
    mixed, of_parts = attention(*parts(qkv, 4), **options, return_lse=True)
    assert out.is_contiguous() and out.dtype == dtype
    same((out.transpose(1, 2), lse), (mixed, of_parts))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    same(found, torch.autograd.grad((mixed, of_parts), qkv, (dout.transpose(1, 2), dlse)))


@pytest.mark.parametrize("of_qkv", [True, False])
def test_terms_have_their_gradients(of_qkv):
    qkv, bias = randn(2, 9, 6, 8).requires_grad_(of_qkv), randn(1, 2, 9, 9).requires_grad_()
    slopes, sinks = torch.rand(2, 2, device=DEVICE, requires_grad=True), randn(2).requires_grad_()
    terms = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
    inputs = [*terms.values(), *[qkv] * of_qkv]
    out = attention_qkvpacked(qkv, 2, **terms)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, dout)
    out = attention(*parts(qkv, 2), **terms)
    same(found, torch.autograd.grad(out, inputs, dout.transpose(1, 2)))


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_equal_heads_may_lie_in_a_dimension_of_their_own(strided):
    qkv, (cos, sin) = randn(2, 11, 3, 4, 16), tables(11, 8)
    if strided:
        qkv = qkv.permute(3, 2, 4, 0, 1).contiguous().permute(3, 4, 1, 0, 2)
    joined = qkv.contiguous().flatten(2, 3)
    for ours in (attention_qkvpacked, lambda x: rotary_qkvpacked(x, cos, sin)):
        same([ours(qkv)], [ours(joined)])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("per_batch", [False, True], ids=["shared", "per-batch"])
@pytest.mark.parametrize(
    ("heads", "key_heads", "d", "r"), [(4, 4, 8, 8), (6, 2, 20, 6), (17, 1, 10, 10)]
)
def test_rotary_turns_q_and_k_and_copies_v(heads, key_heads, d, r, per_batch, interleaved, dtype):
    qkv = randn(2, 5, heads + 2 * key_heads, d, dtype=dtype)
    qkv[..., -key_heads:, 0], qkv[..., -key_heads:, -1] = math.inf, math.nan  # times 0 is NaN
    qkv.requires_grad_()
    cos, sin = tables(2, 5, r // 2) if per_batch else tables(5, r // 2)
    y = rotary_qkvpacked(qkv, cos, sin, heads, interleaved=interleaved)
    q, k, v = parts(qkv, heads)
    turned = [rotary(x, cos, sin, interleaved=interleaved) for x in (q, k)]
    expected = torch.cat([*turned, v], dim=1).transpose(1, 2)
    assert y.is_contiguous() and y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    dy = torch.randn_like(y)
    same(torch.autograd.grad(y, qkv, dy), torch.autograd.grad(expected, qkv, dy))


@runs_kernels
def test_nothing_is_copied_before_or_after_the_kernels():
    qkv, (cos, sin) = randn(2, 16, 12, 16).flatten(2).requires_grad_(), tables(16, 8)
    with launches() as forward:
        turned = rotary_qkvpacked(qkv.unflatten(-1, (12, 16)), cos, sin, 8)
        out = attention_qkvpacked(turned, 8, causal=True).flatten(2)
    assert forward == {"_rotary_kernel": 1, "attention_fwd_kernel": 1}
    above = torch.ones_like(out)
    with launches() as backward:
        torch.autograd.grad(out, qkv, above)
    kernels = ("attention_delta_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel")
    assert backward == dict.fromkeys((*kernels, "_rotary_kernel"), 1)


@pytest.mark.parametrize("n_heads", [None, 0, -2, 3, 8, 6])
def test_heads_that_cannot_be_are_named(n_heads):
    qkv, (cos, sin) = randn(1, 3, 8, 4), tables(3, 2)
    for name, call in (
        ("attention_qkvpacked", lambda: attention_qkvpacked(qkv, n_heads)),
        ("rotary_qkvpacked", lambda: rotary_qkvpacked(qkv, cos, sin, n_heads)),
    ):
        rule = rf"^{name}: n_heads must be H of the 8 = H \+ 2 Hkv heads, .* got {n_heads}"
        if n_heads == 6:
            assert call().shape[1] == 3
            continue
        with pytest.raises(ValueError, match=rule):
            call()


def test_shapes_that_cannot_be_are_named():
    cos, sin = tables(3, 2)
    with pytest.raises(ValueError, match=r"qkv must be \(B, T, H \+ 2 Hkv, D\) or"):
        attention_qkvpacked(randn(3, 8, 4))
    with pytest.raises(ValueError, match=r"qkv must be .* got \(1, 3, 2, 4, 4\)"):
        attention_qkvpacked(randn(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"rotary_qkvpacked: cos and sin must have x's T = 5"):
        rotary_qkvpacked(randn(1, 5, 6, 4), cos, sin)
