"""What a notebook does: a cell is run again, a plugin is a class, is removed and added anew."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilith.plugins import (
    Implementation,
    Manager,
    ModuleSpec,
    Op,
    OpSpec,
    PluginWarning,
    Registry,
    Sample,
    ScoreMod,
    hookimpl,
)
from trilith.plugins.op import defined

NAME = "acme_cell::times"


@pytest.fixture
def manager():
    """Alone with its registry; the op of the cell is gone afterwards."""
    made = Manager(Registry())
    made.load([])
    yield made
    if NAME in defined():
        defined()[NAME].destroy()


def forward(x: Tensor) -> tuple[Tensor, ...]:
    return (x * 2,)


def run_cell(factor: float) -> Op:
    def scaled(x: Tensor) -> tuple[Tensor, ...]:
        return (x * factor,)

    scaled.__qualname__ = "scaled"  # as at the top of a cell
    return Op(
        OpSpec(
            name=NAME,
            forward=scaled,
            backward=lambda ctx, dy: (dy * factor,),
            reference=lambda x: x * factor,
            samples=lambda device, dtype: [Sample(torch.randn(3, device=device, dtype=dtype))],
            devices=("cpu", "cuda"),
        )
    )


class Brings:
    """All kinds of things."""

    @hookimpl
    def trilith_register_ops(self) -> Any:
        return [defined()[NAME]]

    @hookimpl
    def trilith_register_modules(self) -> Any:
        return [ModuleSpec(slot="norm", name="acme.norm", build=lambda config: nn.Identity())]

    @hookimpl
    def trilith_register_score_mods(self) -> Any:
        return [ScoreMod("acme.mod", forward, forward, lambda score, b, h, q, k: score)]


class Another:
    """Somebody else's implementation of the cell's op."""

    @hookimpl
    def trilith_register_implementations(self) -> Any:
        return [
            Implementation(
                op=NAME,
                provider="another",
                forward=lambda x: (x * 100,),
                backward=lambda ctx, dy: (dy * 100,),
                devices=("cpu", "cuda"),
                priority=1,
            )
        ]


def test_a_cell_is_run_again(manager):
    old = run_cell(2.0)
    compiled = torch.compile(lambda x: op(x), backend="aot_eager", fullgraph=True)
    op, x = old, torch.ones(3, requires_grad=True)
    assert torch.equal(compiled(x), torch.full((3,), 2.0))
    op = run_cell(3.0)
    assert defined()[NAME] is op is not old
    for call in (op, compiled):
        (dx,) = torch.autograd.grad(call(x).sum(), x)
        assert torch.equal(dx, torch.full((3,), 3.0))


def test_an_op_of_another_source_is_not_replaced(manager):
    run_cell(2.0)
    spec = OpSpec(
        name=NAME,
        forward=forward,
        backward=None,
        reference=lambda x: x,
        samples=lambda device, dtype: [],
    )
    with pytest.raises(ValueError, match=r"by no plugin, with the forward \S+scaled; its destroy"):
        Op(spec)


def test_an_op_that_a_plugin_brought_is_not_replaced(manager):
    op = run_cell(2.0)
    manager.add("cell", Brings)
    with pytest.raises(ValueError, match=r"by cell; trilith.plugins.manager.remove\('cell'\)"):
        run_cell(3.0)
    assert manager.registry.op(NAME) is op


def test_what_is_removed_can_be_added_anew(manager):
    registry = manager.registry
    assert not manager.remove("cell")
    old = run_cell(2.0)
    assert manager.add("cell", Brings)
    assert manager.remove("cell")
    assert manager.loaded == registry.op_names() == registry.module_names("norm") == []
    assert registry.score_mod_names() == []
    assert torch.equal(old(torch.ones(2)), torch.full((2,), 2.0))  # a model may hold it
    new = run_cell(3.0)
    assert manager.add("cell", Brings)
    assert registry.op(NAME) is new
    assert torch.equal(new(torch.ones(2)), torch.full((2,), 3.0))


def test_a_plugin_added_twice_is_refused_and_stays(manager):
    op = run_cell(2.0)
    manager.add("cell", Brings)
    with pytest.warns(PluginWarning, match=r"cell is loaded already; trilith.*remove\('cell'\)"):
        assert not manager.add("cell", Brings)
    assert manager.loaded == ["cell"]
    assert manager.registry.op(NAME) is op


class Failing(Brings):
    """Fails after its op was taken in."""

    @hookimpl
    def trilith_register_score_mods(self) -> Any:
        raise RuntimeError("no score mods today")


def test_the_cells_of_a_plugin_that_failed_are_run_again(manager):
    run_cell(2.0)
    with pytest.warns(PluginWarning, match="no score mods today"):
        assert not manager.add("cell", Failing)
    assert [failure.plugin for failure in manager.failures] == ["cell"]
    new = run_cell(3.0)
    assert manager.add("cell", Brings)
    assert manager.registry.op(NAME) is new
    assert manager.failures == []


@pytest.mark.filterwarnings("ignore::trilith.plugins.PluginWarning")
def test_a_plugin_that_fails_takes_nothing_from_one_added_meanwhile(manager):
    started, proceed = threading.Event(), threading.Event()

    def slow() -> Any:
        started.set()
        assert proceed.wait(5)
        raise RuntimeError("no network")

    op = run_cell(2.0)
    first = threading.Thread(target=manager.add, args=("slow", slow))
    first.start()
    assert started.wait(5)
    second = threading.Thread(target=manager.add, args=("cell", Brings))
    second.start()
    second.join(0.1)
    proceed.set()
    first.join(5)
    second.join(5)
    assert manager.loaded == ["cell"]
    assert manager.registry.op(NAME) is op


def test_implementations_are_removed_from_ops_of_others(manager):
    op = run_cell(2.0)
    manager.add("cell", Brings)
    manager.add("another", Another)
    assert torch.equal(op(torch.ones(1)), torch.full((1,), 100.0))
    manager.remove("another")
    assert torch.equal(op(torch.ones(1)), torch.full((1,), 2.0))
    manager.add("another", Another)
    assert torch.equal(op(torch.ones(1)), torch.full((1,), 100.0))


class Entry:
    """An entry point that names a class."""

    name = "cell"
    dist = None

    def load(self) -> Any:
        return Brings


def test_an_entry_point_may_name_a_class():
    run_cell(2.0)
    manager = Manager(Registry())
    manager.load([Entry()])
    assert not manager.failures
    assert manager.registry.op_names() == [NAME]
    defined()[NAME].destroy()


def test_an_op_that_is_not_here_says_so_when_it_is_unpickled(manager):
    op = run_cell(2.0)
    written = pickle.dumps(op)
    assert pickle.loads(written) is op
    op.destroy()
    with pytest.raises(KeyError, match=f"no op '{NAME}' here: the plugin that brings it is not"):
        pickle.loads(written)
