"""decode_attention with any options, in rows and in pages, against its reference in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_decode_attention import check, counts, paged, randn
from tests.support import strategies as draw
from tests.support.compare import assert_fair


@draw.bounded(20)
@given(
    seed=draw.seeds,
    dtype=draw.dtypes,
    heads=st.sampled_from(((1, 1), (4, 1), (6, 2), (3, 3))),
    T=st.sampled_from((1, 2, 5)),
    S=st.sampled_from((1, 16, 17, 63, 64, 65)),
    dims=st.sampled_from(((16, 16), (8, 24), (17, 3), (64, 64))),
    page=st.sampled_from((None, 1, 4, 16)),
    left=st.sampled_from((-1, -1, 0, 9, 40)),
    softcap=st.sampled_from((0.0, 2.0)),
    scale=st.sampled_from((0.3, -0.2)),
    terms=st.sampled_from(((), ("slopes",), ("sinks",), ("slopes", "sinks"))),
)
def test_decode_attention(seed, dtype, heads, T, S, dims, page, left, softcap, scale, terms):
    torch.manual_seed(seed)
    (H, Hkv), (D, Dv) = heads, dims
    lengths = counts(*torch.randint(0, S + 1, (2,)).tolist(), S)
    q, k, v = (randn(3, *shape, dtype=dtype) for shape in ((H, T, D), (Hkv, S, D), (Hkv, S, Dv)))
    tables = {"slopes": randn(3, H).abs() / 8, "sinks": randn(H, dtype=dtype)}
    options = {name: tables[name] for name in terms}
    caches = (k, v, lengths) if page is None else (*paged(k, v, lengths, page), None)
    if page is not None:
        caches = (*caches[:2], lengths, caches[2])
    options |= {"left": left, "softcap": softcap, "scale": scale, "judge": assert_fair}
    check(q, *caches, **options)
