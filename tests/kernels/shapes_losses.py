"""Realistic calls of the elementwise losses, for ahead-of-time compilation."""

import torch

from trilith.plugins import Sample


def cases():
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((8192, 4096), (4096, 1001)):
            x, target = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            q = torch.empty(shape[-1], dtype=torch.float32).expand(shape)
            for reduction in ("mean", "none"):
                for weights in ((None, None), (x, q)):
                    yield (
                        "trilith::binary_cross_entropy_with_logits",
                        Sample(x, target, *weights, reduction, dtype),
                    )
                yield "trilith::mse_loss", Sample(x, target, None, reduction, dtype)
                yield "trilith::mse_loss", Sample(x, target, x, reduction, dtype)
