"""Finds and loads plugins. One that is broken is rolled back and reported; the others work."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy
import torch

from trilith.plugins import op as op_module
from trilith.plugins.hookspecs import CONTRACT, PROJECT, HookSpecs
from trilith.plugins.op import Op
from trilith.plugins.registry import Registry, registry


class PluginWarning(UserWarning):
    """A plugin was left out, and why."""


@dataclass(frozen=True)
class Failure:
    """A plugin that was left out: at which stage, and for what reason."""

    plugin: str
    stage: str
    reason: str


class PluginError(RuntimeError):
    """Raised inside a plugin's guard; carries the stage."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.stage = stage


class Manager:
    """The plugins of one registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.loaded: list[str] = []
        self.failures: list[Failure] = []
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(HookSpecs)
        self._lock = threading.RLock()
        self._done = self._loading = False

    def load(self, found: Iterable[EntryPoint] | None = None) -> None:
        """Load every installed plugin that the environment allows; the second call does nothing."""
        if self._done:
            return
        with self._lock:
            if self._done or self._loading:
                return
            self._loading = True
            for name, entry_point in _in_order(
                entry_points(group=PROJECT) if found is None else found
            ):
                self.add(name, entry_point.load)
            self._done = True

    def add(self, name: str, load: Callable[[], Any]) -> bool:
        """Load one plugin inside its guard; whether it came in."""
        try:
            with self.registry.transaction():
                self._register(name, load)
        except PluginError as error:
            self.failures.append(Failure(name, error.stage, str(error)))
            if os.environ.get("TRILITH_STRICT_PLUGINS"):
                raise
            warnings.warn(
                f"plugin {name} is left out ({error.stage}): {error}", PluginWarning, stacklevel=2
            )
            return False
        self.loaded.append(name)
        return True

    def _register(self, name: str, load: Callable[[], Any]) -> None:
        plugin = _guarded("import", load)
        _guarded("contract", _check_contract, plugin)
        try:
            _guarded("hooks", self._accept, plugin, name)
            for hook, add in (
                ("trilith_register_ops", self.registry.add_op),
                ("trilith_register_implementations", self.registry.add_implementation),
                ("trilith_register_modules", self.registry.add_module),
            ):
                for spec in _guarded(hook, self._answers, plugin, hook):
                    _guarded(hook, add, spec, name)
        except PluginError:
            if self._pluggy.is_registered(plugin):
                self._pluggy.unregister(plugin)
            raise

    def _accept(self, plugin: Any, name: str) -> None:
        self._pluggy.register(plugin, name)
        known = {hook for hook in dir(HookSpecs) if hook.startswith("trilith_")}
        unknown = sorted(
            hook for hook in dir(plugin) if hook.startswith("trilith_") and hook not in known
        )
        if unknown:
            raise ValueError(
                f"unknown hook {', '.join(unknown)}; hooks are {', '.join(sorted(known))}"
            )

    def _answers(self, plugin: Any, hook: str) -> list[Any]:
        others = [p for p in self._pluggy.get_plugins() if p is not plugin]
        answers = self._pluggy.subset_hook_caller(hook, others)()
        return [spec for answer in answers for spec in answer]


def _guarded(stage: str, call: Callable[..., Any], *args: Any) -> Any:
    try:
        return call(*args)
    except Exception as error:
        raise PluginError(stage, error) from error


def _check_contract(plugin: Any) -> None:
    wanted = getattr(plugin, "TRILITH_CONTRACT", CONTRACT)
    if wanted[0] != CONTRACT[0] or tuple(wanted) > CONTRACT:
        raise RuntimeError(f"written for plugin contract {wanted}, this library has {CONTRACT}")


def _in_order(found: Iterable[EntryPoint]) -> list[tuple[str, EntryPoint]]:
    """Ours first, then by distribution and name; without those that the environment leaves out."""
    named: dict[tuple[bool, str, str], EntryPoint] = {}
    for entry_point in found:
        distribution = entry_point.dist.name if entry_point.dist else ""
        named.setdefault((distribution != PROJECT, distribution, entry_point.name), entry_point)
    chosen = []
    for (is_foreign, distribution, name), entry_point in sorted(named.items()):
        if not is_foreign or _allowed({distribution, name, f"{distribution}:{name}"}):
            chosen.append((f"{distribution}:{name}", entry_point))
    return chosen


def _allowed(names: set[str]) -> bool:
    if os.environ.get("TRILITH_DISABLE_PLUGIN_AUTOLOAD"):
        return False
    allowed, disabled = (
        os.environ.get(variable) for variable in ("TRILITH_PLUGINS", "TRILITH_DISABLED_PLUGINS")
    )
    if disabled and names & set(disabled.split(",")):
        return False
    return allowed is None or bool(names & set(allowed.split(",")))


manager = Manager(registry)
op_module.before_first_choice = manager.load


def find_op(name: str) -> Op:
    """The op of this name, as `find_op("acme::relu2")(x, 2.0)`; KeyError lists the names."""
    manager.load()
    return registry.op(name)


def explain(
    name: str, device: str | torch.device = "cuda", dtype: torch.dtype = torch.bfloat16
) -> str:
    """Which implementation a call of this op takes on a device and dtype, and why."""
    manager.load()
    return registry.explain(name, torch.device(device), dtype)
