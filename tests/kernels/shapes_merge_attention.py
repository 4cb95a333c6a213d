"""Merges of realistic size, for the ahead-of-time survey of binaries."""

import torch

from trilith.kernels.attention.merge import MERGE_ATTENTION
from trilith.plugins import Sample


def cases():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for d in (64, 80, 128, 256, 512):
            outs = torch.empty(4, 2, 16, 1024, d, dtype=dtype)
            yield MERGE_ATTENTION.spec.name, Sample(outs, torch.empty(4, 2, 16, 1024))
