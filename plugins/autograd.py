"""An op's autograd.Function, and the reference's gradient, which stands in for its derivative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trilith.plugins.autocast import autocasts, is_any_autocast_enabled
from trilith.plugins.library import are_plain, as_tuple, is_watched, outputs_of

if TYPE_CHECKING:
    from trilith.plugins.op import Op

# A name of this module is found faster than one of torch's, in what every call does.
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def autograd_function(op: Op) -> type[torch.autograd.Function]:
    """Forward and backward through the op's torch ops, keeping what its spec says."""
    spec, parameters, torch_ops = op.spec, op.parameters, op.torch_ops
    n_outputs, saved, n_saved = spec.outputs, parameters.saved, len(parameters.saved)
    asks_needs = parameters.asks_needs
    n_parameters = len(parameters)
    constants = parameters.constants
    unsaved = tuple(i for i in parameters.tensors if i not in saved)
    pooled = (None, *constants, *saved)
    places = tuple(pooled.index(i) if i in pooled else 0 for i in range(n_parameters))
    chosen = spec.save_outputs.values() if isinstance(spec.save_outputs, Mapping) else ()
    stands_for = tuple((parameters.positions[name], k) for k, name in enumerate(chosen))
    saved_outputs = parameters.saved_outputs

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, provider: str, is_ordinary: bool, *args: Any) -> Any:
            wanted = (ctx.needs_input_grad[2:],) if asks_needs else ()
            if is_ordinary:
                results = as_tuple(torch_ops.start(provider, args, *wanted), spec.name, "forward")
            else:
                results = tuple(torch_ops.forward(*args, provider, *wanted))
            outputs = outputs_of(results, n_outputs, spec.name)
            kept = [results[i] for i in saved_outputs] if saved_outputs else ()
            ctx.save_for_backward(*[args[i] for i in saved], *kept, *results[n_outputs:])
            facts = [(i, _meta(args[i])) for i in unsaved if args[i] is not None] if unsaved else ()
            ctx.call = provider, is_ordinary, [args[i] for i in constants], facts
            if not spec.materialize_grads:
                ctx.set_materialize_grads(False)
            integers = [o for o in outputs if not o.is_floating_point()]
            if integers:
                _require_real(spec.name, integers)
                ctx.mark_non_differentiable(*integers)
            return outputs[0] if n_outputs == 1 else outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if is_any_autocast_enabled():  # the caller's; forward ran without it
                lead = next((g for g in grads if g is not None), None)
                if lead is not None and autocasts(lead):
                    with torch.autocast(lead.device.type, enabled=False):
                        return Function.backward(ctx, *grads)
            needs = ctx.needs_input_grad[2:]
            kept = ctx.saved_tensors
            provider, is_ordinary, given, facts = ctx.call
            # Read by index, not written: to torch 2.11, compiling for dynamic shapes, an int from
            # outside is symbolic, and it cannot trace a list that is written to at one.
            pool = (None, *given, *kept)
            inputs = [pool[place] for place in places]
            is_eager = not torch.compiler.is_compiling()
            if is_eager and (torch.is_grad_enabled() or _are_batched(grads)):
                for i, (shape, dtype, device) in facts:
                    inputs[i] = torch.zeros(shape, dtype=dtype, device=device)
                    inputs[i].requires_grad_(needs[i])
                for i, output in stands_for:
                    inputs[i] = kept[n_saved + output]
                with torch.enable_grad():
                    return (None, None, *reference_gradient(op, tuple(inputs), needs, grads))
            if not spec.materialize_grads and all(g is None for g in grads):
                return (None,) * (n_parameters + 2)
            sources = {} if spec.shared_gradients is None else spec.shared_gradients(*inputs)
            asked = asked_of_backward(op, needs, sources) if sources else needs
            gradients: Sequence[Tensor | None] = (None,) * n_parameters
            if any(asked):
                kept = kept[n_saved:]
                if is_ordinary and are_plain(grads) and are_plain(kept) and not is_watched():
                    context = torch_ops.context(inputs, kept, asked)
                    gradients = torch_ops.start_backward(provider, grads, context)
                else:
                    found = iter(torch_ops.backward(*grads, *inputs, kept, provider, asked))
                    gradients = [next(found) if ask else None for ask in asked]
            if sources:
                gradients = shared(op, sources, gradients, grads)
            return (None, None, *gradients)

    return _named(spec.name, Function)


def _named(name: str, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """`function` by an op's name, which torch gives its nodes as the class is made."""
    make: Any = type(function)
    return make(name.replace("::", "_"), (function,), {"__module__": function.__module__})


def function_of_fwd(
    op: Op, function: type[torch.autograd.Function]
) -> type[torch.autograd.Function]:
    """`function`, the op's, with the aux tensors as outputs too, as the torch op has them."""
    n_outputs = op.spec.outputs
    n_before = len(op.parameters.saved) + len(op.parameters.saved_outputs)

    class FunctionOfFwd(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, provider: str, is_ordinary: bool, *args: Any) -> Any:
            outputs = function.forward(ctx, provider, is_ordinary, *args)
            outputs = (outputs,) if n_outputs == 1 else outputs
            aux = ctx.to_save[n_before:]
            integers = [o for o in outputs if not o.is_floating_point()]
            ctx.mark_non_differentiable(*integers, *aux)
            return (*outputs, *aux)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return function.backward(ctx, *grads[:n_outputs])

    return _named(f"{op.spec.name}_fwd", FunctionOfFwd)


def _are_batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether several backwards run as one, by torch.func or `is_grads_batched`."""
    if _transforms_are_active():
        return True
    for grad in grads:
        if grad is not None:
            return _is_batched(grad)
    return False


def asked_of_backward(
    op: Op, needs: Sequence[bool], sources: Mapping[str, int | str]
) -> list[bool]:
    """Whose gradients backward computes, when some are shared."""
    positions = op.parameters.positions
    asked = list(needs)
    for name, source in sources.items():
        i = positions[name]
        if isinstance(source, str):
            asked[positions[source]] |= needs[i]
        asked[i] = False
    return asked


def shared(
    op: Op,
    sources: Mapping[str, int | str],
    gradients: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients, where an input's is an output's gradient or another input's."""
    positions = op.parameters.positions
    filled = list(gradients)
    for name, source in sources.items():
        of = grads[source] if isinstance(source, int) else gradients[positions[source]]
        filled[positions[name]] = of
    return filled


def reference_gradient(
    op: Op, args: tuple[Any, ...], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the reference, themselves differentiable in inputs and grads."""
    aliased = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
    wanted = [a for a, need in zip(aliased, needs, strict=True) if need]
    outputs = op.spec.reference(*aliased)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    if not pairs:
        return [None] * len(needs)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needs]


def _require_real(name: str, outputs: Sequence[Tensor]) -> None:
    """No gradient would flow through a complex one, and nobody would be told."""
    for output in outputs:
        if output.is_complex():
            raise TypeError(
                f"{name}: forward must return real tensors, got {output.dtype}; return "
                "torch.view_as_real of it"
            )


def _meta(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device
