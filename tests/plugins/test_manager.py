"""Loading plugins: order, guards, rollback, what the environment allows."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
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
    Op,
    OpSpec,
    PluginWarning,
    Registry,
    Sample,
    ScoreMod,
    discovery,
    hookimpl,
    interpreter,
)
from trilith.plugins.discovery import OWN
from trilith.plugins.selection import SelectionKey

manager_module = import_module("trilith.plugins.manager")
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

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


def _broken_import() -> Any:
    raise ImportError("no module named acme_native")


def test_a_plugins_op_runs_and_has_a_gradient(manager, registry):
    manager.load([Entry("acme", "layers", Plugin(ops=[_spec("acme_a::double")]))])
    x = torch.randn(3, requires_grad=True)
    registry.op("acme_a::double")(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert manager.loaded == ["acme:layers"]


def test_an_op_that_is_not_there_yet_is_looked_for_among_plugins(manager, registry):
    entry = Entry("acme", "layers", Plugin(ops=[_spec("acme_late::double")]))
    registry.before_lookup = lambda: manager.load([entry])
    assert registry.op("acme_late::double").spec.name == "acme_late::double"


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
    with pytest.warns(PluginWarning, match="of b:second is already defined by a:first"):
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


def _score_mod(name: str) -> ScoreMod:
    return ScoreMod(name, None, None, lambda score, b, h, q, k: score)


def test_a_score_mod_of_a_failed_plugin_is_taken_back(registry):
    with pytest.raises(KeyError), registry.transaction():
        registry.add_score_mod(_score_mod("acme.mod"), "acme:mods")
        raise KeyError
    assert registry.score_mod_names() == []


def test_modules_and_score_mods_are_listed_by_owner(registry):
    for owner in ("acme", "bolt"):
        registry.add_module(ModuleSpec("norm", f"{owner}.norm", nn.LayerNorm), f"{owner}:x")
        registry.add_score_mod(_score_mod(f"{owner}.mod"), f"{owner}:x")
    assert registry.module_names("norm", owner="bolt:x") == ["bolt.norm"]
    assert registry.score_mod_names(owner="bolt:x") == ["bolt.mod"]


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


def _dispatcher_knows(name: str) -> bool:
    return any(torch._C._dispatch_has_kernel(f"{name}_{part}") for part in ("fwd", "bwd"))


def _raise(error: BaseException) -> Any:
    raise error


def test_torchs_definitions_of_a_failed_plugin_are_taken_back(manager, registry):
    bad = Plugin(ops=[_spec("acme_torch::lost")], modules=[None])
    with pytest.warns(PluginWarning, match="must return a sequence of ModuleSpec, got None"):
        manager.add("a:bad", lambda: bad)
    assert not _dispatcher_knows("acme_torch::lost")
    manager.add("b:good", lambda: Plugin(ops=[_spec("acme_torch::lost")]))
    assert _dispatcher_knows("acme_torch::lost")


def test_an_op_made_by_a_failed_import_leaves_its_name_free(manager, registry):
    def load() -> Any:
        Op(_spec("acme_made::op"))
        raise ImportError("half way")

    with pytest.warns(PluginWarning, match="half way"):
        manager.add("a:bad", load)
    manager.add("b:good", lambda: Plugin(ops=[_spec("acme_made::op")]))
    assert manager.loaded == ["b:good"]
    assert torch.equal(registry.op("acme_made::op")(torch.ones(2)), torch.full((2,), 2.0))


def test_an_op_that_a_failed_plugin_shares_with_a_good_one_still_works(manager, registry):
    shared: list[Op] = []

    def load_both() -> Any:
        shared.append(Op(_spec("acme_shared::op")))
        raise ImportError("the other half")

    with pytest.warns(PluginWarning, match="the other half"):
        manager.add("a:bad", load_both)
    manager.add("b:good", lambda: Plugin(ops=shared))
    assert torch.equal(registry.op("acme_shared::op")(torch.ones(2)), torch.full((2,), 2.0))


def test_an_op_cannot_be_made_twice(manager):
    op = Op(_spec("acme_twice::op"))
    manager.add("a:first", lambda: Plugin(ops=[op]))
    with pytest.warns(PluginWarning, match="acme_twice::op is already defined, by a:first"):
        manager.add("b:second", lambda: Plugin(ops=[Op(_spec("acme_twice::op"))]))


def test_two_providers_of_one_name_are_both_named(manager):
    other = Implementation("acme_two::op", "fast", _double, lambda ctx, dy: (dy,))
    manager.add("a:ops", lambda: Plugin(ops=[_spec("acme_two::op")]))
    manager.add("b:fast", lambda: Plugin(implementations=[other]))
    with pytest.warns(PluginWarning, match="'fast' exists already, of b:fast; c:fast must choose"):
        manager.add("c:fast", lambda: Plugin(implementations=[other]))


def test_a_plugin_may_implement_an_op_of_a_later_one(manager, registry):
    other = Implementation("acme_later::op", "early", _double, lambda ctx, dy: (dy,))
    entries = [
        Entry("a", "implements", Plugin(implementations=[other])),
        Entry("b", "defines", Plugin(ops=[_spec("acme_later::op")])),
    ]
    manager.load(entries)
    assert manager.loaded == ["b:defines", "a:implements"]
    assert [i.provider for i in registry.op("acme_later::op").implementations] == [
        "acme_later",
        "early",
    ]


def _chain(length: int) -> list[Entry]:
    """Each implements the next one's op, and is loaded before it."""
    return [
        Entry(
            f"dist{i}",
            "p",
            Plugin(
                ops=[_spec(f"acme_chain{i}::op")],
                implementations=[
                    Implementation(f"acme_chain{i + 1}::op", "by", _double, lambda ctx, dy: (dy,))
                ],
            ),
        )
        for i in range(length)
    ]


