"""Shapes of layer_norm and rms_norm as they occur, for the ahead-of-time compiles."""

import torch

from trilith.plugins import Sample

_LENGTHS = (768, 1024, 4096, 8192, 16384, 65536, 131072)


def cases():
    for dtype in (torch.bfloat16, torch.float32):
        for n in _LENGTHS:
            x, weight, bias = _tensors((4096, n), dtype)
            yield "trilith::layer_norm", Sample(x, weight, bias, eps=1e-5)
            yield "trilith::rms_norm", Sample(x, weight, eps=1e-6)
    x, weight, bias = _tensors((65536, 64), torch.bfloat16)
    yield "trilith::layer_norm", Sample(x, weight, bias, eps=1e-5)
    yield "trilith::rms_norm", Sample(x, weight, eps=1e-6)
    x, weight, bias = _tensors((4096, 1000), torch.bfloat16)
    yield "trilith::layer_norm", Sample(x, weight, bias, eps=1e-5)
    for n in (4096, 65536):
        x, weight, bias = _tensors((16, 256, n), torch.bfloat16)
        yield "trilith::layer_norm", Sample(x, None, None, eps=1e-5)
        yield "trilith::layer_norm", Sample(x, weight, None, eps=1e-5)
        yield "trilith::rms_norm", Sample(x.transpose(0, 1), weight.float(), eps=1e-6)


def _tensors(shape, dtype):
    return torch.empty(shape, dtype=dtype), *(torch.empty(shape[-1], dtype=dtype) for _ in "wb")
