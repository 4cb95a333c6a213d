"""Realistic calls of cross-entropy for ahead-of-time compiling; allocate under FakeTensorMode."""

from collections.abc import Iterator

import torch

from trilith.plugins import Sample

_BF16, _FP32 = torch.bfloat16, torch.float32


def cases() -> Iterator[tuple[str, Sample]]:
    for v in (2, 50, 1000, 32000, 50257, 128256, 262144):
        for dtype in (_BF16, _FP32):
            yield _case(torch.empty(4096, v, dtype=dtype))
    for v in (32000, 50257):
        for dtype in (_BF16, _FP32):
            x = torch.empty(4096, v, dtype=dtype)
            weight = torch.empty(v, dtype=_FP32)
            yield _case(x, softcap=30.0)
            yield _case(x, label_smoothing=0.1, z_loss=1e-4)
            yield _case(x, weight, label_smoothing=0.1, softcap=30.0)
            yield _case(x, weight.to(dtype))
    yield _case(torch.empty(32000, 4096, dtype=_BF16).t())
    for dtype in (_BF16, _FP32):
        for classes in (21, 1000):
            image = torch.empty(8, classes, 64 * 64, dtype=dtype)
            yield _case(image)
            yield _case(image, torch.empty(classes), label_smoothing=0.1, softcap=30.0)


def _case(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[str, Sample]:
    target = torch.empty(x.shape[0], *x.shape[2:], dtype=torch.int64)
    return (
        "trilith::cross_entropy",
        Sample(x, target, weight, -100, label_smoothing, z_loss, softcap),
    )
