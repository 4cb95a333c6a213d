"""A sound op, and the same op with one fault each: what the conformance checks must catch."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.support.devices import INTERPRETING
from trilith.kernels._runtime.language import tl, triton
from trilith.plugins import Cost, OpSpec, Sample

EVERYWHERE = ("cpu", "cuda")


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """relu(x) * weight and its mean over rows; weight belongs to the columns."""
    x32, w32 = x.contiguous().float(), weight.contiguous().float()
    y = torch.relu(x32) * w32 * w32
    return y.to(x.dtype), y.mean(0).to(x.dtype)


def backward(ctx, dy, dmean):
    x, weight = (t.contiguous().float() for t in ctx.inputs)
    upstream = 0 if dy is None else dy.contiguous().float()
    upstream = upstream + (0 if dmean is None else dmean.contiguous().float() / x.shape[0])
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = (upstream * (x > 0) * weight * weight).to(ctx.inputs[0].dtype)
    if ctx.needs_input_grad[1]:
        dweight = (upstream * torch.relu(x) * 2 * weight).sum(0).to(ctx.inputs[1].dtype)
    return dx, dweight


def reference(x, weight):
    y = torch.relu(_wide(x)) * _wide(weight) * _wide(weight)
    return y.to(x.dtype), y.mean(0).to(x.dtype)


def samples(device, dtype):
    x = torch.randn(6, 5, device=device, dtype=dtype)
    yield Sample(x, torch.randn(5, device=device, dtype=dtype))
    yield Sample(x.t(), torch.randn(6, device=device))


def fake(x, weight):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:])


SOUND = OpSpec(
    name="faulty::op",
    forward=forward,
    backward=backward,
    reference=reference,
    samples=samples,
    outputs=2,
    materialize_grads=False,
    fake=fake,
    devices=EVERYWHERE,
)


def dense(tensor):
    """Reads a tensor as if it were contiguous, as a kernel without strides does."""
    available = tensor.untyped_storage().nbytes() // tensor.element_size()
    count = min(tensor.numel(), available - tensor.storage_offset())
    flat = torch.as_strided(tensor, (count,), (1,))
    missing = flat.new_zeros(tensor.numel() - count)
    return torch.cat([flat, missing]).view(tensor.shape)


def wrong_value(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    return y * 1.01, mean


def wrong_dtype(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    return y, mean.double()


def last_column_dropped(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    left = torch.empty_like(y)
    left[:, :-1] = y[:, :-1]
    return left, mean


def writes_beyond_its_output(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    wide = torch.empty_like(y)
    end = wide.storage_offset() + wide.numel()
    if wide.untyped_storage().nbytes() > end * wide.element_size():
        wide.as_strided((1,), (1,), end).zero_()
    return y, mean


@triton.jit
def _again_kernel(y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(y_ptr + offs))


def written_by_two_programs(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    if INTERPRETING:
        _again_kernel[(2,)](y, N=16)
    return y, mean


@triton.jit
def _read_kernel(x_ptr, N: tl.constexpr):
    tl.load(x_ptr + tl.arange(0, N))


def reads_beyond_its_input(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    if INTERPRETING:
        _read_kernel[(1,)](x, N=32)
    return forward(x, weight)


@triton.jit
def _count_kernel(y_ptr):
    tl.atomic_add(y_ptr, 0.0)


def adds_by_atomics(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    if INTERPRETING:
        _count_kernel[(2,)](y)
    return y, mean


_buffers: dict[torch.Size, Tensor] = {}


def output_in_a_buffer(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    return _buffers.setdefault(y.shape, torch.empty_like(y)).copy_(y), mean


def gradient_in_a_buffer(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    return _buffers.setdefault(dx.shape, torch.empty_like(dx)).copy_(dx), dweight


def aux_in_a_buffer(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    aux = _buffers.setdefault(weight.shape, torch.empty_like(weight, dtype=torch.float32))
    return *forward(x, weight), aux.copy_(weight)


def weight_from_aux(ctx, dy, dmean):
    x, weight = ctx.inputs
    return backward(replace(ctx, inputs=(x, ctx.aux[0].to(weight.dtype))), dy, dmean)


def fake_with_aux(x, weight):
    return *fake(x, weight), weight.new_empty(weight.shape, dtype=torch.float32)


_last: list[Tensor] = []


def remembers_the_last_weight(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    _last[:] = [weight]
    return forward(x, weight)


def with_the_last_weight(ctx, dy, dmean):
    return backward(replace(ctx, inputs=(ctx.inputs[0], _last[0])), dy, dmean)


def gradient_in_float32(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    return None if dx is None else dx.float(), dweight


def fake_in_float32(x, weight):
    return tuple(t.float() for t in fake(x, weight))


def writes_input(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    results = forward(x, weight)
    x.data.relu_()
    return results


def noisy(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    return y * (1 + 1e-6 * torch.rand_like(y)), mean


def input_read_as_dense(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return forward(x if x.shape[0] == 5 else dense(x), weight)


def weight_read_as_dense(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return forward(x, dense(weight))


def offsets_in_32_bits(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Reads x by row * stride in int32, as a kernel without a cast does."""
    stride = x.stride(0) if x.stride(0) < 2**31 else 0
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device) * stride
    columns = torch.arange(x.shape[1], device=x.device) * x.stride(1)
    start = x.storage_offset()
    flat = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return forward(flat[start + rows.long()[:, None] + columns], weight)


