"""Residual sums and their norms as pre-norm blocks call them, for the ahead-of-time compiles."""

import torch

from trilith.plugins import Sample

_LENGTHS = (768, 4096, 8192, 16384, 32768)


def cases():
    for dtype in (torch.bfloat16, torch.float32):
        for n in _LENGTHS:
            yield from _sums(dtype, dtype, n)
    yield from _sums(torch.bfloat16, torch.float32, 4096)
    yield from _sums(torch.bfloat16, torch.bfloat16, 1000)


def _sums(dtype, residual_dtype, n):
    """Without dropout and with it, of both norms; alone and before linear layers."""
    x, residual = _empty(4096, n, dtype=dtype), _empty(4096, n, dtype=residual_dtype)
    weight, bias = _empty(n, dtype=dtype), _empty(n, dtype=dtype)
    x_dtype = None if dtype == residual_dtype else dtype
    for seed, p in ((None, 0.0), (torch.empty(1, dtype=torch.int64), 0.1)):
        sums = (x, residual, seed)
        layer, rms = (weight, bias), (weight, None)
        yield "trilith::add_norm", Sample(*sums, *layer, 1e-5, p, True, x_dtype)
        yield "trilith::add_norm", Sample(*sums, *rms, 1e-6, p, False, x_dtype)
        first, second = _empty(64, n, dtype=dtype), _empty(64, n, dtype=dtype)
        one, two = (first, None, None, None), (first, None, second, None)
        tail = (p, True, x_dtype)
        yield "trilith::add_norm_linear", Sample(*sums, *layer, *one, 1e-5, *tail)
        tail = (p, False, x_dtype)
        yield "trilith::add_norm_linear", Sample(*sums, *rms, *two, 1e-6, *tail)


def _empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype)
