"""An op: what runs a call of it.

A call takes the reference where no implementation can run, for empty tensors, where a functorch
transform is active or dual numbers are (`torch.autograd.forward_ad`), and in `torch.jit.trace`; the
forward op where no gradient is wanted; else an autograd.Function around the forward and backward
ops. A backward under create_graph=True differentiates the reference.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from trilith.plugins import naming, selection, sharding
from trilith.plugins.autocast import autocasts, is_any_autocast_enabled
from trilith.plugins.autograd import autograd_function, function_of_fwd
from trilith.plugins.dynamo import assume_constant_result
from trilith.plugins.library import TorchOps, as_tuple, is_watched, outputs_of
from trilith.plugins.parameters import Parameters
from trilith.plugins.selection import Selection, SelectionKey, Vote
from trilith.plugins.spec import Implementation, OpSpec

# A name of this module is found faster than one of torch's, in what every call does.
_transforms_are_active = torch._C._are_functorch_transforms_active
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_forward_mode = torch.autograd.forward_ad
_tracing_state = torch._C._get_tracing_state


class _IsReferenceOnCPU:
    """Whether an op is its reference on a CPU whatever the arguments are, and nobody is told of
    calls. Found when it is read, and then an attribute of the op until something changes.

    Plugins have a say before the first answer: with another answer to the next call, a checkpoint
    would recompute the first one by another function.
    """

    def __get__(self, op: Op, cls: type[Op]) -> bool:
        if _is_dynamo_compiling():  # which cannot load plugins
            return False
        before_first_choice()
        with _guard_lock:
            found = op.__dict__["is_reference_on_cpu"] = op._is_reference_on_cpu()
        return found


class Op:
    """A callable op. Takes and returns what the OpSpec's forward does, without the aux tensors."""

    spec: OpSpec
    abandoned: bool  # brought by a plugin that was left out: the name is free
    is_reference_on_cpu = _IsReferenceOnCPU()

    def __init__(self, spec: OpSpec) -> None:
        previous = _defined.get(spec.name)
        if previous is not None:
            if not previous.abandoned:
                naming.require_replaceable(previous, spec)
            previous.destroy()
        self.spec = spec
        self.abandoned = False
        self.parameters = Parameters(spec)
        self.signature = self.parameters.signature
        self._arity, self._tensors = len(self.parameters), self.parameters.tensors
        self.implementations: list[Implementation] = []
        self.vote: Vote | None = None
        self.scope: ContextVar[str | None] = ContextVar(spec.name, default=None)
        self.open_scopes: list[str] = []
        self._version = 0
        self._selections: dict[tuple[torch.device, torch.dtype, str | None], Selection] = {}
        self._owners: dict[str, str] = {}
        self._by_provider: dict[str, Implementation] = {}
        self.running = self._by_provider
        self._reference = spec.reference
        self._is_wired = False
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
        self.torch_ops = TorchOps(self)
        self._function = autograd_function(self)
        # Without what torch's Python does in `apply` for functorch, which has no ordinary call.
        self._apply = super(torch.autograd.Function, self._function).apply  # type: ignore[misc]
        self.function_of_fwd = function_of_fwd(self, self._function)
        _defined[spec.name] = self
        self.__name__ = self.__qualname__ = spec.name
        self.__signature__ = self.signature
        self.__doc__ = spec.reference.__doc__

    def __repr__(self) -> str:
        return f"<op {self.spec.name}{self.signature}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self._arity:
            args = self.parameters.bind(args, kwargs)
        if self.is_ordinary(args):
            return self._run_ordinary(args)
        if not _tracing_state():  # to torch.jit.trace sizes are tensors
            self.parameters.require_no_tensor_for_a_number(args)
        for i in self._tensors:
            if type(args[i]) not in sharding.PLAIN and self._is_dtensor(i, args[i]):
                return sharding.call(self, args)
        lead = self.parameters.lead(args)
        if autocasts(lead):
            return self._call_in_autocast(lead.device.type, args)
        return self._run(self.provider(lead, args), args, is_ordinary=False)

    def _is_dtensor(self, position: int, value: Any) -> bool:
        if not isinstance(value, Tensor):
            name = self.parameters.names[position]
            raise TypeError(f"{self.spec.name}: {name} must be a tensor, got {value!r}")
        return sharding.is_dtensor(value)

    def choose(self, *args: Any) -> str | None:
        """Who would run a call with these arguments; None for the reference.

        For functions that pass an op something else where a kernel runs it, as a seed: they hand
        the answer on to `run`, and `supports` of an implementation is asked once.
        """
        return self.provider(self.parameters.lead(args), args)

    def run(self, provider: str | None, *args: Any) -> Any:
        """A call by whom `choose` said, but for DTensors' shards and casts of autocast, which
        are other arguments than those that were asked about."""
        if self.is_ordinary(args):
            return self._run(provider, args, is_ordinary=True)
        for i in self._tensors:
            if type(args[i]) not in sharding.PLAIN and sharding.is_dtensor(args[i]):
                return sharding.call(self, args)
        lead = self.parameters.lead(args)
        if not autocasts(lead):
            return self._run(provider, args, is_ordinary=False)
        device_type = lead.device.type
        if self.spec.autocast == "low":
            return self._call_in_autocast(device_type, args)
        with torch.autocast(device_type, enabled=False):
            return self._run(provider, args, self.is_ordinary(args))

    def is_ordinary(self, args: tuple[Any, ...]) -> bool:
        """Whether no mode, transform, tracer, profiler or tensor subclass has a say in the call."""
        if _is_dynamo_compiling() or _transforms_are_active() or is_any_autocast_enabled():
            return False
        if _forward_mode._current_level >= 0:
            return False
        return not is_watched() and self.torch_ops.is_plain(args)

    def _run_ordinary(self, args: tuple[Any, ...]) -> Any:
        """What `__call__` comes to for such a call, in one look at each tensor."""
        lead = None
        wants_gradient = False
        for i in self._tensors:
            tensor = args[i]
            if tensor is None:
                continue
            if tensor.numel() == 0:
                return self._reference(*args)
            if lead is None:
                lead = tensor
            if tensor.requires_grad:
                wants_gradient = True
        provider = self._chosen(self.parameters.lead(args) if lead is None else lead, args)
        if provider is None:
            return self._reference(*args)
        if wants_gradient and torch.is_grad_enabled():
            return self._apply(provider, True, *args)
        return self._outputs(self.torch_ops.start(provider, args))

    def _run(self, provider: str | None, args: tuple[Any, ...], is_ordinary: bool) -> Any:
        if provider is None:
            if _is_dynamo_compiling():
                return self.spec.reference(*args)  # no guard on what `wire` swaps
            return self._reference(*args)
        if torch.is_grad_enabled() and self.wants_gradient(args):
            apply = self._apply if is_ordinary else self._function.apply
            return apply(provider, is_ordinary, *args)
        if is_ordinary:
            return self._outputs(self.torch_ops.start(provider, args))
        return self._outputs(self.torch_ops.forward(*args, provider))

    def _outputs(self, results: Any) -> Any:
        name, count = self.spec.name, self.spec.outputs
        found = outputs_of(as_tuple(results, name, "forward"), count, name)
        return found[0] if count == 1 else found

    def __reduce__(self) -> tuple[Callable[[str], Op], tuple[str]]:
        """A copy, or a pickle read in another process, is the op of that name there."""
        return _named, (self.spec.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Op:
        return self

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
        self._require_same_parameters(implementation)
        self._by_provider[provider] = implementation
        self.running.setdefault(provider, implementation)
        self._owners[provider] = owner
        self.implementations.append(implementation)
        self.implementations.sort(key=lambda i: -i.priority)
        self.forget_selections()

    def _require_same_parameters(self, implementation: Implementation) -> None:
        """That forward can be called as the op's own is."""
        try:
            signature = inspect.signature(implementation.forward)
        except (TypeError, ValueError):  # of a builtin
            return
        given = [None] * (self._arity + self.parameters.asks_needs)
        try:
            signature.bind(*given)
        except TypeError as error:
            raise TypeError(
                f"{self.spec.name}: provider {implementation.provider!r} must take the parameters "
                f"{self.signature}, got {signature}: {error}"
            ) from None

    def remove_implementation(self, provider: str) -> None:
        self.implementations.remove(self._by_provider.pop(provider))
        self.running.pop(provider, None)
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
        return self._owners.get(provider) or naming.NOBODY

    def selection(self, device: torch.device, dtype: torch.dtype) -> Selection:
        """Who runs calls there, in this thread or task.

        Raises:
            NotImplementedError: an implementation was asked for by name and cannot run there.
            ValueError: the environment names an implementation that does not exist.
        """
        key = (device, dtype, self.asked_for())
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

    def asked_for(self) -> str | None:
        """The provider of the scope that this thread or task is in.

        Autograd's own threads, where backward runs on a GPU and checkpointing recomputes, are in
        the scope of the thread that called backward.
        """
        if not self.open_scopes:
            return None
        name = self.scope.get()
        return name if name is not None else selection.scope_of_caller(self)

    def enter_scope(self, provider: str) -> None:
        with _guard_lock:
            self.open_scopes.append(provider)
            self._set_guard()

    def leave_scope(self, provider: str) -> None:
        with _guard_lock:
            self.open_scopes.remove(provider)
            self._set_guard()

    def _set_guard(self) -> None:
        # Dynamo guards on this string: compiled code made under another one is not run.
        self._guard = f"{self._version}:{self.open_scopes[-1] if self.open_scopes else ''}"
        self.__dict__.pop("is_reference_on_cpu", None)

    def _is_reference_on_cpu(self) -> bool:
        """False while somebody traces or asked for one by name."""
        variable = selection.environment_variable(self.spec.name)
        if self._is_wired or self.open_scopes or variable in os.environ:
            return False
        return not any("cpu" in implementation.devices for implementation in self.implementations)

    def tensors_of(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The tensors among a call's arguments, None where one is left out."""
        return [args[i] for i in self.parameters.tensors]

    def wire(self, running: dict[str, Implementation], reference: Callable[..., Any]) -> None:
        """Run these in the places of the implementations and the reference, until `unwire`."""
        self.running, self._reference = running, reference
        self._is_wired = True
        with _guard_lock:
            self._set_guard()

    def unwire(self) -> None:
        self.running, self._reference = self._by_provider, self.spec.reference
        self._is_wired = False
        with _guard_lock:
            self._set_guard()

    def destroy(self) -> None:
        """Take the op out of torch's dispatcher, so that its name is free again."""
        if _defined.get(self.spec.name) is self:
            del _defined[self.spec.name]
        self.torch_ops.destroy()

    def provider(self, lead: Tensor, args: Sequence[Any]) -> str | None:
        """Who runs a call with these arguments, of which `lead` is the first tensor; None for the
        reference."""
        if _transforms_are_active() or _forward_mode._current_level >= 0 or _tracing_state():
            return None
        for i in self._tensors:
            tensor = args[i]
            if tensor is not None and tensor.numel() == 0:
                return None
        if _is_dynamo_compiling():
            return _traced_provider(self.spec.name, lead.device, lead.dtype, self._guard)
        return self._chosen(lead, args)

    def _chosen(self, lead: Tensor, args: Sequence[Any]) -> str | None:
        found = self._selections.get((lead.device, lead.dtype, self.asked_for()))
        if found is None:
            found = self.selection(lead.device, lead.dtype)
        return found.always or selection.supporting(self, found, tuple(args))

    def check_scope(self, args: Sequence[Any], provider: str) -> None:
        """Another thread's `use_implementation` must not decide what compiled code runs here."""
        lead = self.parameters.lead(args)
        chosen = self.selection(lead.device, lead.dtype)
        if provider not in chosen.possible:
            raise RuntimeError(
                f"{self.spec.name}: this code was compiled for {provider!r} inside another "
                "thread's use_implementation; compile once for each thread"
            )

    def wants_gradient(self, args: tuple[Any, ...]) -> bool:
        for i in self._tensors:  # any() over a generator takes three times as long
            tensor = args[i]
            if tensor is not None and tensor.requires_grad:
                return True
        return False

    def _call_in_autocast(self, device_type: str, args: tuple[Any, ...]) -> Any:
        args = self.lowered(device_type, args)
        with torch.autocast(device_type, enabled=False):
            return self(*args)

    def lowered(self, device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as a call under autocast takes them."""
        if self.spec.autocast != "low":
            return args
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(
            _lower(a, dtype) if i in self.parameters.tensors else a for i, a in enumerate(args)
        )


def _nothing() -> None: ...


# Runs before an op first chooses an implementation: the plugin manager loads plugins here.
before_first_choice: Callable[[], None] = _nothing

_defined: dict[str, Op] = {}


def _named(name: str) -> Op:
    if name not in _defined:
        before_first_choice()
    if name not in _defined:
        raise KeyError(
            f"no op {name!r} here: the plugin that brings it is not installed, or was left out, "
            "as `python -m trilith.plugins list` says"
        )
    return _defined[name]


_guard_lock = threading.Lock()


def defined() -> dict[str, Op]:
    """Every op that torch's dispatcher has from here, registered or not."""
    return dict(_defined)


@assume_constant_result
def _traced_provider(name: str, device: torch.device, dtype: torch.dtype, guard: str) -> str | None:
    # No plugin is loaded under tracing, and no argument has data that `supports` could look at.
    op = _defined[name]
    chosen = selection.choose(op, SelectionKey(device, dtype), op.asked_for())
    return selection.traceable(op, chosen)


def _lower(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    is_floating = value is not None and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if value is not None and is_floating else value
