"""Packed attention of realistic size, for the ahead-of-time survey of binaries."""

import torch

from trilith.kernels.attention.varlen import VARLEN_ATTENTION
from trilith.plugins import Sample


def sample(dtype, d, heads=16, key_heads=16, total=8192, **given):
    terms = dict.fromkeys(("bias", "slopes", "sinks", "seed"))
    scalars = {"scale": d**-0.5, "softcap": 0.0, "p": 0.0}
    band = {"alignment": "bottom_right", "left": -1, "right": -1}
    return Sample(
        torch.empty(total, heads, d, dtype=dtype),
        torch.empty(total, key_heads, d, dtype=dtype),
        torch.empty(total, key_heads, d, dtype=dtype),
        torch.empty(17, dtype=torch.int32),
        torch.empty(17, dtype=torch.int32),
        **(terms | scalars | band | given),
    )


def cases():
    name = VARLEN_ATTENTION.spec.name
    seed = torch.empty(1, dtype=torch.int64)
    for d in (64, 128, 256):
        yield name, sample(torch.bfloat16, d, right=0)
    yield name, sample(torch.bfloat16, 128, key_heads=4, left=512, right=0, p=0.1, seed=seed)
    bias, slopes, sinks = torch.empty(1, 16, 2048, 2048), torch.empty(16, 16), torch.empty(16)
    yield name, sample(torch.float16, 80, bias=bias, slopes=slopes, sinks=sinks)
    yield name, sample(torch.float32, 64, right=0)
