"""Who runs a call: whoever was asked for by name, else whom a plugin chose, else by priority.

The answer is computed once for an op, a device, a dtype and a name, and cached by the op; nothing
here runs in a call that has run before.
"""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from trilith.plugins.spec import Implementation, compute_capability

if TYPE_CHECKING:
    from trilith.plugins.op import Op

REFERENCE = "reference"
_PREFERRED = "~"


class PluginWarning(UserWarning):
    """A plugin was left out, or did something that needs a look."""


@dataclass(frozen=True)
class SelectionKey:
    """Where a call runs: what a choice may depend on."""

    device: torch.device
    dtype: torch.dtype

    @property
    def architecture(self) -> int | None:
        """The compute capability, as 90; None where there is no such device to ask."""
        return compute_capability(self.device)


@dataclass(frozen=True)
class Selection:
    """Implementations to try in order; none of them is the reference. `reason` says why so.

    Where an `asker` named the one implementation, it runs or the call raises. `is_choice` tells a
    reference that was chosen from one that is left over.
    """

    implementations: tuple[Implementation, ...]
    reason: str
    asker: str = ""
    is_choice: bool = True
    first: str | None = field(init=False)
    always: str | None = field(init=False)  # runs whatever the arguments are

    def __post_init__(self) -> None:
        first = next(iter(self.implementations), None)
        always = first.provider if first is not None and first.supports is None else None
        object.__setattr__(self, "first", None if first is None else first.provider)
        object.__setattr__(self, "always", always)

    @property
    def possible(self) -> list[str]:
        """The providers that a call may take, depending on its arguments."""
        found = []
        for candidate in self.implementations:
            found.append(candidate.provider)
            if candidate.supports is None:
                break
        return found


# (op's name, key, implementations that can run) -> (a provider, the plugin that says so) or None
Vote = Callable[[str, SelectionKey, tuple[Implementation, ...]], "tuple[str, str] | None"]


def environment_variable(op: str) -> str:
    """`TRILITH_IMPL_TRILITH_RMS_NORM` for trilith::rms_norm."""
    return "TRILITH_IMPL_" + re.sub(r"[^A-Za-z0-9]+", "_", op).upper()


def choose(op: Op, key: SelectionKey, scoped: str | None) -> Selection:
    """The selection of an op there, where `use_implementation` may have named a provider."""
    name = op.spec.name
    variable = environment_variable(name)
    if scoped is not None and scoped.startswith(_PREFERRED):
        able, first = runnable(op, key), scoped.removeprefix(_PREFERRED)
        return Selection(_moved_up(able, first), "preferred where it can run")
    if scoped is not None:
        return _by_name(op, key, scoped, "use_implementation")
    if os.environ.get(variable):
        return _by_name(op, key, os.environ[variable], variable)
    able = runnable(op, key)
    vote = op.vote(name, key, able) if op.vote is not None and able else None
    if vote is None:
        _warn_of_tie(op, able)
        reason = "the highest priority of those that can run"
        return Selection(able, reason, is_choice=False)
    provider, voter = vote
    chosen = () if provider == REFERENCE else _moved_up(able, provider)
    return Selection(chosen, f"plugin {voter} chose it")


def _moved_up(able: tuple[Implementation, ...], first: str) -> tuple[Implementation, ...]:
    return tuple(sorted(able, key=lambda i: i.provider != first))


def runnable(op: Op, key: SelectionKey) -> tuple[Implementation, ...]:
    """The implementations that can run there, best first."""
    return tuple(i for i in op.implementations if i.refusal(key.device, key.dtype) is None)


def _by_name(op: Op, key: SelectionKey, provider: str, asker: str) -> Selection:
    reason = f"{asker} names it"
    if provider == REFERENCE:
        return Selection((), reason)
    found = next((i for i in op.implementations if i.provider == provider), None)
    if found is None:
        raise ValueError(
            f"{op.spec.name}: {asker} must name one of {', '.join(providers(op))}, got {provider!r}"
        )
    refusal = found.refusal(key.device, key.dtype)
    if refusal is not None:
        raise NotImplementedError(f"{op.spec.name}: {asker} names {provider!r}, which {refusal}")
    return Selection((found,), reason, asker)


def providers(op: Op) -> list[str]:
    """What an implementation of this op can be asked for by."""
    return [*(i.provider for i in op.implementations), REFERENCE]


def supporting(op: Op, selection: Selection, args: tuple[object, ...]) -> str | None:
    """The first provider that takes these arguments; None is the reference."""
    for candidate in selection.implementations:
        if candidate.supports is None or _asked(op, candidate, args):
            return candidate.provider
    _require_unnamed(op, selection, "refuses these arguments")
    return None


def _require_unnamed(op: Op, selection: Selection, why: str) -> None:
    if selection.asker:
        raise NotImplementedError(
            f"{op.spec.name}: {selection.asker} names {selection.first!r}, whose supports() {why}"
        )


def _asked(op: Op, candidate: Implementation, args: tuple[object, ...]) -> bool:
    assert candidate.supports is not None
    try:
        return bool(candidate.supports(*args))
    except Exception as error:
        owner = op.owner_of(candidate.provider)
        raise RuntimeError(
            f"{op.spec.name}: supports() of {candidate.provider!r} (of {owner}) raised "
            f"{type(error).__name__}: {error}"
        ) from error


def traceable(op: Op, selection: Selection) -> str | None:
    """The provider that torch.compile bakes in: the first that takes any arguments."""
    for candidate in selection.implementations:
        if candidate.supports is None:
            return candidate.provider
    _require_unnamed(op, selection, "cannot see the arguments under torch.compile")
    return None


_tied: set[tuple[str, str, str]] = set()


def _warn_of_tie(op: Op, able: tuple[Implementation, ...]) -> None:
    if len(able) < 2 or able[0].priority != able[1].priority:
        return
    first, second = (f"{i.provider} (of {op.owner_of(i.provider)})" for i in able[:2])
    if (op.spec.name, first, second) in _tied:
        return
    _tied.add((op.spec.name, first, second))
    warnings.warn(
        f"{op.spec.name}: {first} and {second} have the same priority, {able[0].priority}; "
        f"{able[0].provider} runs, being registered first. Choose by "
        f"{environment_variable(op.spec.name)} or trilith.use_implementation",
        PluginWarning,
        stacklevel=2,
    )


def forced(op: Op, provider: str) -> AbstractContextManager[None]:
    """Inside, calls of the op in this thread or task take this provider, or raise.

    Raises:
        ValueError: the op has no such provider; the message lists those that it has.
    """
    if provider not in providers(op):
        raise ValueError(
            f"{op.spec.name}: provider must be one of {', '.join(providers(op))}, got {provider!r}"
        )
    return _scope(op, provider)


def scope_of_caller(op: Op) -> str | None:
    """In a thread that autograd made: the scope of the op where backward was called.

    torch 2.13 takes the context variables of that thread along; before, the scope that was entered
    last is taken for it.
    """
    if torch._C._is_key_in_tls("context"):
        return torch._C._get_obj_in_tls("context").get(op.scope)
    if threading.get_ident() in {thread.ident for thread in threading.enumerate()}:
        return None
    return op.open_scopes[-1] if op.open_scopes else None


def preferred(op: Op, provider: str) -> AbstractContextManager[None]:
    """As `forced`, but calls that the provider cannot take go to the next one."""
    return _scope(op, _PREFERRED + provider)


@contextmanager
def _scope(op: Op, name: str) -> Iterator[None]:
    token = op.scope.set(name)
    op.enter_scope(name)
    try:
        yield
    finally:
        op.leave_scope(name)
        op.scope.reset(token)
