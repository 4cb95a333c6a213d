"""use_implementation: what runs inside of it, in other threads, in backward, in compiled code."""

from __future__ import annotations

import _thread
import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import trilith
from tests.plugins.tagged_ops import op_of, plug_in, rival, tag_of
from tests.support.devices import DEVICE
from trilith.kernels import rms_norm
from trilith.kernels._runtime.launch import observers
from trilith.plugins import op as op_module


def test_use_implementation_takes_the_provider_and_gives_it_back(manager):
    op = op_of(manager, rival("acme_sel::op"))
    with trilith.use_implementation(op, "other"):
        assert tag_of(op) == 2.0
        with trilith.use_implementation(op, "reference"):
            assert tag_of(op) == 0.0
        assert tag_of(op) == 2.0
    assert tag_of(op) == 1.0


def test_use_implementation_finds_ops_by_name():
    from trilith.kernels.norms import rms_norm

    x = torch.randn(2, 4)
    with trilith.trace() as events, trilith.use_implementation("trilith::rms_norm", "reference"):
        rms_norm(x, (4,))
    assert [event.provider for event in events] == ["reference"]


def test_compiled_public_functions_follow_the_scope():
    from trilith.kernels.norms import rms_norm

    torch._dynamo.reset()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = torch.compile(lambda x: rms_norm(x, (4,)), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, device=device)
    for _ in range(3):
        for provider, runs in (("trilith", 1), ("reference", 0)):
            with (
                trilith.trace() as events,
                trilith.use_implementation("trilith::rms_norm", provider),
            ):
                compiled(x)
            assert [event.provider for event in events] == ["trilith"] * runs


def test_backward_takes_its_forwards_implementation(manager):
    op = op_of(manager, rival("acme_sel::op"))
    x = torch.zeros(3, requires_grad=True)
    with trilith.use_implementation(op, "other"):
        y = op(x)
    op(torch.zeros(3))
    y.sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_a_scope_does_not_reach_other_threads(manager):
    op = op_of(manager, rival("acme_sel::op"))
    tags: list[float] = []
    with trilith.use_implementation(op, "other"):
        thread = threading.Thread(target=lambda: tags.append(tag_of(op)))
        thread.start()
        thread.join()
    assert tags == [1.0]


def in_a_thread_that_python_did_not_make(run: Callable[[], float]) -> float:
    """As autograd's are, which run backward on a GPU."""
    found: list[float] = []
    done = threading.Event()

    def body() -> None:
        try:
            found.append(run())
        finally:
            done.set()

    _thread.start_new_thread(body, ())
    assert done.wait(60)
    return found[0]


def test_autograds_threads_are_in_the_scope_of_their_caller(manager):
    op = op_of(manager, rival("acme_sel::op"))
    assert in_a_thread_that_python_did_not_make(lambda: tag_of(op)) == 1.0
    with trilith.use_implementation(op, "other"):
        assert in_a_thread_that_python_did_not_make(lambda: tag_of(op)) == 2.0


def test_what_backward_recomputes_is_in_its_scope():
    """No kernel is started where the reference is asked for, wherever autograd runs."""
    started: list[Any] = []
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    observers.append(lambda kernel, *_: started.append(kernel))
    try:
        with trilith.use_implementation("trilith::rms_norm", "reference"):
            y = checkpoint(lambda x: rms_norm(x, (8,)), x, use_reentrant=False)
            y.sum().backward()
        assert not started
        checkpoint(lambda x: rms_norm(x, (8,)), x, use_reentrant=False).sum().backward()
        assert len(started) >= 3
    finally:
        observers.pop()


@pytest.mark.skipif(
    not hasattr(torch._C, "_remove_obj_from_tls"), reason="torch 2.13 says who called backward"
)
def test_of_several_scopes_autograds_thread_is_in_that_of_its_caller(manager):
    op = op_of(manager, rival("acme_sel::op"))

    def as_autograd_does(context: contextvars.Context) -> float:
        torch._C._stash_obj_in_tls("context", context)
        try:
            return tag_of(op)
        finally:
            torch._C._remove_obj_from_tls("context")

    outside = contextvars.copy_context()
    with trilith.use_implementation(op, "other"):
        callers = contextvars.copy_context()
        with trilith.use_implementation(op, "reference"):
            for context, tag in ((callers, 2.0), (outside, 1.0)):
                run = functools.partial(as_autograd_does, context)
                assert in_a_thread_that_python_did_not_make(run) == tag


