"""Packed sequences of drawn lengths and options: each gives what attention gives it alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties.test_attention import bands, dims, heads
from tests.support import strategies as draw
from trilith.kernels import attention, varlen_attention

lengths = st.lists(st.sampled_from((0, 1, 2, 15, 16, 17, 33)), min_size=1, max_size=4)


@draw.bounded()
@given(
    call=draw.calls,
    queries=lengths,
    keys=st.randoms(use_true_random=False),
    shape=heads(),
    head_dims=st.tuples(dims, dims),
    band=bands(1, 2),
)
def test_varlen_attention(call, queries, keys, shape, head_dims, band):
    causal, window, _ = band
    _, H, Hkv = shape
    other = [keys.choice((0, 1, 7, 16, 18, 33)) for _ in queries]
    (D, Dv), total_q, total_k = head_dims, sum(queries), sum(other)
    q = call.randn(total_q, H, D)
    k, v = call.randn(total_k, Hkv, D), call.randn(total_k, Hkv, Dv)
    cu = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0).to(q.device) for n in (queries, other)]
    given_ = {"causal": causal, "window": window, "return_lse": True}
    out, lse = varlen_attention(q, k, v, *cu, **given_)
    assert out.shape == (total_q, H, Dv) and lse.shape == (H, total_q)
    begins = [c.tolist() for c in cu]
    for i, j, a, b in zip(*(x for c in begins for x in (c, c[1:])), strict=False):
        alone = [t[s].transpose(0, 1)[None] for t, s in ((q, slice(i, j)), (k, slice(a, b)))]
        own, own_lse = attention(*alone, v[a:b].transpose(0, 1)[None], **given_)
        torch.testing.assert_close(out[i:j].transpose(0, 1), own[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, i:j], own_lse[0], rtol=1e-5, atol=1e-5)
