"""Realistic calls of dropout, for ahead-of-time compilation."""

import torch

from trilith.plugins import Sample

SHAPES = ((4096, 4096), (8192, 11008), (4096, 1000))


def cases():
    seed = torch.empty(1, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            x, bias = torch.empty(shape, dtype=dtype), torch.empty(shape[-1], dtype=dtype)
            yield "trilith::dropout", Sample(x, seed, 0.1)
            yield "trilith::bias_dropout_add", Sample(x, x, bias, seed, 0.1, dtype)
            yield "trilith::bias_dropout_add", Sample(x, x, None, seed, 0.1, dtype)
            yield "trilith::bias_dropout_add", Sample(x, x, bias, None, 0.0, dtype)
        x = torch.empty(SHAPES[0], dtype=dtype)
        stream = torch.empty(SHAPES[0])
        yield "trilith::dropout", Sample(x.t(), seed, 0.1)
        yield "trilith::dropout", Sample(x[:, :4095], seed, 0.1)
        yield "trilith::bias_dropout_add", Sample(x, stream, None, seed, 0.1, dtype)
