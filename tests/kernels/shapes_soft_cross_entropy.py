"""Realistic calls against class probabilities for ahead-of-time compiling; under FakeTensorMode."""

import torch

from trilith.plugins import Sample


def cases():
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.empty(1000)
        for shape in ((256, 10), (1024, 1000), (4096, 32000), (4096, 50257), (8, 1000, 64 * 64)):
            x = torch.empty(shape, dtype=dtype)
            yield _case(x, x, None, 0.0, 0.0, None)
            if shape[1] == 1000:
                yield _case(x, x.float(), weight, 0.1, 1e-4, 30.0)


def _case(*arguments):
    return "trilith::soft_cross_entropy", Sample(*arguments)