def test_plugins_in_a_chain_implement_each_others_ops(manager, registry):
    last = Entry("dist4", "p", Plugin(ops=[_spec("acme_chain4::op")]))
    manager.load([*_chain(4), last])
    assert manager.loaded == [f"dist{i}:p" for i in (4, 3, 2, 1, 0)]
    assert [i.provider for i in registry.op("acme_chain1::op").implementations] == [
        "acme_chain1",
        "by",
    ]


def test_of_a_chain_without_an_end_each_is_left_out_once(manager):
    with pytest.warns(PluginWarning) as warned:
        manager.load([*_chain(3), Entry("z", "alone", Plugin())])
    assert manager.loaded == ["z:alone"]
    assert len(warned) == len(manager.failures) == 3


def test_an_implementation_of_no_op_says_which_there_are(manager):
    manager.add("a:ops", lambda: Plugin(ops=[_spec("acme_none::two"), _spec("acme_others::op")]))
    lost = Implementation("acme_none::op", "lost", _double, lambda ctx, dy: (dy,))
    with pytest.warns(PluginWarning, match="no op 'acme_none::op'.*; there are: acme_none::two$"):
        manager.add("b:lost", lambda: Plugin(implementations=[lost]))
    stray = Implementation("acme_nowhere::xyz", "lost", _double, lambda ctx, dy: (dy,))
    known = r"there are: acme_none::\*, acme_others::\*$"
    with pytest.warns(PluginWarning, match=f"no op 'acme_nowhere::xyz'; {known}"):
        manager.add("c:stray", lambda: Plugin(implementations=[stray]))


def test_parts_are_ops_that_some_plugin_has(manager, registry):
    fused = replace(_spec("acme_parts::fused"), parts=("acme_parts::later",))
    later = Entry("b", "defines", Plugin(ops=[_spec("acme_parts::later")]))
    lost = Plugin(ops=[replace(_spec("acme_parts::lost"), parts=("acme_parts::none",))])
    with pytest.warns(PluginWarning, match="parts names no op 'acme_parts::none'"):
        manager.load([Entry("a", "fuses", Plugin(ops=[fused])), later, Entry("c", "lost", lost)])
    assert manager.loaded == ["b:defines", "a:fuses"]
    assert "stands in blocks for: acme_parts::later" in registry.explain(
        "acme_parts::fused", torch.device("cpu"), torch.float32
    )


def test_installed_plugins_come_before_one_that_is_added(manager, registry):
    installed = [Entry("acme", "ops", Plugin(ops=[_spec("acme_add::op")]))]
    registry.before_lookup = lambda: manager.loaded or manager.load(installed)
    other = Implementation("acme_add::op", "fast", _double, lambda ctx, dy: (dy,))
    assert manager.add("b:impl", lambda: Plugin(implementations=[other]))
    assert manager.loaded == ["acme:ops", "b:impl"]


def _wrapping(**how: bool) -> SimpleNamespace:
    @hookimpl(**how)
    def wraps() -> Any:
        return (yield)

    return SimpleNamespace(trilith_register_ops=wraps)


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (SimpleNamespace(), "no hook found"),
        (SimpleNamespace(trilith_register_ops=lambda: []), "trilith_register_ops must be marked"),
        (SimpleNamespace(register=hookimpl(lambda: [])), "unknown hook register"),
        (SimpleNamespace(trilith_register_ops=hookimpl(lambda what: [])), "what"),
        (_wrapping(wrapper=True), "not wrap others"),
        (_wrapping(hookwrapper=True), "not wrap others"),
    ],
)
def test_hooks_that_pluggy_would_pass_over_are_refused(manager, plugin, reason):
    with pytest.warns(PluginWarning, match=reason):
        assert not manager.add("acme:odd", lambda: plugin)
    assert manager.failures[0].stage == "hooks"


def test_a_package_named_like_a_hook_is_none(manager):
    plugin = Plugin()
    plugin.trilith_acme = SimpleNamespace()
    assert manager.add("trilith-acme:acme", lambda: plugin)


