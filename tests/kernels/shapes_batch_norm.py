"""Realistic calls of batch norm, for ahead-of-time compilation."""

import torch

from trilith.plugins import Sample


def cases():
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((8192, 1024), (4096, 100), (64, 256, 3136), (32, 64, 100)):
            x, vector = torch.empty(shape, dtype=dtype), torch.empty(shape[1])
            yield "trilith::batch_norm", Sample(x, vector, vector, 1e-5)
            yield "trilith::batch_norm", Sample(x, None, None, 1e-5)
            yield "trilith::batch_norm_given", Sample(x, vector, vector, vector, vector, 1e-5)
