"""An op's forward and backward in torch's dispatcher. The only file that touches torch.library.

    ns::name_fwd(parameters..., str provider) -> outputs + aux
    ns::name_bwd(grad_i..., parameters..., Tensor[] kept, str provider, bool[] needs) -> gradients

`kept` holds what forward returned, of its outputs only those that backward reads. The dispatcher
shows calls to those who watch: modes, tensor subclasses, the profiler. Where nobody does, a plain
call runs the body itself, which saves the host the dispatcher's boxing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trilith.plugins.sharding import PLAIN
from trilith.plugins.spec import BackwardContext

if TYPE_CHECKING:
    from trilith.plugins.op import Op

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
        ops = getattr(torch.ops, namespace)
        self.forward = getattr(ops, f"{name}_fwd").default
        self.backward = getattr(ops, f"{name}_bwd").default

    def destroy(self) -> None:
        """Take the ops out of torch's dispatcher, so that their names are free again."""
        self._library._destroy()

    def is_plain(self, args: tuple[Any, ...]) -> bool:
        """Whether the body, called with these arguments, is what the dispatcher would call."""
        types = tuple(map(type, args))
        found = self._plain.get(types)
        if found is None:
            found = self._plain[types] = self._takes_as_they_are(types)
        return found

    def _takes_as_they_are(self, types: tuple[type, ...]) -> bool:
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

    def run_forward(self, *args: Any) -> list[Tensor]:
        op = self._op
        provider = args[self._arity]
        if op.open_scopes and op.scope.get() != provider:
            op.check_scope(args, provider)
        own = self._with_needs(args) if self._asks_needs else args[: self._arity]
        return as_list(op.running[provider].forward(*own), self._spec.name, "forward")

    def _fake_forward(self, *args: Any) -> list[Tensor]:
        own = self._with_needs(args) if self._asks_needs else args[: self._arity]
        return as_list((self._spec.fake or self._spec.forward)(*own), self._spec.name, "fake")

    def _with_needs(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What an implementation's forward takes, if it asks which gradients will be wanted."""
        needs = tuple(args[self._arity + 1]) if len(args) > self._arity + 1 else ()
        return (*args[: self._arity], needs or (False,) * self._arity)

    def run_backward(self, *args: Any) -> list[Tensor]:
        grads, context = self._backward_arguments(args)
        backward = self._op.running[args[-2]].backward
        if backward is None:
            raise NotImplementedError(
                f"{self._spec.name}: has no backward, and a gradient through it was asked for; "
                "call it under torch.no_grad(), or detach its inputs"
            )
        results = self._needed(
            as_list(backward(context, *grads), self._spec.name, "backward"), grads, context
        )
        if self._spec.fake_backward is None:
            return [g.contiguous() for g in results]
        return results

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        grads, context = self._backward_arguments(args)
        given = self._spec.fake_backward
        results = (
            []
            if given is None
            else as_list(given(context, *grads), self._spec.name, "fake_backward")
        )
        return self._needed(results, grads, context)

    def _backward_arguments(self, args: Sequence[Any]) -> tuple[Sequence[Any], BackwardContext]:
        n, split = self._spec.outputs, len(self._parameters.saved_outputs)
        kept, needs = tuple(args[-3]), tuple(args[-1])
        return args[:n], BackwardContext(tuple(args[n:-3]), kept[:split], kept[split:], needs)

    def _needed(
        self,
        results: list[Tensor | None],
        grads: Sequence[Tensor | None],
        context: BackwardContext,
    ) -> list[Tensor]:
        """The gradients that are wanted, in order; one that backward left out is zero."""
        if len(results) > self._arity:
            raise RuntimeError(
                f"{self._spec.name}: backward must return at most {self._arity} "
                f"gradients, one per parameter of forward, got {len(results)}"
            )
        needed: list[Tensor] = []
        for i, need in enumerate(context.needs_input_grad):
            if not need:
                continue
            grad = results[i] if i < len(results) else None
            if grad is None:
                like = context.inputs[i]
                like = next(g for g in grads if g is not None) if like is None else like
                grad = like.new_zeros(like.shape)
            needed.append(grad)
        return needed


def is_watched() -> bool:
    """Whether somebody must see which ops run: a mode, the profiler, a tracer."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    return all(map(PLAIN.__contains__, map(type, tensors)))


def as_list(results: Any, name: str, part: str) -> list[Any]:
    if isinstance(results, Tensor):
        return [results]
    try:
        return list(results)
    except TypeError as error:
        raise TypeError(
            f"{name}: {part} must return a tensor or a tuple of them, got {results!r}"
        ) from error
