"""Kernels that the ahead-of-time survey must object to, and one that it must not."""

# ruff: noqa: ANN001, ANN201
import torch
from torch import Tensor

from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch
from trilith.plugins import OpSpec, Sample, registry


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    y = tl.load(x_ptr + BLOCK + offs).to(tl.float32)
    total = tl.sum(x * y, 0)
    tl.store(y_ptr + offs, x * total + y)


@triton.jit
def sharing_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(64):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + offs)
        acc = tl.dot(x, tl.trans(x), acc)
    tl.store(y_ptr + offs, acc)


@triton.jit
def unfit_dot_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x))


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def _forward(x: Tensor, kernel: str) -> tuple[Tensor, ...]:
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if kernel == "copy":
        launch(copy_kernel, (1,), x, y, x.numel(), BLOCK=1024, num_warps=4)
    elif kernel == "spilling":
        launch(spilling_kernel, (1,), x, y, BLOCK=32768, num_warps=4)
    elif kernel == "sharing":
        launch(sharing_kernel, (1,), x, y, BLOCK=128, num_warps=8, num_stages=8)
    elif kernel == "unfit_dot":
        launch(unfit_dot_kernel, (1,), x, y, BLOCK=32, num_warps=4)
    elif kernel == "broken":
        launch(broken_kernel, (1,), x, BLOCK=64)
    else:
        raise ValueError("refused")
    return (y,)


def cases():
    name = "faulty::kernels"
    if name not in registry.op_names():
        registry.add_op(
            OpSpec(
                name=name,
                forward=_forward,
                backward=None,
                reference=lambda x, kernel: x.float(),
                samples=lambda device, dtype: [],
            )
        )
    x = torch.empty(128 * 128, dtype=torch.bfloat16)
    yield name, Sample(x, "copy")
    yield name, Sample(x[:4096], "copy")
    yield name, Sample(x[1:4097], "copy")
    for kernel in ("spilling", "sharing", "unfit_dot", "broken", "unknown"):
        yield name, Sample(x, kernel)
