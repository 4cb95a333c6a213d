"""Plugins that are wrong, one fault each, and what must catch them: the loader or a check, by name.

`OPS` maps a fault to an OpSpec and the check; `PLUGINS` one to a plugin and the loader's stage.
All ops compute y = relu(x) * weight, with one weight a column, but for the masked and the centred
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trilith.kernels import launch
from trilith.kernels._runtime.language import tl, triton
from trilith.plugins import TRITON_DEVICES, Cost, Implementation, OpSpec, Sample, hookimpl

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


def result_is_an_input(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """As an op in place would: right where it can be, and the caller's x is the result."""
    return (x.data.copy_(forward(x, weight)[0]),)


def aux_is_no_tensor(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    return (*forward(x, weight), None)


def wrong_in_bfloat16_only(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    (y,) = forward(x, weight)
    return (1.05 * y if x.dtype == torch.bfloat16 else y,)


def sums_in_its_own_dtype(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Exact, until x + x is no number of float16 any more."""
    mean = (x + x).float() / 2
    return ((torch.relu(mean) * weight.float()).to(x.dtype).contiguous(),)


def wrong_for_strided_inputs_only(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    (y,) = forward(x, weight)
    return (y if x.is_contiguous() else 1.05 * y,)


def reads_past_the_end(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """As an unmasked load does; what it reads enters times 0, so that only a NaN shows."""
    (y,) = forward(x, weight)
    end = x.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))  # noqa: B905
    if x.untyped_storage().nbytes() > end * x.element_size():
        y = y + 0 * x.as_strided((1,), (1,), end)
    return (y,)


def wrong_dtype_from_fake(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape, dtype=torch.float64),)


def gradient_left_out(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return backward(ctx, dy)[0], None


def upstream_gradient_mutated(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    gradients = backward(ctx, dy)
    dy.data.mul_(2)
    return gradients


def more_gradients_than_parameters(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    return (*backward(ctx, dy), dy)


def cost_of_elements(x: Tensor, weight: Tensor) -> Cost:
    """Counts elements, where bytes are asked for."""
    return Cost(x.numel(), 2 * x.numel())


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
        ("forward", result_is_an_input, "fakes_are_exact"),
        ("forward", aux_is_no_tensor, "fakes_are_exact"),
        ("forward", wrong_in_bfloat16_only, "forward_matches_reference"),
        ("forward", sums_in_its_own_dtype, "regimes_in_16_bits"),
        ("forward", wrong_for_strided_inputs_only, "input_layouts"),
        ("forward", reads_past_the_end, "guard_bands"),
        ("fake", wrong_dtype_from_fake, "fakes_are_exact"),
        ("backward", gradient_left_out, "gradients_match_reference"),
        ("backward", upstream_gradient_mutated, "nothing_is_written_to"),
        ("backward", more_gradients_than_parameters, "gradients_match_reference"),
        ("cost", cost_of_elements, "cost_is_sound"),
    ]
}
OPS["mask_mismatch"] = (
    replace(MASK_MISMATCH, name="negative::mask_mismatch"),
    "gradients_match_reference",
)


def centred(x: Tensor) -> tuple[Tensor, ...]:
    wide = x.float()
    return ((wide - wide.mean(-1, keepdim=True)).to(x.dtype).contiguous(),)


def centred_reference(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide - wide.mean(-1, keepdim=True)).to(x.dtype)


def centred_samples(device: torch.device, dtype: torch.dtype) -> Any:
    yield Sample(torch.randn(6, 5, device=device, dtype=dtype))


def any_dimension(x: Tensor) -> list[Any]:
    """The last one too, of which a rank would take the mean of its own share."""
    from torch.distributed.tensor import Shard

    return [([Shard(dim)], [Shard(dim)]) for dim in range(x.ndim)]


OPS["sharded_along_what_it_reduces"] = (
    replace(
        SOUND,
        name="negative::sharded_along_what_it_reduces",
        forward=centred,
        backward=lambda ctx, dy: centred(dy),
        reference=centred_reference,
        samples=centred_samples,
        fake=lambda x: (x.new_empty(x.shape),),
        sharding=any_dimension,
    ),
    "shards_agree",
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


class Stopped(BaseException):
    """No Exception, so that `except Exception` lets it through."""


def stops() -> Any:
    raise Stopped("no licence")


class Answering:
    """A plugin whose hooks return what they are given."""

    def __init__(self, ops: Any = (), implementations: Callable[[], Any] = list) -> None:
        self._ops, self._implementations = ops, implementations

    @hookimpl
    def trilith_register_ops(self) -> Any:
        return self._ops() if callable(self._ops) else self._ops

    @hookimpl
    def trilith_register_implementations(self) -> Any:
        return self._implementations()


def implementing(**fields: Any) -> Callable[[], Any]:
    """Another implementation of the sound op, in which these fields are wrong."""
    pair = {"forward": forward, "backward": backward, "devices": EVERYWHERE}
    given: dict[str, Any] = {"op": SOUND.name, "provider": "other", **pair, **fields}
    return lambda: Answering(implementations=lambda: [Implementation(**given)])


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
    "base_exception": (stops, "import", "Stopped: no licence"),
    "hook_returns_nothing": (
        lambda: Answering(lambda: None),
        "trilith_register_ops",
        "must return a sequence of OpSpec or Op, got None",
    ),
    "hook_returns_a_string": (
        lambda: Answering("negative::op"),
        "trilith_register_ops",
        "must return a sequence of OpSpec or Op, got 'negative::op'",
    ),
    "hook_returns_one_spec": (
        lambda: Answering(lambda: replace(SOUND, name="negative::one")),
        "trilith_register_ops",
        "must return a sequence of OpSpec or Op, got OpSpec(",
    ),
    "op_twice_in_one_plugin": (
        lambda: Answering([replace(SOUND, name="negative::twice")] * 2),
        "trilith_register_ops",
        "negative::twice of bad:op_twice_in_one_plugin is already defined",
    ),
    "op_without_a_namespace": (
        lambda: Answering(lambda: [replace(SOUND, name="relu2")]),
        "trilith_register_ops",
        "name must be 'namespace::op', got 'relu2'",
    ),
    "reference_that_is_no_function": (
        lambda: Answering(lambda: [replace(SOUND, name="negative::x", reference=None)]),
        "trilith_register_ops",
        "negative::x: reference must be a function, got None",
    ),
    "implementation_with_other_parameters": (
        implementing(forward=lambda x: (x,)),
        "trilith_register_implementations",
        "provider 'other' must take the parameters (x: torch.Tensor, weight: torch.Tensor)",
    ),
    "implementation_without_backward": (
        implementing(backward=None),
        "trilith_register_implementations",
        "provider 'other' must bring forward and backward as a pair",
    ),
    "devices_that_are_a_string": (
        implementing(devices="cuda"),
        "trilith_register_implementations",
        "devices must be a tuple of str, got 'cuda'",
    ),
    "arch_that_is_a_number": (
        implementing(arch=90),
        "trilith_register_implementations",
        "arch must be like (80, 89) or (90, None), got 90",
    ),
    "name_clash": (
        lambda: Bringing(SOUND),
        "trilith_register_ops",
        "negative::sound of bad:name_clash is already defined by good:sound",
    ),
}
