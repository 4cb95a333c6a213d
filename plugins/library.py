"""An op's forward and backward in torch's dispatcher.

    ns::name_fwd(parameters..., str provider) -> outputs + aux
    ns::name_bwd(grad_i..., parameters..., Tensor[] kept, str provider, bool[] needs) -> gradients

`kept` holds what forward returned, of its outputs only those that backward reads. The dispatcher
shows calls to those who watch: modes, tensor subclasses, the profiler. Where nobody does, a plain
call runs the body itself, which saves the host the dispatcher's boxing. Graphs that torch.export
made call name_fwd without the autograd.Function around it: its Autograd kernel is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from trilith.plugins.autocast import autocasts, is_any_autocast_enabled
from trilith.plugins.sharding import PLAIN
from trilith.plugins.spec import BackwardContext

if TYPE_CHECKING:
    from trilith.plugins.op import Op

# A name of this module is found faster than one of torch's, in what every call does.
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_modes = torch._C._len_torch_dispatch_stack
_is_profiling = torch.autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_KEY = "CompositeExplicitAutograd"
# The types that the dispatcher hands on unchanged.
_EXACT: Mapping[str, type] = {
    "float": float,
    "SymInt": int,
    "bool": bool,
    "str": str,
    "ScalarType": torch.dtype,
}


class TorchOps:
    """The two torch ops of one Op, and their bodies."""

    def __init__(self, op: Op) -> None:
        self._op = op
        self._spec = op.spec
        self._parameters = op.parameters
        self._arity, self._asks_needs = len(op.parameters), op.parameters.asks_needs
        self._tensors = op.parameters.tensors
        self._plain: dict[tuple[type, ...], bool] = {}
        namespace, _, name = op.spec.name.partition("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")
        forward, backward = self._parameters.forward_schema(), self._parameters.backward_schema
        for suffix, schema, body, fake in (
            ("fwd", forward, self.run_forward, self._fake_forward),
            ("bwd", backward(op.spec.outputs), self.run_backward, self._fake_backward),
        ):
            self._library.define(f"{name}_{suffix}({', '.join(schema)}) -> Tensor[]", tags=_TAGS)
            self._library.impl(f"{name}_{suffix}", body, _KEY)
            torch.library.register_fake(f"{namespace}::{name}_{suffix}", fake, lib=self._library)
        self._library.impl(f"{name}_fwd", self._forward_above, "Autograd", with_keyset=True)
        ops = getattr(torch.ops, namespace)
        self._packets = getattr(ops, f"{name}_fwd"), getattr(ops, f"{name}_bwd")
        self.forward, self.backward = (packet.default for packet in self._packets)
        if self._spec.cost is not None:
            for packet, flops in zip(self._packets, (self._flops, self._flops_back), strict=True):
                register_flop_formula(packet, get_raw=True)(flops)

    def destroy(self) -> None:
        """Take the ops out of torch's dispatcher, so that their names are free again."""
        for packet in self._packets:
            flop_registry.pop(packet, None)
        self._library._destroy()

    def _flops(self, *args: Any, **_: Any) -> int:
        """For torch's FlopCounterMode: what the spec's cost says."""
        assert self._spec.cost is not None
        return self._spec.cost(*args[: self._arity]).forward_flops

    def _flops_back(self, *args: Any, **_: Any) -> int:
        """The same of backward; what is not saved is taken to be as the first gradient."""
        assert self._spec.cost is not None
        grads, context = self._backward_arguments(args)
        like = next(g for g in grads if g is not None)
        dropped = set(self._tensors) - set(self._parameters.saved)
        inputs = (like if i in dropped else x for i, x in enumerate(context.inputs))
        return self._spec.cost(*inputs).backward_flops

    def is_plain(self, args: tuple[Any, ...]) -> bool:
        """Whether the body, called with these arguments, is what the dispatcher would call."""
        types = tuple(map(type, args))
        found = self._plain.get(types)
        if found is None:
            found = self._plain[types] = self._takes_as_they_are(types)
        if found:
            for i in self._tensors:
                tensor = args[i]
                # The dispatcher negates the one in memory, and asks a fake for the other.
                if tensor is not None and (tensor.is_neg() or tensor.is_meta):
                    return False
        return found

    def _takes_as_they_are(self, types: tuple[type, ...]) -> bool:
        if len(types) != self._arity:
            return False
        for schema, given in zip(self._parameters.types, types, strict=True):
            if schema.startswith("Tensor"):
                if given not in PLAIN:
                    return False
            elif given is type(None):
                if not schema.endswith("?"):
                    return False
            elif _EXACT.get(schema.removesuffix("?")) is not given:
                return False
        return True

    def start(self, provider: str, args: tuple[Any, ...], needs: tuple[bool, ...] = ()) -> Any:
        """An implementation's forward: its outputs and aux tensors, a single one by itself.

        `needs`: which gradients will be wanted, of every argument, none if it is empty.
        """
        if self._asks_needs:
            args = (*args, needs or (False,) * self._arity)
        return self._op.running[provider].forward(*args)

    def run_forward(self, *args: Any) -> list[Tensor]:
        own, provider = args[: self._arity], args[self._arity]
        if self._op.open_scopes and self._op.asked_for() != provider:
            self._op.check_scope(own, provider)
        results = self.start(provider, own, self._needs(args))
        return list(as_tuple(results, self._spec.name, "forward"))

    def _forward_above(self, keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        """The dispatcher's call for autograd: differentiable where a gradient is wanted."""
        own = args[: self._arity]
        lead = self._parameters.lead(own)
        if is_any_autocast_enabled() and autocasts(lead):
            own = self._op.lowered(lead.device.type, own)
            with torch.autocast(lead.device.type, enabled=False):
                return self.forward(*own, *args[self._arity :])
        if torch.is_grad_enabled() and self._op.wants_gradient(own):
            return list(self._op.function_of_fwd.apply(args[self._arity], False, *own))
        if self._op.is_ordinary(own):
            return self.run_forward(*args)
        return self.forward.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def _fake_forward(self, *args: Any) -> list[Tensor]:
        own = args[: self._arity]
        if self._asks_needs:
            own = (*own, self._needs(args) or (False,) * self._arity)
        results = (self._spec.fake or self._spec.forward)(*own)
        return list(as_tuple(results, self._spec.name, "fake"))

    def _needs(self, args: Sequence[Any]) -> tuple[bool, ...]:
        return tuple(args[-1]) if len(args) > self._arity + 1 else ()

    def context(
        self, inputs: Sequence[Any], kept: tuple[Tensor, ...], needs: Sequence[bool]
    ) -> BackwardContext:
        split = len(self._parameters.saved_outputs)
        return BackwardContext(tuple(inputs), kept[:split], kept[split:], tuple(needs))

    def start_backward(
        self, provider: str, grads: Sequence[Tensor | None], context: BackwardContext
    ) -> list[Tensor | None]:
        """An implementation's gradients, one for each parameter, None where it is not wanted."""
        backward = self._op.running[provider].backward
        if backward is None:
            raise NotImplementedError(
                f"{self._spec.name}: has no backward, and a gradient through it was asked for; "
                "call it under torch.no_grad(), or detach its inputs"
            )
        results = as_tuple(backward(context, *grads), self._spec.name, "backward")
        found = self._wanted(results, grads, context)
        if self._spec.fake_backward is None:
            return [None if g is None else g.contiguous() for g in found]
        return found

    def run_backward(self, *args: Any) -> list[Tensor]:
        grads, context = self._backward_arguments(args)
        return [g for g in self.start_backward(args[-2], grads, context) if g is not None]

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        grads, context = self._backward_arguments(args)
        given = self._spec.fake_backward
        results: Sequence[Tensor | None] = ()
        if given is not None:
            results = as_tuple(given(context, *grads), self._spec.name, "fake_backward")
        return [g for g in self._wanted(results, grads, context) if g is not None]

    def _backward_arguments(self, args: Sequence[Any]) -> tuple[Sequence[Any], BackwardContext]:
        n = self._spec.outputs
        return args[:n], self.context(args[n:-3], tuple(args[-3]), args[-1])

    def _wanted(
        self,
        results: Sequence[Tensor | None],
        grads: Sequence[Tensor | None],
        context: BackwardContext,
    ) -> list[Tensor | None]:
        """The gradients that are wanted, in their places; one that backward left out is zero."""
        if len(results) > self._arity:
            raise RuntimeError(
                f"{self._spec.name}: backward must return at most {self._arity} "
                f"gradients, one per parameter of forward, got {len(results)}"
            )
        found: list[Tensor | None] = []
        for i, need in enumerate(context.needs_input_grad):
            grad = results[i] if need and i < len(results) else None
            if need and grad is None:
                like = context.inputs[i]
                like = next(g for g in grads if g is not None) if like is None else like
                grad = like.new_zeros(like.shape)
            found.append(grad)
        return found


def is_watched() -> bool:
    """Whether somebody must see which ops run: a mode, the profiler, a tracer."""
    return bool(
        _is_dynamo_compiling() or _modes() or _is_profiling() or _tracing_state() is not None
    )


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an op's body can take them as they are."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or tensor.is_neg()):
            return False
    return True


def outputs_of(results: tuple[Any, ...], count: int, name: str) -> tuple[Any, ...]:
    """Of what forward returned, without the aux tensors."""
    if len(results) < count:
        raise RuntimeError(
            f"{name}: forward must return {count} outputs, and then aux, got {len(results)} tensors"
        )
    return results[:count]


def as_tuple(results: Any, name: str, part: str) -> tuple[Any, ...]:
    if isinstance(results, Tensor):
        return (results,)
    try:
        return tuple(results)
    except TypeError as error:
        raise TypeError(
            f"{name}: {part} must return a tensor or a tuple of them, got {results!r}"
        ) from error
