"""Plugins that are wrong, one fault each, and what must catch them: the loader or a check, by name.

`OPS` maps a fault to an OpSpec and the check; `PLUGINS` one to a plugin and the loader's stage.
All ops compute y = relu(x) * weight, with one weight a column, but for the masked one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trilith.kernels import launch
from trilith.kernels._runtime.language import tl, triton
from trilith.plugins import TRITON_DEVICES, OpSpec, Sample, hookimpl

EVERYWHERE = ("cpu", "cuda")


def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return ((torch.relu(x.float()) * weight.float()).to(x.dtype).contiguous(),)


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    x, weight = ctx.inputs
    dx = dy.float() * (x > 0) * weight.float()
    dweight = (dy.float() * torch.relu(x.float())).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (torch.relu(x.to(wide)) * weight.to(wide)).to(x.dtype)


def samples(device: torch.device, dtype: torch.dtype) -> Any:
    yield Sample(
        torch.randn(6, 5, device=device, dtype=dtype), torch.randn(5, device=device, dtype=dtype)
    )
    yield Sample(torch.randn(4, 7, device=device, dtype=dtype), torch.randn(7, device=device))


def fake(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape),)


SOUND = OpSpec(
    name="negative::sound",
    forward=forward,
    backward=backward,
    reference=reference,
    samples=samples,
    fake=fake,
    devices=EVERYWHERE,
)


def wrong_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    dx, dweight = backward(ctx, dy)
    return 1.01 * dx, dweight


def grad_ignoring_upstream(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    return backward(ctx, torch.ones_like(dy))


def wrong_dtype_of_a_weight_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    dx, dweight = backward(ctx, dy)
    return dx, dweight.to(torch.float64)


def saved_tensor_overwritten(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    gradients = backward(ctx, dy)
    ctx.inputs[0].data.copy_(gradients[0])
    return gradients


def backward_wrong_for_stride_0_grads(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    """Reads dy as if it were contiguous: beyond a stride-0 tensor's memory there are zeros here."""
    held = dy.untyped_storage().nbytes() // dy.element_size() - dy.storage_offset()
    read = torch.zeros(dy.numel(), dtype=dy.dtype, device=dy.device)
    count = min(held, dy.numel())
    read[:count] = torch.as_strided(dy, (count,), (1,))
    return backward(ctx, read.view(dy.shape))


def wrong_stride_from_fake(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[::-1]).mT,)


def input_mutated(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    results = forward(x, weight)
    x.data.relu_()
    return results


def output_not_fully_written(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    (right,) = forward(x, weight)
    y = torch.empty_like(right)
    y.view(-1)[:-1] = right.view(-1)[:-1]
    return (y,)


def nondeterministic(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    (y,) = forward(x, weight)
    return (y * (1 + 1e-6 * torch.rand_like(y, dtype=torch.float32)).to(y.dtype),)


def _mask(x: Tensor, seed: Tensor, shift: int = 0) -> Tensor:
    position = torch.arange(x.numel(), device=x.device).view(x.shape)
    return ((position + shift + seed) * 2654435761).remainder(2**32) < 2**31


def masked(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return ((x * _mask(x, seed)).contiguous(),)


def mask_mismatch(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    x, seed = ctx.inputs
    return (dy * _mask(x, seed, shift=1),)


def masked_samples(device: torch.device, dtype: torch.dtype) -> Any:
    yield Sample(torch.randn(6, 5, device=device, dtype=dtype), torch.tensor([3], device=device))


MASK_MISMATCH = replace(
    SOUND,
    forward=masked,
    backward=mask_mismatch,
    reference=lambda x, seed: x * _mask(x, seed),
    samples=masked_samples,
    fake=lambda x, seed: (x.new_empty(x.shape),),
)

OPS: dict[str, tuple[OpSpec, str]] = {
    wrong.__name__: (
        replace(SOUND, name=f"negative::{wrong.__name__}", **{part: wrong}),
        check,
    )
    for part, wrong, check in [
        ("backward", wrong_gradient, "gradients_match_reference"),
        ("backward", grad_ignoring_upstream, "gradients_match_reference"),
        ("backward", wrong_dtype_of_a_weight_gradient, "fakes_are_exact"),
        ("backward", saved_tensor_overwritten, "nothing_is_written_to"),
        ("backward", backward_wrong_for_stride_0_grads, "upstream_layouts"),
        ("fake", wrong_stride_from_fake, "fakes_are_exact"),
        ("forward", input_mutated, "nothing_is_written_to"),
        ("forward", output_not_fully_written, "every_element_is_written"),
        ("forward", nondeterministic, "runs_are_bit_equal"),
    ]
}
OPS["mask_mismatch"] = (
    replace(MASK_MISMATCH, name="negative::mask_mismatch"),
    "gradients_match_reference",
)


BLOCK = 16


@triton.jit
def _rows_kernel(x_ptr, weight_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + offs, mask=offs < N, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    y = tl.where(x <= 0.0, 0.0, x) * weight
    tl.store(y_ptr + row * N + offs, y, mask=offs < N)


def int32_overflow(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The kernel multiplies a 32-bit program id by a stride."""
    y = x.new_empty(x.shape)
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, columns = x.shape
    args = (x, weight.contiguous(), y, x.stride(0), columns)
    launch(_rows_kernel, (rows,), *args, BLOCK=BLOCK)
    return (y,)


OPS["int32_overflow"] = (
    replace(SOUND, name="negative::int32_overflow", forward=int32_overflow, devices=TRITON_DEVICES),
    "offsets_beyond_32_bits",
)


class Bringing:
    """A plugin that brings one op."""

    def __init__(self, spec: OpSpec) -> None:
        self._spec = spec

    @hookimpl
    def trilith_register_ops(self) -> list[OpSpec]:
        return [self._spec]


class Misspelt(Bringing):
    """The op is lost, and nobody would be told."""

    @hookimpl
    def trilith_register_module(self) -> list[Any]:
        return []


class Unmarked:
    """pluggy would pass over it without a word."""

    def trilith_register_ops(self) -> list[OpSpec]:
        return [SOUND]


def broken_import() -> Any:
    from trilith import a_name_that_does_not_exist

    return a_name_that_does_not_exist


PLUGINS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "broken_import": (broken_import, "import", "a_name_that_does_not_exist"),
    "misspelt_hook": (
        lambda: Misspelt(replace(SOUND, name="negative::lost")),
        "hooks",
        "trilith_register_module",
    ),
    "unmarked_hook": (Unmarked, "hooks", "must be marked"),
    "name_clash": (
        lambda: Bringing(SOUND),
        "trilith_register_ops",
        "negative::sound of bad:name_clash is already defined by good:sound",
    ),
}
