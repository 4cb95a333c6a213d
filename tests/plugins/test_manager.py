"""Loading plugins: order, guards, rollback, what the environment allows."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilith.plugins import (
    CONTRACT,
    Implementation,
    Manager,
    ModuleSpec,
    OpSpec,
    PluginWarning,
    Registry,
    Sample,
    hookimpl,
)

pytestmark = pytest.mark.filterwarnings("error::trilith.plugins.PluginWarning")


def _double(x: Tensor) -> tuple[Tensor, ...]:
    return (x * 2,)


def _spec(name: str) -> OpSpec:
    return OpSpec(
        name=name,
        forward=_double,
        backward=lambda ctx, dy: (dy * 2,),
        reference=lambda x: x * 2,
        samples=lambda device, dtype: [Sample(torch.randn(3, device=device, dtype=dtype))],
        devices=("cpu", "cuda"),
    )


class Plugin:
    """A plugin that brings what it is given."""

    def __init__(self, ops: Any = (), implementations: Any = (), modules: Any = ()) -> None:
        self._answers = ops, implementations, modules

    @hookimpl
    def trilith_register_ops(self) -> Any:
        return self._answers[0]

    @hookimpl
    def trilith_register_implementations(self) -> Any:
        return self._answers[1]

    @hookimpl
    def trilith_register_modules(self) -> Any:
        return self._answers[2]


@dataclass
class Entry:
    """What importlib.metadata gives for one entry point."""

    distribution: str
    name: str
    plugin: Any

    @property
    def dist(self) -> Any:
        return SimpleNamespace(name=self.distribution)

    def load(self) -> Any:
        return self.plugin() if isinstance(self.plugin, type(_double)) else self.plugin


@pytest.fixture
def registry():
    made = Registry()
    yield made
    for op in made.ops():
        op.destroy()


@pytest.fixture
def manager(registry: Registry) -> Manager:
    return Manager(registry)


def _broken_import() -> Any:
    raise ImportError("no module named acme_native")


def test_a_plugins_op_runs_and_has_a_gradient(manager, registry):
    manager.load([Entry("acme", "layers", Plugin(ops=[_spec("acme_a::double")]))])
    x = torch.randn(3, requires_grad=True)
    registry.op("acme_a::double")(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert manager.loaded == ["acme:layers"]


def test_ten_broken_plugins_of_fifty_leave_forty(manager, registry):
    entries = []
    for i in range(50):
        plugin: Any = Plugin(ops=[_spec(f"acme_fifty::op{i}")])
        entries.append(Entry(f"dist{i:02}", "p", _broken_import if i % 5 == 0 else plugin))
    with pytest.warns(PluginWarning, match="no module named acme_native"):
        manager.load(entries)
    assert len(manager.loaded) == 40
    assert [f.plugin for f in manager.failures] == [f"dist{i:02}:p" for i in range(0, 50, 5)]
    assert {f.stage for f in manager.failures} == {"import"}
    assert len(registry.op_names()) == 40


def test_what_a_plugin_brought_before_it_failed_is_taken_back(manager, registry):
    good = _spec("acme_roll::kept")
    half = Plugin(ops=[_spec("acme_roll::lost"), good])
    with pytest.warns(PluginWarning, match="already defined by a:first"):
        manager.load([Entry("a", "first", Plugin(ops=[good])), Entry("b", "second", half)])
    assert registry.op_names() == ["acme_roll::kept"]
    assert manager.failures[0].stage == "trilith_register_ops"
    manager.add("c:third", lambda: Plugin(ops=[_spec("acme_roll::lost")]))
    assert registry.op_names() == ["acme_roll::kept", "acme_roll::lost"]


def test_implementations_and_modules_of_a_failed_plugin_are_taken_back(manager, registry):
    manager.add("a:ops", lambda: Plugin(ops=[_spec("acme_impl::op")]))
    other = Implementation(
        op="acme_impl::op", provider="fast", forward=_double, backward=lambda ctx, dy: (dy,)
    )
    module = ModuleSpec(slot="norm", name="acme.norm", build=nn.LayerNorm)
    with pytest.warns(PluginWarning, match="already defined"):
        manager.add("b:bad", lambda: Plugin(implementations=[other], modules=[module, module]))
    assert [i.provider for i in registry.op("acme_impl::op").implementations] == ["acme_impl"]
    assert registry.module_names("norm") == []


def test_a_misspelt_hook_is_named(manager):
    class Misspelt(Plugin):
        @hookimpl
        def trilith_register_opps(self) -> Any:
            return []

    with pytest.warns(PluginWarning, match="trilith_register_opps"):
        manager.add("acme:typo", Misspelt)
    assert manager.failures[0].stage == "hooks"


def test_a_hook_that_raises_is_reported_with_its_name(manager):
    class Raising(Plugin):
        @hookimpl
        def trilith_register_modules(self) -> Any:
            raise RuntimeError("no licence found")

    with pytest.warns(PluginWarning, match="trilith_register_modules.*no licence found"):
        manager.add("acme:raising", Raising)


def test_a_newer_contract_is_refused_with_both_versions(manager):
    plugin = Plugin()
    plugin.TRILITH_CONTRACT = (CONTRACT[0] + 1, 0)
    with pytest.warns(PluginWarning, match=rf"\({CONTRACT[0] + 1}, 0\).*\({CONTRACT[0]}, "):
        manager.add("acme:newer", lambda: plugin)
    assert manager.failures[0].stage == "contract"


def test_order_is_by_distribution_and_name_ours_first(manager):
    names = [("b", "x"), ("trilith", "trilith"), ("a", "z"), ("a", "y")]
    manager.load([Entry(d, n, Plugin()) for d, n in names])
    assert manager.loaded == ["trilith:trilith", "a:y", "a:z", "b:x"]


def test_two_entry_points_of_one_name_both_load(manager):
    manager.load([Entry("a", "layers", Plugin()), Entry("b", "layers", Plugin())])
    assert manager.loaded == ["a:layers", "b:layers"]


@pytest.mark.parametrize(
    ("variable", "value", "loaded"),
    [
        ("TRILITH_DISABLED_PLUGINS", "a", ["trilith:own", "b:x"]),
        ("TRILITH_DISABLED_PLUGINS", "x", ["trilith:own"]),
        ("TRILITH_DISABLED_PLUGINS", "b:x", ["trilith:own", "a:x"]),
        ("TRILITH_PLUGINS", "b", ["trilith:own", "b:x"]),
        ("TRILITH_PLUGINS", "", ["trilith:own"]),
        ("TRILITH_DISABLE_PLUGIN_AUTOLOAD", "1", ["trilith:own"]),
    ],
)
def test_the_environment_leaves_plugins_out_without_importing_them(
    manager, monkeypatch, variable, value, loaded
):
    monkeypatch.setenv(variable, value)
    imported = []

    def entry(distribution: str, name: str) -> Entry:
        def load() -> Any:
            imported.append(f"{distribution}:{name}")
            return Plugin()

        return Entry(distribution, name, load)

    manager.load([entry("a", "x"), entry("b", "x"), entry("trilith", "own")])
    assert manager.loaded == loaded == imported


def test_strict_mode_raises(manager, monkeypatch):
    monkeypatch.setenv("TRILITH_STRICT_PLUGINS", "1")
    with pytest.raises(RuntimeError, match="acme_native"):
        manager.add("acme:broken", _broken_import)


def test_loading_happens_once_and_threads_wait_for_it(manager):
    started, proceed, count = threading.Event(), threading.Event(), []

    def slow() -> Any:
        count.append(1)
        started.set()
        assert proceed.wait(5)
        return Plugin()

    entries = [Entry("a", "slow", slow)]
    first = threading.Thread(target=manager.load, args=(entries,))
    first.start()
    assert started.wait(5)
    second = threading.Thread(target=manager.load, args=(entries,))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    proceed.set()
    first.join(5)
    second.join(5)
    assert manager.loaded == ["a:slow"]
    assert count == [1]
