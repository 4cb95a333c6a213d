"""Finds and loads plugins. One that is broken is rolled back and reported; the others work."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from inspect import getmembers, isroutine
from typing import Any

import pluggy
import torch

from trilith.plugins import discovery, interpreter, selection
from trilith.plugins import op as op_module
from trilith.plugins.hookspecs import CONTRACT, PROJECT, HookSpecs
from trilith.plugins.op import Op
from trilith.plugins.registry import Registry, UnknownOpError, registry
from trilith.plugins.selection import PluginWarning, SelectionKey
from trilith.plugins.spec import Implementation, ModuleSpec, OpSpec, ScoreMod
from trilith.plugins.trace import OpCalled, listening

_HOOKS = frozenset(hook for hook in dir(HookSpecs) if hook.startswith("trilith_"))


@dataclass(frozen=True)
class Failure:
    """A plugin that was left out: at which stage, and for what reason."""

    plugin: str
    stage: str
    reason: str


class PluginError(RuntimeError):
    """Raised inside a plugin's guard; carries the stage."""

    def __init__(self, stage: str, error: BaseException) -> None:
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        super().__init__(f"{type(error).__name__}: {said}")
        self.stage = stage


class Manager:
    """The plugins of one registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.loaded: list[str] = []
        self.disabled: list[str] = []
        self.failures: list[Failure] = []
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(HookSpecs)
        self._lock = threading.RLock()
        self._done = self._loading = False
        registry.vote = self.vote

    def load(self, found: Iterable[EntryPoint] | None = None) -> None:
        """Load every installed plugin that the environment allows; the second call does nothing.

        Nor does any call under tracing; the next one outside of it loads them.
        """
        if self._done or _tracing():
            return
        with self._lock:
            if self._done or self._loading:
                return
            self._loading = True
            try:
                interpreter.apply()
                self._load_all(discovery.installed() if found is None else found)
                self._done = True
            finally:
                self._loading = False

    def _load_all(self, found: Iterable[EntryPoint]) -> None:
        allowed, self.disabled = discovery.in_order(found)
        waiting = [(name, entry) for name, entry in allowed if name not in self.loaded]
        while waiting:  # for each other's ops, in chains of any length
            early = []
            for name, entry_point in waiting:
                error = self._attempt(name, entry_point.load)
                if error is not None and isinstance(error.__cause__, UnknownOpError):
                    early.append((name, entry_point, error))
                elif error is not None:
                    self._leave_out(name, error)
            if len(early) == len(waiting):
                for name, _, error in early:
                    self._leave_out(name, error)
                return
            waiting = [(name, entry_point) for name, entry_point, _ in early]

    def add(self, name: str, load: Callable[[], Any]) -> bool:
        """Load one plugin inside its guard, after the installed ones; whether it came in.

        `load` returns the plugin, a module or an object with hooks, or is its class.
        """
        self.registry.before_lookup()
        with self._lock:
            error = self._attempt(name, load)
        if error is not None:
            self._leave_out(name, error)
        return error is None

    def remove(self, name: str) -> bool:
        """Take out one plugin and all that it brought, so that it can be added anew, changed;
        whether it was there.

        Its ops go with every implementation that others brought for them. Who holds one can still
        call it until an op of that name is made again. An installed plugin stays out.
        """
        self.registry.before_lookup()
        with self._lock:
            if name not in self.loaded:
                return False
            self._pluggy.unregister(name=name)
            self.registry.remove(name)
            self.loaded.remove(name)
            self.registry.forget_selections()
        return True

    def _attempt(self, name: str, load: Callable[[], Any]) -> PluginError | None:
        try:
            with self.registry.transaction():
                self._register(name, load)
        except PluginError as error:
            return error
        self.loaded.append(name)
        self.failures[:] = [failure for failure in self.failures if failure.plugin != name]
        self.registry.forget_selections()
        return None

    def _leave_out(self, name: str, error: PluginError) -> None:
        self._report(name, error, "is left out")

    def _report(self, name: str, error: PluginError, what: str) -> None:
        failure = Failure(name, error.stage, str(error))
        if failure not in self.failures:
            self.failures.append(failure)
        if os.environ.get("TRILITH_STRICT_PLUGINS"):
            raise error
        warnings.warn(f"plugin {name} {what} ({error.stage}): {error}", PluginWarning, stacklevel=4)

    def _register(self, name: str, load: Callable[[], Any]) -> None:
        _guarded("name", self._require_unused, name)
        plugin = _guarded("import", load)
        if isinstance(plugin, type):
            plugin = _guarded("import", plugin)
        _guarded("contract", _check_contract, plugin)
        try:
            _guarded("hooks", self._accept, plugin, name)
            for hook, add, kinds in (
                ("trilith_register_ops", self.registry.add_op, (OpSpec, Op)),
                (
                    "trilith_register_implementations",
                    self.registry.add_implementation,
                    (Implementation,),
                ),
                ("trilith_register_modules", self.registry.add_module, (ModuleSpec,)),
                ("trilith_register_score_mods", self.registry.add_score_mod, (ScoreMod,)),
            ):
                for spec in _guarded(hook, self._answers, plugin, hook, kinds):
                    _guarded(hook, add, spec, name)
            _guarded("trilith_register_ops", self.registry.require_parts, name)
        except PluginError:
            if self._pluggy.get_name(plugin) == name:  # not, if it came earlier by another name
                self._pluggy.unregister(plugin)
            raise

    def _require_unused(self, name: str) -> None:
        if name in self.loaded:
            raise ValueError(
                f"plugin {name} is loaded already; trilith.plugins.manager.remove({name!r}) first"
            )

    def _accept(self, plugin: Any, name: str) -> None:
        self._pluggy.register(plugin, name)
        own = self._pluggy.get_hookcallers(plugin) or []
        marked = {caller.name for caller in own}
        named = {name for name, _ in getmembers(plugin, isroutine) if name.startswith("trilith_")}
        unknown = sorted((marked | named) - _HOOKS)
        if unknown:
            raise ValueError(
                f"unknown hook {', '.join(unknown)}; hooks are {', '.join(sorted(_HOOKS))}"
            )
        unmarked = sorted(named - marked)
        if unmarked:
            raise ValueError(f"{', '.join(unmarked)} must be marked @trilith.plugins.hookimpl")
        wrappers = sorted(c.name for c in own for i in c.get_hookimpls() if _wraps(i, plugin))
        if wrappers:
            raise ValueError(f"{', '.join(wrappers)} must answer for the plugin, not wrap others")
        if not marked:
            raise ValueError(f"no hook found; hooks are {', '.join(sorted(_HOOKS))}")

    def _answers(self, plugin: Any, hook: str, kinds: tuple[type, ...]) -> list[Any]:
        if plugin not in (owner for _, owner in self._having(hook)):
            return []
        wanted = f"{hook} must return a sequence of {' or '.join(k.__name__ for k in kinds)}"
        answers = self._ask(plugin, hook)  # pluggy leaves an answer of None out
        if not answers or isinstance(answers[0], str) or not isinstance(answers[0], Iterable):
            raise TypeError(f"{wanted}, got {answers[0] if answers else None!r}")
        specs = list(answers[0])
        for spec in specs:
            if not isinstance(spec, kinds):
                raise TypeError(f"{wanted}, got {spec!r} in it")
        return specs

    def _ask(self, plugin: Any, hook: str, **arguments: Any) -> Any:
        others = [p for p in self._pluggy.get_plugins() if p is not plugin]
        return self._pluggy.subset_hook_caller(hook, others)(**arguments)

    def _having(self, hook: str) -> list[tuple[str, Any]]:
        """Names and plugins that implement a hook, in pluggy's order of calling."""
        found = getattr(self._pluggy.hook, hook).get_hookimpls()
        return [(own.plugin_name, own.plugin) for own in reversed(found)]

    def vote(
        self, op: str, key: SelectionKey, candidates: tuple[Implementation, ...]
    ) -> tuple[str, str] | None:
        """The first opinion of `trilith_select_implementation`, and whose it is."""
        hook = "trilith_select_implementation"
        known = [c.provider for c in candidates] + [selection.REFERENCE]
        for name, plugin in self._having(hook):
            try:
                answer = self._ask(plugin, hook, op=op, key=key, candidates=candidates)
                if answer is not None and answer not in known:
                    raise ValueError(f"must answer one of {', '.join(known)}, got {answer!r}")
            except Exception as error:
                self._ignore(name, hook, error, f"about {op}")
                continue
            if answer is not None:
                return answer, name
        return None

    def _ignore(self, name: str, hook: str, error: Exception, what: str) -> None:
        problem = PluginError(hook, error)
        problem.__cause__ = error
        self._report(name, problem, f"is not heard {what}")

    @contextmanager
    def trace(self) -> Iterator[list[OpCalled]]:
        """See `trace`."""
        self.load()
        events: list[OpCalled] = []
        observers = dict(self._having("trilith_op_called"))

        def tell(event: OpCalled) -> None:
            events.append(event)
            for name, plugin in tuple(observers.items()):
                try:
                    self._ask(plugin, "trilith_op_called", event=event)
                except Exception as error:
                    observers.pop(name, None)  # another thread may have been first
                    self._ignore(name, "trilith_op_called", error, "in this trace any more")

        with listening(tell):
            yield events


