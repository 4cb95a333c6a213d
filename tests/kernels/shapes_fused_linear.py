"""norm_linear and act_linear as blocks call them, for the ahead-of-time compiles."""

import torch

from trilith.plugins import Sample


def cases():
    for dtype in (torch.bfloat16, torch.float32):
        for n in (768, 4096, 8192, 16384):
            yield from _norms(dtype, n)
        yield from _activations(dtype, 4096, 3072)


def _empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype)


def _norms(dtype, n):
    x = _empty(4096, n, dtype=dtype)
    weight, bias = _empty(n, dtype=dtype), _empty(n, dtype=dtype)
    first, second = _empty(64, n, dtype=dtype), _empty(64, n, dtype=dtype)
    layers = (first, None, second, None)
    yield "trilith::norm_linear", Sample(x, weight, bias, first, None, None, None, 1e-5, True)
    yield "trilith::norm_linear", Sample(x, weight, None, *layers, 1e-6, False)


def _activations(dtype, m, n):
    x, up, bias = _empty(m, n, dtype=dtype), _empty(m, n, dtype=dtype), _empty(n, dtype=dtype)
    weight = _empty(768, n, dtype=dtype)
    seed = torch.empty(1, dtype=torch.int64)
    yield "trilith::bias_act_linear", Sample(x, bias, weight, None, None, "gelu", 0.0)
    yield "trilith::bias_act_linear", Sample(x, bias, weight, None, seed, "gelu_tanh", 0.1)
    yield "trilith::gated_act_linear", Sample(x, up, weight, None, "silu")
