"""attention with any options against its reference, and the drop-in against torch, in float64."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.eager_attention import eager
from tests.support import strategies as draw
from tests.support.compare import assert_fair
from tests.support.devices import DEVICE
from trilith.kernels import attention, scaled_dot_product_attention
from trilith.kernels._runtime.random import draw_seed
from trilith.kernels.attention.op import ATTENTION

lengths = st.sampled_from((1, 2, 3, 16, 17, 31, 33, 47, 65))
dims = st.sampled_from((1, 3, 8, 16, 17, 24, 40, 64))


@st.composite
def heads(draw_):
    """B, H, Hkv."""
    sharing = draw_(st.sampled_from((1, 1, 2, 3)))
    keys = draw_(st.sampled_from((1, 2)))
    return draw_(st.sampled_from((1, 2))), sharing * keys, keys


@st.composite
def bands(draw_, T, S):
    """`causal` and `window`, and what they mean to the op: alignment, left, right."""
    causal = draw_(st.sampled_from((False, "top_left", "bottom_right", T == S)))
    alignment = {False: "bottom_right", True: "top_left"}.get(causal, causal)
    edges = st.none() | st.integers(0, 40)
    window = draw_(st.none() | st.tuples(edges, edges))
    left, right = (-1 if n is None else n for n in window or (None, None))
    return causal, window, (alignment, left, 0 if causal else right)


@draw.bounded(24)
@given(data=st.data(), call=draw.calls, bhk=heads(), T=lengths, S=lengths, D=dims, Dv=dims)
def test_attention(data, call, bhk, T, S, D, Dv):
    (B, H, Hkv), choose = bhk, lambda *options: data.draw(st.sampled_from(options))
    dtype, causal_window = data.draw(draw.dtypes), data.draw(bands(T, S))
    causal, window, band = causal_window
    q, k, v = (
        call.randn(*shape, dtype=dtype) for shape in ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
    )
    kind = choose(None, None, "floating", "boolean")
    bias = None
    if kind is not None:
        bias = call.randn(choose(1, B), choose(1, H), choose(1, T), choose(1, S), dtype=dtype)
        bias = call.constant(bias.detach() > -0.5) if kind == "boolean" else bias
    slopes = call.randn(H) if choose(False, False, True) else None
    sinks = call.randn(H, dtype=dtype) if choose(False, False, True) else None
    padding = None
    if choose(False, False, True):
        padding = call.constant(torch.rand(B, S, generator=call.generator) > 0.3)
    softcap, scale = choose(None, None, 2.0), choose(None, 0.3, -0.2)
    p, wants_lse = choose(0.0, 0.0, 0.4), choose(False, True)

    torch.manual_seed(call.seed)
    result = attention(
        *(q, k, v),
        causal=causal,
        window=window,
        bias=bias,
        alibi_slopes=slopes,
        softcap=softcap,
        sinks=sinks,
        key_padding_mask=padding,
        dropout_p=p,
        scale=scale,
        return_lse=wants_lse,
    )
    torch.manual_seed(call.seed)
    args = [q, k, v, bias, padding, None if slopes is None else slopes[None], sinks]
    args += [draw_seed(q) if p else None, D**-0.5 if scale is None else scale]
    args += [softcap or 0.0, p, *band]
    outputs = result if wants_lse else (result,)
    upstream = [call.upstream(o) for o in outputs]
    leaves = draw.given(q, k, v, bias, slopes, sinks)
    found = torch.autograd.grad(outputs, leaves, upstream)

    wide = [draw.doubled(a) if isinstance(a, torch.Tensor) else a for a in args]
    outputs64 = ATTENTION.spec.reference(*wide)[: len(outputs)]
    wanted = draw.given(*(a for a in wide if isinstance(a, torch.Tensor)))
    expected = torch.autograd.grad(outputs64, wanted, [g.double() for g in upstream])
    dlse = upstream[1] if wants_lse else torch.zeros(B, H, T, device=q.device)
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    out, lse, *yardsticks = eager(plain, upstream[0], dlse)

    assert (result[0] if wants_lse else result).dtype == dtype
    for actual, e, fair in zip(outputs, outputs64, (out, lse), strict=False):
        assert_fair(actual.detach(), e.detach(), fair)
    for actual, e, fair in zip(found, expected, yardsticks, strict=True):
        assert_fair(actual, e.reshape(actual.shape), fair.reshape(actual.shape), rows=B * H * T)


@draw.bounded(16)
@given(
    data=st.data(),
    call=draw.calls,
    lead=st.sampled_from(((), (3,), (2, 2), (2, 1, 3))),
    T=lengths,
    S=lengths,
    D=dims,
    mask=st.sampled_from((None, "boolean", "floating", "causal")),
    grouped=st.booleans(),
    scale=st.sampled_from((None, 0.3)),
)
def test_scaled_dot_product_attention(data, call, lead, T, S, D, mask, grouped, scale):
    shared = lead[-1:] if not (grouped and lead) else data.draw(st.sampled_from([(1,), lead[-1:]]))
    tensors = [call.randn(*lead, T, D)] + [call.randn(*lead[:-1], *shared, S, D) for _ in "kv"]
    given_ = {"is_causal": mask == "causal", "scale": scale, "enable_gqa": grouped and bool(lead)}
    attn_mask = None
    if mask in ("boolean", "floating"):
        choices = [data.draw(st.sampled_from((1, n))) for n in (*lead, T, S)]
        cut = data.draw(st.integers(0, len(lead)))
        values = torch.randn(choices[cut:], generator=call.generator).to(DEVICE)
        attn_mask = call.constant(values > -0.5 if mask == "boolean" else values)
    wide = [draw.doubled(t) for t in (*tensors, attn_mask)]
    expected = F.scaled_dot_product_attention(*wide, **given_)
    fair = F.scaled_dot_product_attention(*tensors, attn_mask, **given_)
    actual = scaled_dot_product_attention(*tensors, attn_mask, **given_)
    pull = call.upstream(actual)
    results = [
        [output.detach(), *draw.gradients(output, inputs, pull)]
        for output, inputs in ((actual, tensors), (expected, wide[:3]), (fair, tensors))
    ]
    for a, e, f in zip(*results, strict=True):
        assert_fair(a, e, f)
