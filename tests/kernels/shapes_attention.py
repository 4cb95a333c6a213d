"""Attention calls of realistic size, for the ahead-of-time survey of binaries."""

import torch

from trilith.kernels.attention.op import ATTENTION
from trilith.kernels.attention.qkvpacked import ATTENTION_QKVPACKED
from trilith.plugins import Sample


def sample(dtype, d, dv=None, heads=16, key_heads=16, length=4096, **given):
    dv = d if dv is None else dv
    terms = {"seed": None, "bias": None, "key_mask": None, "slopes": None, "sinks": None}
    scalars = {"scale": d**-0.5, "softcap": 0.0, "p": 0.0}
    band = {"alignment": "top_left", "left": -1, "right": -1}
    return Sample(
        torch.empty(2, heads, length, d, dtype=dtype),
        torch.empty(2, key_heads, length, d, dtype=dtype),
        torch.empty(2, key_heads, length, dv, dtype=dtype),
        **(terms | scalars | band | given),
    )


def qkvpacked(dtype, d, heads=16, key_heads=4, length=4096, **given):
    terms = {"seed": None, "bias": None, "key_mask": None, "slopes": None, "sinks": None}
    scalars = {"n_heads": heads, "scale": d**-0.5, "softcap": 0.0, "p": 0.0}
    band = {"alignment": "top_left", "left": -1, "right": -1}
    qkv = torch.empty(2, length, heads + 2 * key_heads, d, dtype=dtype)
    return Sample(qkv, **(terms | scalars | band | given))


def boolean():
    return torch.empty(2, 1, 4096, 4096, dtype=torch.bool)


def seed():
    return torch.empty(1, dtype=torch.int64)


def additive(dtype):
    return torch.empty(1, 16, 4096, 4096, dtype=dtype)


def cases():
    name = ATTENTION.spec.name
    for dtype in (torch.bfloat16, torch.float32):
        for d in (64, 128, 256):
            yield name, sample(dtype, d, right=0)
            yield name, sample(dtype, d, bias=boolean(), p=0.1, seed=seed())
        yield name, sample(dtype, 128)
        yield name, sample(dtype, 128, bias=additive(dtype), left=512, right=0, softcap=30.0)
    for d in (64, 256):
        yield name, sample(torch.float16, d)
        yield name, sample(torch.float16, d, bias=boolean(), right=0)
    yield name, sample(torch.float16, 64, right=0, p=0.1, seed=seed())
    yield name, sample(torch.float16, 96, dv=80, key_heads=4, length=1000, right=0)
    slopes, sinks = torch.empty(1, 16), torch.empty(16)
    key_mask = torch.empty(2, 4096, dtype=torch.bool)
    yield name, sample(torch.bfloat16, 160, slopes=slopes, sinks=sinks, key_mask=key_mask)
    for d in (64, 128):
        yield ATTENTION_QKVPACKED.spec.name, qkvpacked(torch.bfloat16, d, right=0)
