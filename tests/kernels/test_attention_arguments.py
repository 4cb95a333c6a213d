"""Arguments that attention refuses, and what it says."""

import math
import re

import pytest
import torch

from tests.kernels.test_attention import qkv
from tests.support.devices import DEVICE
from trilith.kernels.attention import attention

BAD_CALLS = {
    "three_dims": (lambda q, k, v: attention(q[0], k, v), ValueError, "q must be 4-D"),
    "dtypes": (lambda q, k, v: attention(q, k.half(), v), TypeError, "must have one dtype"),
    "integers": (lambda q, k, v: attention(q.int(), k, v), TypeError, "floating-point"),
    "heads": (
        lambda q, k, v: attention(q, k[:, :2], v[:, :2]),
        ValueError,
        "heads must be a multiple of the keys' 2, got 3",
    ),
    "key_dim": (lambda q, k, v: attention(q, k[..., :3], v), ValueError, "k must have shape"),
    "value_len": (lambda q, k, v: attention(q, k, v[:, :, :3]), ValueError, "v must have shape"),
    "causal": (
        lambda q, k, v: attention(q, k, v, causal=True),
        ValueError,
        '5 queries and 7 keys, "top_left" or "bottom_right"',
    ),
    "causal_name": (lambda q, k, v: attention(q, k, v, causal="left"), ValueError, "'left'"),
    "window": (lambda q, k, v: attention(q, k, v, window=(-2, 3)), ValueError, "window must be"),
    "window_int": (lambda q, k, v: attention(q, k, v, window=4), ValueError, "window must be"),
    "window_float": (
        lambda q, k, v: attention(q, k, v, window=(1.5, 0)),
        ValueError,
        "window must be (left, right), each None or an int from 0 on, got (1.5, 0)",
    ),
    "softcap": (lambda q, k, v: attention(q, k, v, softcap=0.0), ValueError, "be positive"),
    "softcap_inf": (lambda q, k, v: attention(q, k, v, softcap=math.inf), ValueError, "finite"),
    "no_tensor": (lambda q, k, v: attention(None, k, v), TypeError, "q must be a tensor"),
    "listed_bias": (
        lambda q, k, v: attention(q, k, v, bias=[1.0]),
        TypeError,
        "bias must be a tensor, got list",
    ),
    "listed_sinks": (
        lambda q, k, v: attention(q, k, v, sinks=[1.0] * 3),
        TypeError,
        "sinks must be a floating-point tensor, got list",
    ),
    "listed_key_mask": (
        lambda q, k, v: attention(q, k, v, key_padding_mask=[True]),
        TypeError,
        "key_padding_mask must be a tensor, got list",
    ),
    "bias": (
        lambda q, k, v: attention(q, k, v, bias=torch.ones(5, 6, device=DEVICE)),
        ValueError,
        "bias must broadcast to (2, 3, 5, 7), got (5, 6)",
    ),
    "bias_dtype": (
        lambda q, k, v: attention(q, k, v, bias=torch.ones(5, 7, device=DEVICE).int()),
        TypeError,
        "bias must be a floating-point tensor",
    ),
    "slopes": (
        lambda q, k, v: attention(q, k, v, alibi_slopes=torch.ones(4, device=DEVICE)),
        ValueError,
        "alibi_slopes must be (3,) or (2, 3), got (4,)",
    ),
    "sinks": (
        lambda q, k, v: attention(q, k, v, sinks=torch.ones(4, device=DEVICE)),
        ValueError,
        "sinks must have shape (3,), got (4,)",
    ),
    "key_mask": (
        lambda q, k, v: attention(q, k, v, key_padding_mask=torch.ones(2, 7, device=DEVICE)),
        TypeError,
        "True where a key takes part",
    ),
    "probability": (lambda q, k, v: attention(q, k, v, dropout_p=-0.1), ValueError, "dropout_p"),
    "head_dim": (
        lambda q, k, v: attention(*(t.repeat(1, 1, 1, 33) for t in (q, k, v))),
        NotImplementedError,
        "kernels for head dims up to 512, got 528 and 528",
    ),
    "score_mod": (
        lambda q, k, v: attention(q, k, v, score_mod="acme.nothing"),
        ValueError,
        "score_mod must be one of those registered: [",
    ),
    "precision": (
        lambda q, k, v: attention(q, k, v, precision="bf16"),
        ValueError,
        'precision must be "ieee" or "tf32"',
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_wrong_arguments_are_named(case):
    function, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        function(*qkv(5, 7, H=3))
