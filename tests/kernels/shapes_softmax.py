"""Realistic calls of softmax, for ahead-of-time compilation."""

import torch

from trilith.plugins import Sample


def cases():
    for op in ("trilith::softmax", "trilith::log_softmax"):
        for dtype in (torch.bfloat16, torch.float32):
            for n in (64, 1000, 4096, 8192, 16384, 131072):
                yield op, Sample(torch.empty(4096, n, dtype=dtype), 1, torch.float32)
            yield op, Sample(torch.empty(64, 1000, 196, dtype=dtype), 1, dtype)
            yield op, Sample(torch.empty(64, 21, 4096, dtype=dtype), 1, dtype)
