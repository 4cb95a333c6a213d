"""Realistic calls of rotary for ahead-of-time compiling; allocate under FakeTensorMode."""

from collections.abc import Iterator

import torch

from trilith.plugins import Sample


def cases() -> Iterator[tuple[str, Sample]]:
    for dtype in (torch.bfloat16, torch.float32):
        for interleaved in (False, True):
            for d, r in ((64, 64), (80, 80), (128, 128), (128, 64), (80, 32), (256, 256)):
                yield _case(4, 16, 2048, d, r, dtype, dtype, interleaved)
            yield _case(4, 16, 2048, 128, 128, dtype, torch.float32, interleaved)
            yield _case(1, 32, 1, 128, 128, dtype, torch.float32, interleaved)
            yield _packed(4, 16, 4, 2048, 128, dtype, interleaved)


def _packed(
    b: int, h: int, hkv: int, t: int, d: int, dtype: torch.dtype, interleaved: bool
) -> tuple[str, Sample]:
    qkv = torch.empty(b, t, h + 2 * hkv, d, dtype=dtype)
    cos, sin = (torch.empty(t, d // 2) for _ in range(2))
    return "trilith::rotary_qkvpacked", Sample(qkv, cos, sin, h + hkv, interleaved)


def _case(
    b: int,
    h: int,
    t: int,
    d: int,
    r: int,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    interleaved: bool,
) -> tuple[str, Sample]:
    packed = torch.empty(b, t, 3, h, d, dtype=dtype)
    cos, sin = (torch.empty(t, r // 2, dtype=table_dtype) for _ in range(2))
    return "trilith::rotary", Sample(packed[:, :, 1].transpose(1, 2), cos, sin, interleaved)