_count = [0]


def counts_calls(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    _count[0] += 1
    y, mean = forward(x, weight)
    return y * (1 + 0.01 * _count[0]), mean


def wrong_factor(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    return dx, None if dweight is None else dweight / 2


def ignores_upstream(ctx, dy, dmean):
    return backward(ctx, torch.ones_like(ctx.outputs[0]), None)


def offset(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    return None if dx is None else dx + 1, dweight


def weight_gradient_in_dtype_of_x(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    other = torch.float16 if ctx.inputs[1].dtype == torch.float32 else torch.float32
    return dx, None if dweight is None else dweight.to(other)


def writes_upstream(ctx, dy, dmean):
    results = backward(ctx, dy, dmean)
    if dy is not None:
        dy.data.mul_(2)
    return results


def writes_saved(ctx, dy, dmean):
    results = backward(ctx, dy, dmean)
    ctx.outputs[0].data.mul_(2)
    return results


def upstream_read_as_dense(ctx, dy, dmean):
    return backward(ctx, None if dy is None else dense(dy), dmean)


def gradient_row_unwritten(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    if dx is not None:
        written, dx = dx, torch.empty_like(dx)
        dx[1:] = written[1:]
    return dx, dweight


def noisy_gradient(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    return None if dx is None else dx * (1 + 1e-6 * torch.rand_like(dx)), dweight


def wrong_alone(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    return dx, dweight if dx is not None or dweight is None else dweight * 2


def overflows(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y, mean = forward(x, weight)
    return torch.where(y.abs() > 1e3, y.half().to(y.dtype), y), mean


def zero_rows_are_nan(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return forward(torch.where((x == 0).all(-1, keepdim=True), torch.nan, x), weight)


def overflows_for_large_weights(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return forward(x, weight.exp().log() if weight.dtype == torch.float32 else weight)


def overflows_for_large_weights_backward(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    large = ctx.inputs[1].abs().exp()
    return dx, None if dweight is None else dweight * (large / large)


def weight_gradient_rounded_to_the_dtype_of_x(ctx, dy, dmean):
    dx, dweight = backward(ctx, dy, dmean)
    dtype = ctx.inputs[0].dtype
    return dx, None if dweight is None else dweight.to(dtype).to(dweight.dtype)


def upstream_scaled_in_its_dtype(ctx, dy, dmean):
    return backward(ctx, None if dy is None else 8 * dy / 8, dmean)


def intermediate_in_the_dtype_of_x(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return forward((4 * x) / 4, weight)


def weight_taken_for_the_dtype_of_x(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return forward(x, weight if weight.dtype == x.dtype else weight.round())


def needs_both_outputs(ctx, dy, dmean):
    if dy is None or dmean is None:
        return None, None
    return backward(ctx, dy, dmean)


def reference_with_nan_when_empty(x, weight):
    y, mean = reference(x, weight)
    return y + 0 * weight.sum() * (x.shape[-1] / max(x.shape[0], 1e-300)), mean


def reference_detached(x, weight):
    y, mean = reference(x, weight)
    return y, mean.detach() + 0 * x.sum()


def reference_in_place(x, weight):
    return reference(x if x.requires_grad else x.relu_(), weight)


def reference_that_branches(x, weight):
    return reference(x, weight) if x.sum() < 1e30 else (x, weight)


# Torch 2.11's opcheck does not compare the strides of fakes.
OPCHECK_OF_STRIDES = [] if torch.__version__.startswith("2.11.") else ["opcheck"]


def fake_transposed(x, weight):
    return x.new_empty(x.shape[::-1]).mT, x.new_empty(x.shape[-1:])


def fake_of_another_shape(x, weight):
    return x.new_empty(x.shape), x.new_empty(x.shape[:1])


def fake_with_sizes_fixed(x, weight):
    rows, columns = (int(n) for n in x.shape)
    if not isinstance(x.shape[0], int):
        raise TypeError("sizes must be numbers")
    return x.new_empty(rows, columns), x.new_empty(columns)


def fake_that_reads(x, weight):
    return x.new_empty(x.shape), x.new_empty(int(weight.numel() + 0 * weight.sum().item()))


def cost_in_elements(x, weight):
    return Cost(x.numel() + weight.numel(), 2 * x.numel())


def mean_as_a_sum(x, weight):
    """Rows split: the mean of all of them is not the sum of the ranks' means."""
    from torch.distributed.tensor import Partial, Shard

    return [([Shard(0), Partial()], [Shard(0)])]


def weight_whole_beside_split_columns(x, weight):
    from torch.distributed.tensor import Shard

    return [([Shard(1), Shard(0)], [Shard(1)])]


# Faults by name: the spec with the fault, and the checks that must each catch it.
FAULTS = {
    f.__name__: (replace(SOUND, **{part: f}), checks)
    for part, f, checks in [
        ("forward", wrong_value, ["forward_matches_reference"]),
        ("forward", wrong_dtype, ["forward_matches_reference"]),
        ("forward", last_column_dropped, ["every_element_is_written"]),
        ("forward", writes_beyond_its_output, ["guard_bands"]),
        ("forward", written_by_two_programs, ["writes_are_disjoint"]),
        ("forward", overflows, ["regimes"]),
        ("forward", intermediate_in_the_dtype_of_x, ["regimes_in_16_bits"]),
        ("forward", weight_taken_for_the_dtype_of_x, ["mixed_dtypes"]),
        ("forward", zero_rows_are_nan, ["regimes"]),
        ("forward", overflows_for_large_weights, ["regimes_of_others"]),
        ("forward", reads_beyond_its_input, ["reads_stay_inside"]),
        ("forward", adds_by_atomics, ["writes_are_disjoint"]),
        ("forward", output_in_a_buffer, ["calls_are_apart"]),
        ("forward", writes_input, ["nothing_is_written_to"]),
        ("forward", noisy, ["runs_are_bit_equal"]),
        ("forward", input_read_as_dense, ["input_layouts"]),
        ("forward", weight_read_as_dense, ["input_layouts"]),
        ("forward", offsets_in_32_bits, ["offsets_beyond_32_bits"]),
        ("forward", counts_calls, ["runs_are_bit_equal", "inference_mode", "autocast"]),
        ("backward", wrong_factor, ["gradients_match_reference", "functorch_transforms"]),
        ("backward", ignores_upstream, ["gradients_match_reference", "backward_twice"]),
        ("backward", gradient_in_a_buffer, ["backward_twice", "calls_are_apart"]),
        ("backward", gradient_in_float32, ["fakes_are_exact"]),
        ("backward", offset, ["gradients_match_reference", "backward_twice"]),
        ("backward", weight_gradient_in_dtype_of_x, ["fakes_are_exact"]),
        ("backward", weight_gradient_rounded_to_the_dtype_of_x, ["mixed_dtypes"]),
        ("backward", overflows_for_large_weights_backward, ["regimes_of_others"]),
        ("backward", upstream_scaled_in_its_dtype, ["regimes_in_16_bits"]),
        ("backward", writes_upstream, ["nothing_is_written_to"]),
        ("backward", writes_saved, ["nothing_is_written_to"]),
        ("backward", upstream_read_as_dense, ["upstream_layouts"]),
        ("backward", gradient_row_unwritten, ["every_element_is_written"]),
        ("backward", noisy_gradient, ["runs_are_bit_equal", "backward_twice", "checkpointing"]),
        ("backward", wrong_alone, ["gradient_subsets"]),
        ("backward", needs_both_outputs, ["unused_outputs"]),
        ("reference", reference_with_nan_when_empty, ["empty_tensors"]),
        ("reference", reference_detached, ["gradients_match_reference"]),
        ("reference", reference_that_branches, ["functorch_transforms"]),
        ("reference", reference_in_place, ["nothing_is_written_to"]),
        ("cost", cost_in_elements, ["cost_is_sound"]),
        ("sharding", mean_as_a_sum, ["shards_agree"]),
        ("sharding", weight_whole_beside_split_columns, ["shards_agree"]),
        ("fake", fake_in_float32, ["fakes_are_exact"]),
        ("fake", fake_transposed, ["fakes_are_exact", *OPCHECK_OF_STRIDES]),
        ("fake", fake_of_another_shape, ["fakes_are_exact", "opcheck"]),
        ("fake", fake_with_sizes_fixed, ["compiles_dynamic"]),
        ("fake", fake_that_reads, ["compiles", "compiles_with_inductor"]),
    ]
}
FAULTS["saves_too_little"] = (replace(SOUND, save_inputs=("weight",)), ["double_backward"])
FAULTS["aux_in_a_buffer"] = (
    replace(SOUND, forward=aux_in_a_buffer, backward=weight_from_aux, fake=fake_with_aux),
    ["calls_are_apart"],
)
FAULTS["state_beside_the_call"] = (
    replace(SOUND, forward=remembers_the_last_weight, backward=with_the_last_weight),
    ["calls_are_apart"],
)