def test_a_hook_may_be_a_generator(manager):
    class Yielding(Plugin):
        @hookimpl
        def trilith_register_ops(self) -> Any:
            yield _spec("acme_yield::op")

    assert manager.add("acme:yields", Yielding)
    assert manager.registry.op_names() == ["acme_yield::op"]


def test_a_user_may_interrupt_loading(manager):
    with pytest.raises(KeyboardInterrupt):
        manager.load([Entry("a", "slow", lambda: _raise(KeyboardInterrupt()))])
    manager.load([Entry("a", "slow", Plugin())])
    assert manager.loaded == ["a:slow"]


def test_what_a_factory_builds_must_be_a_module(manager, registry):
    module = ModuleSpec(slot="norm", name="acme.norm", build=lambda config: "norm")
    manager.add("acme:modules", lambda: Plugin(modules=[module]))
    with pytest.raises(TypeError, match=r"norm 'acme.norm' of acme:modules.*got 'norm'"):
        registry.build_module("norm", "acme.norm", None)


def test_a_plugin_that_exits_stops_nobody(manager):
    with pytest.warns(PluginWarning, match="SystemExit: no licence"):
        manager.load(
            [
                Entry("a", "exits", lambda: _raise(SystemExit("no licence"))),
                Entry("b", "good", Plugin()),
            ]
        )
    assert manager.loaded == ["b:good"]


@pytest.mark.parametrize("wanted", [(CONTRACT[0], CONTRACT[1] + 1), (CONTRACT[0] - 1, 9)])
def test_another_contract_is_refused(manager, wanted):
    plugin = Plugin()
    plugin.TRILITH_CONTRACT = wanted
    with pytest.warns(PluginWarning, match="written for plugin contract"):
        assert not manager.add("acme:other", lambda: plugin)


def test_distributions_are_named_as_packaging_names_them(manager, monkeypatch):
    monkeypatch.setenv("TRILITH_DISABLED_PLUGINS", "Acme_Layers, other")
    manager.load([Entry("acme-layers", "x", Plugin()), Entry("b", "y", Plugin())])
    assert manager.loaded == ["b:y"]
    assert manager.disabled == ["acme-layers:x"]


def test_strict_loading_raises_each_time_and_keeps_what_loaded(manager, monkeypatch):
    monkeypatch.setenv("TRILITH_STRICT_PLUGINS", "1")
    entries = [Entry("a", "good", Plugin()), Entry("b", "bad", _broken_import)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="acme_native"):
            manager.load(entries)
    assert manager.loaded == ["a:good"]
    assert len(manager.failures) == 1


def test_loading_that_did_not_begin_begins_again(manager, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="another Triton"):
        patch.setattr(interpreter, "apply", lambda: _raise(RuntimeError("another Triton")))
        manager.load([])
    manager.load([Entry("a", "good", Plugin())])
    assert manager.loaded == ["a:good"]


def test_nothing_is_loaded_under_tracing(manager):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def trace(x: Tensor) -> Tensor:
        manager.load([Entry("a", "p", Plugin())])
        return x + 1

    with FakeTensorMode():
        manager.load([Entry("a", "p", Plugin())])
    make_fx(trace)(torch.ones(2))
    assert manager.loaded == []
    manager.load([Entry("a", "p", Plugin())])
    assert manager.loaded == ["a:p"]


def test_our_own_plugin_is_the_one_that_the_project_declares():
    (declared,) = re.findall(
        r"\[project.entry-points.trilith\]\ntrilith = \"(.*)\"", PYPROJECT.read_text()
    )
    assert declared == OWN.value


def test_our_own_plugin_needs_no_metadata(monkeypatch):
    monkeypatch.setattr(discovery, "entry_points", lambda group: ())
    own = Manager(Registry())
    try:
        own.load()
        assert own.loaded == ["trilith:trilith"]
        assert own.registry.module_names("norm") == ["layer_norm", "rms_norm"]
    finally:
        for op in own.registry.ops():
            op.adopt("trilith:trilith", manager_module.registry.vote)


def test_importing_the_library_loads_no_plugin():
    code = (
        "import trilith.plugins, trilith.kernels, trilith.blocks\n"
        "from trilith.plugins import manager\n"
        "assert not manager.loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


class Chooses:
    @hookimpl
    def trilith_select_implementation(self, op, key, candidates):
        return "reference"


def test_a_plugin_that_comes_again_by_another_name_is_still_heard_by_the_first():
    plugin, manager = Chooses(), Manager(Registry())
    assert manager.add("acme:a", lambda: plugin)
    with pytest.warns(PluginWarning, match="acme:b is left out"):
        assert not manager.add("acme:b", lambda: plugin)
    key = SelectionKey(torch.device("cpu"), torch.float32)
    assert manager.vote("acme::op", key, ()) == ("reference", "acme:a")
