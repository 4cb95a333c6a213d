"""Realistic calls of the activations, for ahead-of-time compilation."""

import torch

from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.plugins import Sample

SHAPES = ((4096, 4096), (8192, 11008), (4096, 1000))


def cases():
    seed = torch.empty(1, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            x, bias = torch.empty(shape, dtype=dtype), torch.empty(shape[-1], dtype=dtype)
            yield "trilith::bias_act", Sample(x, bias, None, "gelu", 0.0)
            packed = torch.empty(shape[0], 2 * shape[1], dtype=dtype)
            yield "trilith::gated_act", Sample(*packed.chunk(2, dim=-1), "silu")
        x, bias = torch.empty(SHAPES[0], dtype=dtype), torch.empty(4096, dtype=dtype)
        yield "trilith::bias_act", Sample(x, None, None, "gelu", 0.0)
        yield "trilith::bias_act", Sample(x, bias, seed, "gelu", 0.1)
        yield "trilith::bias_act", Sample(x, None, seed, "gelu_tanh", 0.1)
        yield "trilith::bias_act", Sample(x.t(), bias, None, "silu", 0.0)
        yield "trilith::bias_act", Sample(x[:, :4095], bias[:4095], seed, "gelu", 0.1)
        yield "trilith::gated_act", Sample(x, x, "silu")
        for activation in ACTIVATIONS:
            yield "trilith::bias_act", Sample(x, bias, None, activation, 0.0)
            yield "trilith::gated_act", Sample(x, x, activation)