def test_threads_with_scopes_of_their_own_run_their_own(manager):
    names = ["a", "b", "c"]
    op = op_of(
        manager,
        *(rival("acme_sel::op", n, 2.0 + i, priority=-1 - i) for i, n in enumerate(names)),
    )
    wrong: list[Any] = []
    barrier = threading.Barrier(len(names))

    def work(provider: str, tag: float) -> None:
        with trilith.use_implementation(op, provider):
            barrier.wait(10)
            for _ in range(50):
                x = torch.zeros(3, requires_grad=True)
                y = op(x)
                y.sum().backward()
                if y[0].item() != tag or x.grad[0].item() != tag:
                    wrong.append((provider, y, x.grad))

    threads = [threading.Thread(target=work, args=(n, 2.0 + i)) for i, n in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert tag_of(op) == 1.0


def test_an_op_that_is_its_reference_on_a_cpu_says_so(manager):
    """Whoever reads it calls torch's own function, so nobody may want to be told or to choose."""
    op = op_of(manager, devices=("cuda",))
    assert op.is_reference_on_cpu
    with trilith.use_implementation(op, "reference"):
        assert not op.is_reference_on_cpu
    assert op.is_reference_on_cpu
    with trilith.trace():
        assert not op.is_reference_on_cpu
    assert op.is_reference_on_cpu
    op.add_implementation(rival("acme_sel::op"))
    assert not op.is_reference_on_cpu


def test_plugins_have_a_say_before_an_op_is_its_reference_on_a_cpu(manager, monkeypatch):
    """A later answer would differ from the first, and a call from the one that it recomputes."""
    op = op_of(manager, devices=("cuda",))
    op.forget_selections()
    plugin = functools.partial(op.add_implementation, rival("acme_sel::op"))
    monkeypatch.setattr(op_module, "before_first_choice", plugin)
    assert not op.is_reference_on_cpu


def test_an_op_that_is_its_reference_says_so_of_a_call_in_its_scope_too(manager):
    op = op_of(manager, devices=("cuda",))
    with trilith.use_implementation(op, "reference"):
        assert not op.is_reference_on_cpu  # somebody may be told


def test_an_op_that_the_environment_names_is_not_its_reference_on_a_cpu(manager, monkeypatch):
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "reference")
    op = op_of(manager, devices=("cuda",))
    assert not op.is_reference_on_cpu
    assert tag_of(op) == 0.0
    assert not op.is_reference_on_cpu


def test_an_exception_ends_the_scope(manager):
    op = op_of(manager, rival("acme_sel::op"))
    with pytest.raises(KeyError), trilith.use_implementation(op, "other"):
        raise KeyError
    assert tag_of(op) == 1.0


class TestCompiled:
    """The provider is part of compiled code; a swap compiles again, it never runs the old one."""

    @pytest.fixture
    def compiled(self, manager):
        torch._dynamo.reset()
        op = op_of(
            manager,
            rival("acme_sel::op"),
            rival("acme_sel::op", "third", 3.0, priority=-2),
        )
        frames: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            frames.append(1)
            return graph.forward

        compiled = torch.compile(lambda x: op(x), fullgraph=True, backend=backend)
        yield op, lambda: compiled(torch.zeros(3))[0].item(), frames
        torch._dynamo.reset()

    def test_a_scope_compiles_again_and_reuses_what_was_compiled(self, compiled):
        op, tag, frames = compiled
        assert tag() == 1.0
        for _ in range(10):
            with trilith.use_implementation(op, "other"):
                assert tag() == 2.0
            assert tag() == 1.0
        assert len(frames) == 2

    def test_a_plugin_that_comes_later_is_taken(self, compiled, manager):
        op, tag, _ = compiled
        assert tag() == 1.0
        plug_in(
            manager,
            "b:late",
            implementations=[rival("acme_sel::op", "late", 4.0, priority=9)],
        )
        assert tag() == 4.0

    def test_gradients_are_the_scopes(self, manager):
        torch._dynamo.reset()
        op = op_of(manager, rival("acme_sel::op"))
        compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")
        for provider, tag in (("other", 2.0), ("acme_sel", 1.0), ("other", 2.0)):
            x = torch.zeros(3, requires_grad=True)
            with trilith.use_implementation(op, provider):
                y = compiled(x)
            y.sum().backward()
            assert (y[0].item(), x.grad[0].item()) == (tag, tag)

    def test_another_threads_scope_is_never_run_silently(self, compiled):
        op, tag, _ = compiled
        ran: list[str] = []

        def elsewhere() -> None:
            try:
                ran.append(f"ran {tag()}")
            except RuntimeError as error:
                ran.append(str(error))

        with trilith.use_implementation(op, "other"):
            assert tag() == 2.0
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        assert "compiled for 'other' inside another thread's use_implementation" in ran[0]

    def test_supports_cannot_be_asked_so_the_next_one_is_taken(self, manager):
        torch._dynamo.reset()
        op = op_of(manager, rival("acme_sel::op", supports=lambda x: True, priority=1))
        compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")
        assert tag_of(op) == 2.0
        assert compiled(torch.zeros(3))[0].item() == 1.0
        with (
            trilith.use_implementation(op, "other"),
            pytest.raises(Exception, match=r"supports\(\) cannot see the arguments"),
        ):
            compiled(torch.zeros(3))