def _tracing() -> bool:
    """Whether tensors made now would be stand-ins: no time to import anything."""
    if torch.compiler.is_compiling():
        return True
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))


def _guarded(stage: str, call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and what a plugin calls its own
        raise PluginError(stage, error) from error


def _wraps(implementation: Any, plugin: Any) -> bool:
    is_own = implementation.plugin is plugin
    return is_own and (implementation.wrapper or implementation.hookwrapper)


def _check_contract(plugin: Any) -> None:
    wanted = getattr(plugin, "TRILITH_CONTRACT", CONTRACT)
    if wanted[0] != CONTRACT[0] or tuple(wanted) > CONTRACT:
        raise RuntimeError(f"written for plugin contract {wanted}, this library has {CONTRACT}")


manager = Manager(registry)
op_module.before_first_choice = registry.before_lookup = manager.load


def find_op(name: str) -> Op:
    """The op of this name, as `find_op("acme::relu2")(x, 2.0)`; KeyError lists the names."""
    manager.load()
    return registry.op(name)


def explain(
    op: str | Op, device: str | torch.device | None = None, dtype: torch.dtype = torch.bfloat16
) -> str:
    """Which implementation a call of this op takes on a device and dtype, and why.

    The device is the GPU by default, the CPU where there is none.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"explain: dtype must be a torch.dtype, got {dtype!r}")
    manager.load()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return registry.explain(op, torch.device(device), dtype)


def use_implementation(op: str | Op, provider: str) -> AbstractContextManager[None]:
    """Inside, calls of one op take one provider's implementation, or raise.

    Only in this thread, or this asyncio task; scopes nest. A backward takes the implementation that
    its forward took, wherever it runs. What activation checkpointing recomputes is in the scope
    that backward is called in: call it inside too, or the recomputed forward is another's. (Before
    torch 2.13 a backward on a GPU does not know its caller: it is in the scope entered last.)
    Compiled code is compiled again for the scope, and the scope cannot be entered inside of it.

    Args:
        op: "trilith::rms_norm", or an op itself.
        provider: whose implementation; "reference" for plain PyTorch.

    Raises:
        ValueError: the op has no such provider.
        TypeError: op is neither a name nor an op.
        NotImplementedError: raised by a call whose device, dtype or arguments it does not take.

    Example:
        >>> with use_implementation("trilith::rms_norm", "reference"):
        ...     y = rms_norm(x, (512,))
    """
    manager.load()
    return selection.forced(registry.op(op), provider)


def trace() -> AbstractContextManager[list[OpCalled]]:
    """Collect, and tell plugins that have `trilith_op_called`, every run of every op inside.

    Runs of all threads are seen, those of compiled code too, unless they take the reference there.
    The backward of a reference is PyTorch's own and no event. Ops and implementations that come
    after the scope was entered are not seen in it.

    Example:
        >>> with trace() as events:
        ...     rms_norm(x, (512,)).sum().backward()
        >>> [(event.provider, event.direction) for event in events]
        [('trilith', 'forward'), ('trilith', 'backward')]
    """
    return manager.trace()
