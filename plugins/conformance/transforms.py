"""Checks of PyTorch around an op: functorch, fake tensors, compile, autocast, checkpoint."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trilith.plugins.conformance.compare import assert_bits, assert_same, is_differentiable
from trilith.plugins.conformance.support import (
    as_tuple,
    assert_all_same,
    backward_arguments,
    both,
    both_of,
    bound,
    fixed_upstream,
    floating,
    gradients_of,
    has_gradient,
    largest,
    name_of,
    named_check,
    replaced,
    tensors_of,
)
from trilith.plugins.op import Op
from trilith.plugins.spec import Sample


@named_check
def functorch_transforms(op: Op, sample: Sample) -> None:
    """torch.func.grad and vmap give what plain calls give."""
    args = bound(op, sample)
    inputs = floating(args)
    if not inputs:
        return

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(op(*replaced(args, inputs, tensors)))

    own = tuple(args[i] for i in inputs)
    others = tuple(t.flip(0) if t.ndim else 2 * t for t in own)
    stacked = tuple(torch.stack(pair) for pair in zip(own, others, strict=True))
    for i, (batched, *plain) in enumerate(
        zip(torch.vmap(call)(*stacked), call(*own), call(*others), strict=True)
    ):
        assert_same(f"output {i} under vmap", batched, torch.stack(plain))
    if not has_gradient(op, args):
        return
    upstream = fixed_upstream(op, args)
    outputs, plain = gradients_of(op, args, upstream)
    used = [i for i, o in enumerate(outputs) if is_differentiable(o)]

    def scalar(*tensors: Tensor) -> Tensor:
        results = call(*tensors)
        products = [(results[i].float() * upstream[i].float()).sum() for i in used]
        return functools.reduce(torch.add, products)

    found = torch.func.grad(scalar, argnums=tuple(range(len(own))))(*own)
    for i, f, p in zip(inputs, found, plain, strict=True):
        what = f"gradient of {name_of(op, i)} under torch.func.grad"
        assert_same(what, f, p, largest(upstream))


@named_check
def fakes_are_exact(op: Op, sample: Sample) -> None:
    """Shapes, dtypes and strides of what the ops return, and of what their fakes say.

    None shares memory with an input, the reference's neither: where no kernel runs it is a result.
    """
    args = bound(op, sample)
    _require_fresh_tensors(op, args, as_tuple(op.spec.reference(*args)), "the reference's output")
    provider = op.choose(*args)
    if provider is None:
        return
    _require_fresh_tensors(op, args, op.torch_ops.run_forward(*args, provider), "forward result")
    for i, gradient in require_exact_fakes(op, args).items():
        what, like = f"gradient of {name_of(op, i)}", args[i]
        assert gradient.dtype == like.dtype, f"{what}: dtype {gradient.dtype}, not {like.dtype}"
        assert gradient.shape == like.shape, f"{what}: shape {gradient.shape}, not {like.shape}"


def require_exact_fakes(op: Op, args: Sequence[Any]) -> dict[int, Tensor]:
    """That results are as their fakes say; the gradients that backward gives, by position."""
    provider = op.choose(*args)
    if provider is None:
        return {}
    results = op.torch_ops.forward(*args, provider)
    names = [f"forward result {i}" for i in range(len(results))]
    _compare_with_fake(names, op.torch_ops.forward, (*args, provider), results)
    if not has_gradient(op, args):
        return {}
    outputs = results[: op.spec.outputs]
    grads = [torch.randn_like(o) if is_differentiable(o) else None for o in outputs]
    call = backward_arguments(op, args, provider, results, grads)
    gradients = op.torch_ops.backward(*call)
    asked = [i for i, ask in enumerate(call[-1]) if ask]
    names = [f"gradient of {name_of(op, i)}" for i in asked]
    _compare_with_fake(names, op.torch_ops.backward, call, gradients)
    return dict(zip(asked, gradients, strict=True))


def _require_fresh_tensors(op: Op, args: Sequence[Any], results: Sequence[Any], kind: str) -> None:
    at_least = op.spec.outputs
    assert len(results) >= at_least, (
        f"forward must return {at_least} outputs, then aux, got {len(results)} results"
    )
    owners = {args[i].untyped_storage().data_ptr(): name_of(op, i) for i in tensors_of(args)}
    for i, result in enumerate(results):
        assert isinstance(result, Tensor), f"{kind} {i} must be a tensor, got {result!r}"
        owner = owners.get(result.untyped_storage().data_ptr()) if result.numel() else None
        assert owner is None, f"{kind} {i} must have memory of its own, it shares {owner}'s"


def _compare_with_fake(
    names: Sequence[str], function: Any, args: Sequence[Any], real: Sequence[Tensor]
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = function(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, tuple(args)))
    kind = names[0].partition(" ")[0] if names else "forward"
    assert len(fake) == len(real), f"{kind} gives {len(real)}, the fake says {len(fake)}"
    for what, f, r in zip(names, fake, real, strict=True):
        for aspect in ("shape", "dtype", "device"):
            said, is_ = getattr(f, aspect), getattr(r, aspect)
            assert said == is_, f"{what}: {aspect} {is_}, the fake says {said}"
        assert f.stride() == r.stride(), (
            f"{what} of shape {tuple(r.shape)}: strides {r.stride()}, the fake says {f.stride()}"
        )


_WITHOUT_COMPARING = (
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@named_check
def opcheck(op: Op, sample: Sample) -> None:
    """torch.library.opcheck on the forward and the backward op."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in bound(op, sample)]
    provider = op.choose(*args)
    if provider is None:
        return
    _opcheck(op.torch_ops.forward, (*args, provider))
    if not has_gradient(op, args):
        return
    results = op.torch_ops.forward(*args, provider)
    grads = [torch.randn_like(o) if is_differentiable(o) else None for o in results]
    call = backward_arguments(op, args, provider, results, grads[: op.spec.outputs])
    _opcheck(op.torch_ops.backward, call)


