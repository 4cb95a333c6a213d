"""Decoding calls of realistic size, for the ahead-of-time survey of binaries."""

import torch

from trilith.kernels.attention.decode import DECODE_ATTENTION
from trilith.plugins import Sample


def sample(dtype, d, heads=32, key_heads=8, queries=1, paged=False, **given):
    terms = {"table": None, "slopes": None, "sinks": None}
    scalars = {"scale": d**-0.5, "softcap": 0.0, "left": -1}
    caches = (4096, 16) if paged else (4, 8192)
    if paged:
        terms["table"] = torch.empty(4, 512, dtype=torch.int32)
    return Sample(
        torch.empty(4, heads, queries, d, dtype=dtype),
        torch.empty(*caches, key_heads, d, dtype=dtype),
        torch.empty(*caches, key_heads, d, dtype=dtype),
        torch.empty(4, dtype=torch.int32),
        **(terms | scalars | given),
    )


def cases():
    name = DECODE_ATTENTION.spec.name
    for dtype in (torch.bfloat16, torch.float32):
        for d in (64, 128, 256, 512):
            yield name, sample(dtype, d)
        yield name, sample(dtype, 128, paged=True)
        yield name, sample(dtype, 128, queries=16, paged=True, left=4096, softcap=30.0)
    slopes, sinks = torch.empty(1, 32), torch.empty(32)
    yield name, sample(torch.float16, 64, queries=16, slopes=slopes, sinks=sinks)
    yield name, sample(torch.float16, 80, key_heads=32)
