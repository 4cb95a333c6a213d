"""`trilith.trace`: what it sees, and that nothing is left behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import trilith
from tests.plugins.small_ops import RELU2, randn
from trilith.kernels.norms import RMS_NORM, rms_norm
from trilith.plugins import Manager, PluginWarning, Registry, hookimpl


def _runs(events: Any) -> list[tuple[str, str, str]]:
    return [(e.op, e.provider, e.direction) for e in events]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_forward_and_backward_are_events():
    x = torch.randn(2, 8, device=_device(), requires_grad=True)
    with trilith.trace() as events:
        rms_norm(x, (8,), torch.ones(8, device=_device())).sum().backward()
    assert _runs(events) == [
        ("trilith::rms_norm", "trilith", "forward"),
        ("trilith::rms_norm", "trilith", "backward"),
    ]
    assert events[0].shapes == ((2, 8), (8,))
    assert events[0].dtypes == (torch.float32, torch.float32)
    assert events[1].shapes == ((2, 8),)


def test_the_reference_is_an_event_and_a_tensor_left_out_is_none():
    with trilith.trace() as events:
        rms_norm(torch.randn(2, 8, dtype=torch.float64), (8,))
    assert _runs(events) == [("trilith::rms_norm", "reference", "forward")]
    assert events[0].shapes == ((2, 8), None)
    assert events[0].dtypes == (torch.float64, None)


def test_compiled_code_is_seen():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: rms_norm(x, (8,)), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, device=_device(), requires_grad=True)
    compiled(x)
    with trilith.trace() as events:
        compiled(x).sum().backward()
    assert [e.direction for e in events] == ["forward", "backward"]


def test_compiled_code_is_not_compiled_again():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: rms_norm(x, (8,)), fullgraph=True, backend="eager")
    wide = torch.randn(2, 8, dtype=torch.float64)
    for x in (torch.randn(2, 8, device=_device()), wide):
        compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                with trilith.trace():
                    compiled(x)
                compiled(x)


def test_outside_nothing_is_wired():
    before = dict(vars(RMS_NORM))
    with trilith.trace() as outer:
        with trilith.trace() as inner:
            rms_norm(torch.randn(2, 8, device=_device()), (8,))
        rms_norm(torch.randn(2, 8, device=_device()), (8,))
    assert (len(outer), len(inner)) == (2, 1)
    rms_norm(torch.randn(2, 8, device=_device()), (8,))
    assert len(outer) == 2
    assert vars(RMS_NORM)["running"] is before["running"] is RMS_NORM._by_provider
    assert vars(RMS_NORM)["_reference"] is RMS_NORM.spec.reference


class Watcher:
    def __init__(self, fails: bool = False) -> None:
        self.seen: list[Any] = []
        self._fails = fails

    @hookimpl
    def trilith_op_called(self, event: Any) -> None:
        self.seen.append(event)
        if self._fails:
            raise RuntimeError("no disk")


@pytest.fixture
def manager() -> Manager:
    made = Manager(Registry())
    made.load([])
    return made


def test_plugins_hear_of_it_only_inside(manager):
    watcher = Watcher()
    manager.add("acme:watch", lambda: watcher)
    x = torch.randn(2, 8, device=_device())
    rms_norm(x, (8,))
    with manager.trace() as events:
        rms_norm(x, (8,))
    rms_norm(x, (8,))
    assert watcher.seen == events
    assert len(events) == 1


def test_a_watcher_that_raises_is_told_and_not_heard_again(manager):
    broken, good = Watcher(fails=True), Watcher()
    manager.add("acme:broken", lambda: broken)
    manager.add("acme:good", lambda: good)
    x = torch.randn(2, 8, device=_device())
    with pytest.warns(PluginWarning, match="acme:broken.*no disk"), manager.trace():
        rms_norm(x, (8,))
        rms_norm(x, (8,))
    assert (len(broken.seen), len(good.seen)) == (1, 2)
    assert manager.failures[0].stage == "trilith_op_called"


@pytest.mark.filterwarnings("ignore::trilith.plugins.PluginWarning")
def test_a_watcher_that_raises_in_two_threads_harms_neither(manager):
    both, calls = threading.Barrier(2), []

    class Both:
        @hookimpl
        def trilith_op_called(self, event: Any) -> None:
            both.wait(5)
            raise RuntimeError("no disk")

    def call() -> None:
        calls.append(rms_norm(torch.randn(2, 8, device=_device()), (8,)))

    manager.add("acme:both", Both)
    with manager.trace():
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert len(calls) == 2


def test_an_op_without_a_backward_says_so_inside_too(make):
    op = make(RELU2, backward=None)
    with trilith.trace() as events, pytest.raises(NotImplementedError, match="has no backward"):
        op(randn(3)).sum().backward()
    assert [event.direction for event in events] == ["forward"]
