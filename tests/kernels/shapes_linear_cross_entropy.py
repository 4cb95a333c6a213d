"""Realistic heads for ahead-of-time compiling; allocate under FakeTensorMode."""

from collections.abc import Iterator

import torch

from trilith.plugins import Sample

_BF16, _FP32 = torch.bfloat16, torch.float32


def cases() -> Iterator[tuple[str, Sample]]:
    for classes in (256, 1000, 32000, 50257, 128256):
        for dtype in (_BF16, _FP32):
            yield _case(classes, dtype)
    for dtype in (_BF16, _FP32):
        yield _case(50257, dtype, per_row=True)
        yield _case(32000, dtype, label_smoothing=0.1, z_loss=1e-4)
        yield _case(32000, dtype, softcap=30.0)
        yield _case(50257, dtype, weighted=True, label_smoothing=0.1, softcap=30.0)


def _case(
    classes: int,
    dtype: torch.dtype,
    weighted: bool = False,
    per_row: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[str, Sample]:
    x, head = torch.empty(8192, 1024, dtype=dtype), torch.empty(classes, 1024, dtype=dtype)
    target = torch.empty(8192, dtype=torch.int64)
    weight = torch.empty(classes) if weighted else None
    options = (per_row, -100, label_smoothing, z_loss, softcap)
    return ("trilith::linear_cross_entropy", Sample(x, head, target, None, weight, *options))
