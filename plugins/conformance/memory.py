"""Checks of memory: layouts, offsets, what is written and what must not be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trilith.plugins.conformance.compare import assert_bits, poisoned
from trilith.plugins.conformance.layouts import EXPANDED, LAYOUTS, contiguous, far_apart
from trilith.plugins.conformance.support import (
    as_tuple,
    assert_all_same,
    both,
    both_of,
    bound,
    differentiable,
    fixed_upstream,
    floating,
    gradients_of,
    has_gradient,
    name_of,
    named_check,
    tensors_of,
    with_grad,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample


@named_check
def input_layouts(op: Op, sample: Sample) -> None:
    """Every tensor in every layout, several of them in different ones at a time."""
    args = bound(op, sample)
    inputs = floating(args)
    upstream = fixed_upstream(op, args)
    names = [name_of(op, i) for i in range(len(args))]
    for what, moved, plain in _arrangements(args, tensors_of(args), names):
        if plain is not None:
            expected = both(op, plain, upstream)
        actual = both(op, moved, upstream)
        equal = [t for t in moved if isinstance(t, Tensor) and 0 in t.stride()]
        assert_all_same(what, op, inputs, actual, expected, upstream, cancelling=equal)


def _arrangements(
    tensors: Sequence[Any], chosen: Sequence[int], names: Sequence[str]
) -> Iterator[tuple[str, list[Any], list[Any] | None]]:
    """A description, the tensors in other layouts, and contiguous ones when values are new."""
    dense = [contiguous(t) if i in chosen else t for i, t in enumerate(tensors)]
    plain: list[Any] | None = dense
    layouts = LAYOUTS[1:]
    for turn in range(len(layouts)):
        picked = {i: layouts[(turn + k) % len(layouts)] for k, i in enumerate(chosen)}
        moved = [picked[i](t) if i in picked else t for i, t in enumerate(dense)]
        yield ", ".join(f"{names[i]} {f.__name__}" for i, f in picked.items()), moved, plain
        plain = None
    for spread in EXPANDED:
        moved = [spread(t) if i in chosen else t for i, t in enumerate(dense)]
        plain = [contiguous(t) if i in chosen else t for i, t in enumerate(moved)]
        yield f"{', '.join(names[i] for i in chosen)} {spread.__name__}", moved, plain


@named_check
def upstream_layouts(op: Op, sample: Sample) -> None:
    """The same for the gradients of the outputs."""
    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    inputs = floating(args)
    upstream = fixed_upstream(op, args)
    chosen = floating(upstream)
    names = [f"gradient of output {i}" for i in range(len(upstream))]
    for what, moved, plain in _arrangements(upstream, chosen, names):
        if plain is not None:
            expected = gradients_of(op, args, plain)
        assert_all_same(what, op, inputs, gradients_of(op, args, moved), expected, moved)


@named_check
def offsets_beyond_32_bits(op: Op, sample: Sample, device: torch.device) -> None:
    """Every tensor and gradient with 2**31 elements between its ends, one dimension at a time."""
    try:
        _check_far_apart(op, bound(op, sample))
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _check_far_apart(op: Op, args: list[Any]) -> None:
    inputs = floating(args)
    dense = [contiguous(a) if i in tensors_of(args) else a for i, a in enumerate(args)]
    upstream = [contiguous(g) for g in fixed_upstream(op, args)]
    expected = both(op, dense, upstream)
    for i, dim, moved in _far_apart(dense):
        what = f"dimension {dim} of {name_of(op, i)} over 2**31 elements"
        assert_all_same(what, op, inputs, both(op, moved, upstream), expected, upstream)
    if not has_gradient(op, args):
        return
    for i, dim, moved in _far_apart(upstream):
        what = f"dimension {dim} of the gradient of output {i} over 2**31 elements"
        assert_all_same(what, op, inputs, gradients_of(op, dense, moved), expected, upstream)


def _far_apart(tensors: Sequence[Any]) -> Iterator[tuple[int, int, list[Any]]]:
    for i in tensors_of(tensors):
        for dim, size in enumerate(tensors[i].shape):
            far = far_apart(tensors[i], dim) if size > 1 else None
            if far is not None:
                yield i, dim, [far if j == i else t for j, t in enumerate(tensors)]


@named_check
def nothing_is_written_to(op: Op, sample: Sample) -> None:
    """Inputs, gradients of outputs, outputs and saved tensors keep their values; inputs of the
    reference too, which runs where no kernel does."""
    args = bound(op, sample)
    inputs = [(f"input {name_of(op, i)}", a) for i, a in enumerate(args) if isinstance(a, Tensor)]
    before = [(what, t, t.clone()) for what, t in inputs]
    op.spec.reference(*args)
    for what, tensor, copy in before:
        assert_bits(f"by the reference, {what}", tensor, copy)
    upstream = fixed_upstream(op, args)
    before += [(f"gradient of output {i}", g, g.clone()) for i, g in enumerate(upstream)]

    def pack(tensor: Tensor) -> Tensor:
        before.append(("a saved tensor", tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        leaves = with_grad(args, floating(args) if has_gradient(op, args) else [])
        outputs = as_tuple(op(*leaves))
    before += [(f"output {i}", o, o.detach().clone()) for i, o in enumerate(outputs)]
    used = differentiable(outputs)
    if used:
        torch.autograd.backward([outputs[i] for i in used], [upstream[i] for i in used])
    for what, tensor, copy in before:
        assert_bits(what, tensor, copy)


@named_check
def every_element_is_written(op: Op, sample: Sample) -> None:
    args = bound(op, sample)
    upstream = fixed_upstream(op, args)
    expected = both_of(op.spec.reference, op, args, upstream)
    with poisoned():
        actual = both_of(op, op, args, upstream)
    names = [f"output {i}" for i in range(op.spec.outputs)]
    names += [f"gradient of {name_of(op, i)}" for i in floating(args)]
    for what, a, e in zip(
        names, [*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True
    ):
        unwritten = a.isnan() & ~e.isnan()
        assert not unwritten.any(), (
            f"{what}: {int(unwritten.sum())} of {a.numel()} elements come from memory that "
            "nothing wrote"
        )