def _opcheck(torch_op: Any, args: tuple[Any, ...]) -> None:
    """Floats of 8 bits are left to `nothing_is_written_to`: opcheck adds and multiplies to compare
    before and after."""
    stored = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    if all(map(is_differentiable, stored)):
        torch.library.opcheck(torch_op, args)
    else:
        torch.library.opcheck(torch_op, args, test_utils=_WITHOUT_COMPARING)


def _compiled_equals_eager(op: Op, sample: Sample, **options: Any) -> None:
    args = bound(op, sample)
    inputs = floating(args)
    upstream = fixed_upstream(op, args)

    def call(*tensors: Any) -> tuple[Tensor, ...]:
        return as_tuple(op(*replaced(args, inputs, tensors)))

    def eager(*every: Any) -> tuple[Tensor, ...]:
        return call(*[every[i] for i in inputs])

    torch._dynamo.reset()
    compiled_call = torch.compile(call, fullgraph=True, **options)

    def compiled(*every: Any) -> tuple[Tensor, ...]:
        return compiled_call(*[every[i] for i in inputs])

    with torch.no_grad():
        expected, actual = eager(*args), compiled(*args)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"compiled output {i} without gradients", a, e)
    if has_gradient(op, args):
        found, wanted = (gradients_of(f, args, upstream) for f in (compiled, eager))
        assert_all_same("compiled", op, inputs, found, wanted, upstream)
    torch._dynamo.reset()


@named_check
def compiles(op: Op, sample: Sample) -> None:
    """torch.compile(fullgraph=True) up to the backend's input, static shapes."""
    _compiled_equals_eager(op, sample, dynamic=False, backend="aot_eager")


@named_check
def compiles_dynamic(op: Op, sample: Sample) -> None:
    """The same with every size a symbol."""
    _compiled_equals_eager(op, sample, dynamic=True, backend="aot_eager")


def has_cpp_compiler() -> bool:
    """Whether Inductor finds what it compiles CPU code with."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


@named_check
def compiles_with_inductor(op: Op, sample: Sample, device: torch.device) -> None:
    """Without Inductor's caches on disk: their keys do not see that a fake has changed.

    Passed over for CPU tensors where there is no C++ compiler.
    """
    import torch._inductor.config as inductor

    if device.type == "cpu" and not has_cpp_compiler():
        return
    with inductor.patch(force_disable_caches=True):
        _compiled_equals_eager(op, sample, dynamic=False, backend="inductor")


@named_check
def autocast(op: Op, sample: Sample, device: torch.device) -> None:
    """Under autocast to bfloat16 the op does what its spec says, inputs' gradients included."""
    args = bound(op, sample)
    inputs = floating(args)
    lowered = args
    if op.spec.autocast == "low":
        low = [i for i in inputs if args[i].dtype != torch.float64]
        lowered = replaced(args, low, [args[i].to(torch.bfloat16) for i in low])
    upstream = fixed_upstream(op, lowered)

    def cast(*every: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return op(*every)

    actual = both_of(cast, op, args, upstream)
    outputs, gradients = both(op, lowered, upstream)
    gradients = [g.to(args[i].dtype) for i, g in zip(inputs, gradients, strict=True)]
    assert_all_same("under autocast", op, inputs, actual, (outputs, gradients), upstream)


@named_check
def checkpointing(op: Op, sample: Sample) -> None:
    """Recomputing the forward in backward gives the same bits."""
    from torch.utils.checkpoint import checkpoint

    args = bound(op, sample)
    if not has_gradient(op, args):
        return
    upstream = fixed_upstream(op, args)
    _, expected = gradients_of(op, args, upstream)
    _, actual = gradients_of(lambda *a: checkpoint(op, *a, use_reentrant=False), args, upstream)
    for i, a, e in zip(floating(args), actual, expected, strict=True):
        assert_bits(f"gradient of {name_of(op, i)} by recomputation", a, e)


@named_check
def inference_mode(op: Op, sample: Sample) -> None:
    args = bound(op, sample)
    expected = as_tuple(op(*args))
    with torch.inference_mode():
        actual = as_tuple(op(*args))
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_same(f"output {i} in inference mode", a, e)
