"""OpSpec -> a torch op pair and its autograd wiring. The only file that touches torch.library.

A call takes the reference where no implementation can run, where a functorch transform is active,
and for empty tensors; the forward op where no gradient is wanted; else an autograd.Function around
the forward and backward ops. A backward under create_graph=True differentiates the reference.
"""

from __future__ import annotations

import inspect
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from trilith.plugins import selection
from trilith.plugins.selection import Selection, SelectionKey, Vote
from trilith.plugins.spec import BackwardContext, Implementation, OpSpec

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_KEY = "CompositeExplicitAutograd"
_NEEDS = "needs_input_grad"


class Op:
    """A callable op. Takes and returns what the OpSpec's forward does, without the aux tensors."""

    spec: OpSpec
    abandoned: bool  # brought by a plugin that was left out: the name is free

    def __init__(self, spec: OpSpec) -> None:
        previous = _defined.get(spec.name)
        if previous is not None:
            if not previous.abandoned:
                owner = previous.owner_of(previous.spec.provider)
                raise ValueError(f"op {spec.name} is already defined, by {owner}")
            previous.destroy()
        self.spec = spec
        self.abandoned = False
        self.signature, self._informed = _without_needs(_resolved_signature(spec))
        self.implementations: list[Implementation] = []
        parameters = list(self.signature.parameters.values())
        self._arity = len(parameters)
        self._tensors = tuple(i for i, p in enumerate(parameters) if _is_tensor(p.annotation))
        names = [p.name for p in parameters]
        self._positions = {name: i for i, name in enumerate(names)}
        keep = names if spec.save_inputs is None else spec.save_inputs
        unknown = set(keep) - {names[i] for i in self._tensors} if spec.save_inputs else ()
        if not self._tensors or unknown:
            problem = f"save_inputs names {sorted(unknown)}" if unknown else "no tensor parameter"
            raise ValueError(f"{spec.name}: forward's tensor parameters don't fit: {problem}")
        self._saved = tuple(i for i in self._tensors if names[i] in keep)
        self._saved_outputs = _chosen_outputs(spec)
        self.vote: Vote | None = None
        self.scope: ContextVar[str | None] = ContextVar(spec.name, default=None)
        self._open_scopes: list[str] = []
        self._version = 0
        self._selections: dict[tuple[torch.device, torch.dtype, str | None], Selection] = {}
        self._owners: dict[str, str] = {}
        self._by_provider: dict[str, Implementation] = {}
        self._running = self._by_provider
        self._reference = spec.reference
        self.add_implementation(
            Implementation(
                op=spec.name,
                provider=spec.provider,
                forward=spec.forward,
                backward=spec.backward,
                devices=spec.devices,
                dtypes=spec.dtypes,
            )
        )
        self._define(parameters)
        self._function = _autograd_function(self)
        _defined[spec.name] = self
        self.__name__ = self.__qualname__ = spec.name
        self.__doc__ = spec.reference.__doc__

    def __repr__(self) -> str:
        return f"<op {self.spec.name}{self.signature}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self._arity:
            args = self._bind(args, kwargs)
        lead = self._lead(args)
        if torch.is_autocast_enabled(lead.device.type):
            return self._call_in_autocast(lead.device.type, args)
        provider = self._provider(lead, args)
        if provider is None:
            if torch.compiler.is_dynamo_compiling():
                return self.spec.reference(*args)  # no guard on what `wire` swaps
            return self._reference(*args)
        if torch.is_grad_enabled() and self._wants_gradient(args):
            return self._function.apply(provider, *args)
        results = self.forward_op(*args, provider)
        return results[0] if self.spec.outputs == 1 else tuple(results[: self.spec.outputs])

    def __reduce__(self) -> tuple[Callable[[str], Op], tuple[str]]:
        """A copy, or a pickle read in another process, is the op of that name there."""
        return _named, (self.spec.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Op:
        return self

    def runs_kernels(self, *args: Any) -> bool:
        """Whether a call with these arguments would take an implementation, not the reference."""
        return self._provider(self._lead(args), args) is not None

    def add_implementation(self, implementation: Implementation, owner: str = "") -> None:
        name, provider = self.spec.name, implementation.provider
        if provider in self._by_provider:
            raise ValueError(
                f"{name}: provider {provider!r} exists already, of {self.owner_of(provider)}; "
                f"{owner or 'this one'} must choose another name"
            )
        if provider == selection.REFERENCE or not provider:
            raise ValueError(f"{name}: provider must not be called {provider!r}")
        if implementation.forward is None or (
            implementation.backward is None and self.spec.backward is not None
        ):
            raise ValueError(
                f"{name}: provider {provider!r} must bring forward and backward as a pair"
            )
        self._by_provider[provider] = implementation
        self._running.setdefault(provider, implementation)
        self._owners[provider] = owner
        self.implementations.append(implementation)
        self.implementations.sort(key=lambda i: -i.priority)
        self.forget_selections()

    def remove_implementation(self, provider: str) -> None:
        self.implementations.remove(self._by_provider.pop(provider))
        self._running.pop(provider, None)
        del self._owners[provider]
        self.forget_selections()

    def adopt(self, owner: str, vote: Vote | None) -> None:
        """A registry takes the op in, for the plugin that brought it."""
        if _defined.get(self.spec.name) is not self:
            raise ValueError(f"op {self.spec.name} of {owner} was destroyed; make it again")
        self._owners[self.spec.provider] = owner
        self.vote = vote
        self.abandoned = False
        self.forget_selections()

    def owner_of(self, provider: str) -> str:
        """The plugin that brought an implementation, as "distribution:entry point"."""
        return self._owners.get(provider) or "no plugin"

    def selection(self, device: torch.device, dtype: torch.dtype) -> Selection:
        """Who runs calls there, in this thread or task.

        Raises:
            NotImplementedError: an implementation was asked for by name and cannot run there.
            ValueError: the environment names an implementation that does not exist.
        """
        key = (device, dtype, self.scope.get())
        found = self._selections.get(key)
        if found is None:
            before_first_choice()
            cache = self._selections
            found = cache[key] = selection.choose(self, SelectionKey(device, dtype), key[2])
        return found

    def forget_selections(self) -> None:
        """Choose anew from now on, in compiled code too."""
        with _guard_lock:
            self._version += 1
            self._selections = {}
            self._set_guard()

    def enter_scope(self, provider: str) -> None:
        with _guard_lock:
            self._open_scopes.append(provider)
            self._set_guard()

    def leave_scope(self, provider: str) -> None:
        with _guard_lock:
            self._open_scopes.remove(provider)
            self._set_guard()

    def _set_guard(self) -> None:
        # Dynamo guards on this string: compiled code made under another one is not run.
        self._guard = f"{self._version}:{self._open_scopes[-1] if self._open_scopes else ''}"

    def tensors_of(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The tensors among a call's arguments, None where one is left out."""
        return [args[i] for i in self._tensors]

    def wire(self, running: dict[str, Implementation], reference: Callable[..., Any]) -> None:
        """Run these in the places of the implementations and the reference, until `unwire`."""
        self._running, self._reference = running, reference

    def unwire(self) -> None:
        self._running, self._reference = self._by_provider, self.spec.reference

    def destroy(self) -> None:
        """Take the op out of torch's dispatcher, so that its name is free again."""
        if _defined.get(self.spec.name) is self:
            del _defined[self.spec.name]
        self._library._destroy()

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.spec.name}{self.signature}: {error}") from None
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    def _lead(self, args: tuple[Any, ...]) -> Tensor:
        """The first tensor, whose device and dtype decide who runs the call."""
        for i in self._tensors:
            if args[i] is not None:
                return args[i]
        raise TypeError(f"{self.spec.name}: at least one tensor must be given, got none")

    def _wants_gradient(self, args: tuple[Any, ...]) -> bool:
        return any(args[i] is not None and args[i].requires_grad for i in self._tensors)

    def _provider(self, lead: Tensor, args: tuple[Any, ...]) -> str | None:
        if torch._C._are_functorch_transforms_active():
            return None
        for i in self._tensors:
            if args[i] is not None and args[i].numel() == 0:
                return None
        if torch.compiler.is_dynamo_compiling():
            return _traced_provider(self.spec.name, lead.device, lead.dtype, self._guard)
        found = self._selections.get((lead.device, lead.dtype, self.scope.get()))
        if found is None:
            found = self.selection(lead.device, lead.dtype)
        return found.always or selection.supporting(self, found, args)

    def _call_in_autocast(self, device_type: str, args: tuple[Any, ...]) -> Any:
        if self.spec.autocast == "low":
            dtype = torch.get_autocast_dtype(device_type)
            args = tuple(_lower(a, dtype) if i in self._tensors else a for i, a in enumerate(args))
        with torch.autocast(device_type, enabled=False):
            return self(*args)

    def _define(self, parameters: list[inspect.Parameter]) -> None:
        namespace, _, name = self.spec.name.partition("::")
        self._library = torch.library.Library(namespace, "FRAGMENT")
        types = [_schema_type(p.annotation) for p in parameters]
        inputs = [f"{t} {p.name}" for t, p in zip(types, parameters, strict=True)]
        optional = [
            f"{'Tensor?' if t == 'Tensor' else t} {p.name}"
            for t, p in zip(types, parameters, strict=True)
        ]
        grads = [f"Tensor? grad_{i}" for i in range(self.spec.outputs)]
        needs = [f"bool[] {_NEEDS}=[]"] if self._informed else []
        for suffix, schema, body, fake in (
            ("fwd", [*inputs, "str provider", *needs], self._run_forward, self._fake_forward),
            (
                "bwd",
                [*grads, *optional, "Tensor[] kept", "str provider", "bool[] needs"],
                self._run_backward,
                self._fake_backward,
            ),
        ):
            self._library.define(f"{name}_{suffix}({', '.join(schema)}) -> Tensor[]", tags=_TAGS)
            self._library.impl(f"{name}_{suffix}", body, _KEY)
            torch.library.register_fake(f"{namespace}::{name}_{suffix}", fake, lib=self._library)
        ops = getattr(torch.ops, namespace)
        self.forward_op = getattr(ops, f"{name}_fwd").default
        self.backward_op = getattr(ops, f"{name}_bwd").default

    def _run_forward(self, *args: Any) -> list[Tensor]:
        provider = args[self._arity]
        if self._open_scopes and self.scope.get() != provider:
            self._check_scope(args, provider)
        return _as_list(self._running[provider].forward(*self._forward_arguments(args)))

    def _forward_arguments(self, args: Sequence[Any]) -> Sequence[Any]:
        """What an implementation's forward takes, of the forward op's arguments."""
        own = args[: self._arity]
        if not self._informed:
            return own
        needs = args[self._arity + 1] if len(args) > self._arity + 1 else ()
        return (*own, tuple(needs) or (False,) * self._arity)

    def _check_scope(self, args: Sequence[Any], provider: str) -> None:
        """Another thread's `use_implementation` must not decide what compiled code runs here."""
        lead = self._lead(tuple(args))
        chosen = self.selection(lead.device, lead.dtype)
        if provider not in chosen.possible:
            raise RuntimeError(
                f"{self.spec.name}: this code was compiled for {provider!r} inside another "
                "thread's use_implementation; compile once for each thread"
            )

    def _fake_forward(self, *args: Any) -> list[Tensor]:
        return _as_list((self.spec.fake or self.spec.forward)(*self._forward_arguments(args)))

    def _run_backward(self, *args: Any) -> list[Tensor]:
        grads, context = self._backward_arguments(args)
        backward = self._running[args[-2]].backward
        assert backward is not None
        results = self._needed(_as_list(backward(context, *grads)), grads, context)
        if self.spec.fake_backward is None:
            return [g.contiguous() for g in results]
        return results

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        grads, context = self._backward_arguments(args)
        given = self.spec.fake_backward
        results = [] if given is None else _as_list(given(context, *grads))
        return self._needed(results, grads, context)

    def _backward_arguments(self, args: Sequence[Any]) -> tuple[Sequence[Any], BackwardContext]:
        n = self.spec.outputs
        kept, needs = tuple(args[-3]), args[-1]
        split = len(self._saved_outputs)
        context = BackwardContext(tuple(args[n:-3]), kept[:split], kept[split:], tuple(needs))
        return args[:n], context

    def _needed(
        self,
        results: list[Tensor | None],
        grads: Sequence[Tensor | None],
        context: BackwardContext,
    ) -> list[Tensor]:
        """The gradients that are wanted, in order; one that backward left out is zero."""
        if len(results) > self._arity:
            raise RuntimeError(
                f"{self.spec.name}: backward must return at most {self._arity} gradients, one per "
                f"parameter of forward, got {len(results)}"
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

    def _asked(self, needs: Sequence[bool], sources: Mapping[str, int | str]) -> list[bool]:
        """Whose gradients backward computes, when some are shared."""
        asked = list(needs)
        for name, source in sources.items():
            i = self._positions[name]
            if isinstance(source, str):
                asked[self._positions[source]] |= needs[i]
            asked[i] = False
        return asked

    def reference_gradient(
        self, args: tuple[Any, ...], needs: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Gradients of the reference, themselves differentiable in inputs and grads."""
        aliased = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
        wanted = [a for a, need in zip(aliased, needs, strict=True) if need]
        outputs = self.spec.reference(*aliased)
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


def _autograd_function(op: Op) -> type[torch.autograd.Function]:
    spec = op.spec
    n_outputs, saved, n_saved = spec.outputs, op._saved, len(op._saved)
    informed = op._informed
    constant = tuple(i not in op._tensors for i in range(op._arity))
    unsaved = tuple(i for i in op._tensors if i not in saved)
    chosen = spec.save_outputs.values() if isinstance(spec.save_outputs, Mapping) else ()
    stands_for = tuple((op._positions[name], k) for k, name in enumerate(chosen))

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, provider: str, *args: Any) -> Any:
            wanted = (ctx.needs_input_grad[1:],) if informed else ()
            results = op.forward_op(*args, provider, *wanted)
            outputs = results[:n_outputs]
            kept = [*(results[i] for i in op._saved_outputs), *results[n_outputs:]]
            ctx.save_for_backward(*[args[i] for i in saved], *kept)
            ctx.constants = [a if c else None for a, c in zip(args, constant, strict=True)]
            ctx.unsaved = [(i, _meta(args[i])) for i in unsaved if args[i] is not None]
            ctx.provider = provider
            ctx.set_materialize_grads(spec.materialize_grads)
            integers = [o for o in outputs if not o.is_floating_point()]
            if integers:
                ctx.mark_non_differentiable(*integers)
            return outputs[0] if n_outputs == 1 else tuple(outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needs = ctx.needs_input_grad[1:]
            kept = ctx.saved_tensors
            inputs = list(ctx.constants)
            for i, value in zip(saved, kept, strict=False):
                inputs[i] = value
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                for i, (shape, dtype, device) in ctx.unsaved:
                    inputs[i] = torch.zeros(shape, dtype=dtype, device=device)
                    inputs[i].requires_grad_(needs[i])
                for i, output in stands_for:
                    inputs[i] = kept[n_saved + output]
                return (None, *op.reference_gradient(tuple(inputs), needs, grads))
            if all(g is None for g in grads):
                return (None,) * (op._arity + 1)
            sources = {} if spec.shared_gradients is None else spec.shared_gradients(*inputs)
            asked = op._asked(needs, sources) if sources else needs
            results: Sequence[Any] = ()
            if any(asked):
                results = op.backward_op(*grads, *inputs, kept[n_saved:], ctx.provider, asked)
                if len(results) == op._arity:
                    return (None, *results)
            found = iter(results)
            gradients = [next(found) if ask else None for ask in asked]
            for name, source in sources.items():
                i = op._positions[name]
                gradients[i] = (
                    grads[source] if isinstance(source, int) else gradients[op._positions[source]]
                )
            return (None, *gradients)

    Function.__name__ = Function.__qualname__ = spec.name.replace("::", "_")
    return Function


def _nothing() -> None: ...


# Runs before an op first chooses an implementation: the plugin manager loads plugins here.
before_first_choice: Callable[[], None] = _nothing

_defined: dict[str, Op] = {}


def _named(name: str) -> Op:
    if name not in _defined:
        before_first_choice()
    return _defined[name]


_guard_lock = threading.Lock()


def defined() -> dict[str, Op]:
    """Every op that torch's dispatcher has from here, registered or not."""
    return dict(_defined)


@torch.compiler.assume_constant_result
def _traced_provider(name: str, device: torch.device, dtype: torch.dtype, guard: str) -> str | None:
    # No plugin is loaded under tracing, and no argument has data that `supports` could look at.
    op = _defined[name]
    chosen = selection.choose(op, SelectionKey(device, dtype), op.scope.get())
    return selection.traceable(op, chosen)


def _chosen_outputs(spec: OpSpec) -> tuple[int, ...]:
    if isinstance(spec.save_outputs, bool):
        return tuple(range(spec.outputs)) if spec.save_outputs else ()
    return tuple(spec.save_outputs)


def _resolved_signature(spec: OpSpec) -> inspect.Signature:
    hints = typing.get_type_hints(spec.forward)
    signature = inspect.signature(spec.forward)
    missing = [name for name in signature.parameters if name not in hints]
    if missing:
        raise TypeError(
            f"{spec.name}: forward must annotate every parameter, got none for {missing}"
        )
    return signature.replace(
        parameters=[p.replace(annotation=hints[p.name]) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )


def _without_needs(signature: inspect.Signature) -> tuple[inspect.Signature, bool]:
    """The parameters that a call gives, and whether forward also asks which want a gradient."""
    given = [p for p in signature.parameters.values() if p.name != _NEEDS]
    return signature.replace(parameters=given), len(given) < len(signature.parameters)


def _schema_type(annotation: Any) -> str:
    inferred = torch.library.infer_schema(_prototype(annotation), mutates_args=())
    return inferred.removeprefix("(").partition(" value)")[0]


def _prototype(annotation: Any) -> Callable[..., None]:
    def prototype(value: Any) -> None: ...

    parameter = inspect.Parameter(
        "value", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation
    )
    prototype.__signature__ = inspect.Signature([parameter], return_annotation=None)  # type: ignore[attr-defined]
    prototype.__annotations__ = {"value": annotation, "return": None}
    return prototype


def _is_tensor(annotation: Any) -> bool:
    return annotation is Tensor or Tensor in typing.get_args(annotation)


def _meta(value: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return value.shape, value.dtype, value.device


def _lower(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    is_floating = value is not None and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if value is not None and is_floating else value


def _as_list(results: Any) -> list[Any]:
    return [results] if isinstance(results, Tensor) else list(results)
