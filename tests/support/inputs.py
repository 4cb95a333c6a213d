"""The regimes in which kernels of this kind go wrong, as functions of a shape."""

import torch
from torch import Tensor

from tests.support.devices import DEVICE


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def far_from_zero(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Mean 1e4: squares cancel."""
    return (torch.randn(*shape) + 1e4).to(DEVICE, dtype)


def tiny(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard deviation 1e-4: eps matters."""
    return (torch.randn(*shape) * 1e-4).to(DEVICE, dtype)


def constant_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """No variance within a row."""
    return torch.randn(*shape[:-1], 1).expand(shape).contiguous().to(DEVICE, dtype)


def huge(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """+-6e4: finite in float16, sums and squares are not."""
    return (torch.randn(*shape).sign() * 6e4).to(DEVICE, dtype)


def with_nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _with_one(float("nan"), shape, dtype)


def with_inf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return _with_one(float("inf"), shape, dtype)


def _with_one(value: float, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.randn(*shape)
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor.to(DEVICE, dtype)


REGIMES = (normal, far_from_zero, tiny, constant_rows, with_nan, with_inf)
