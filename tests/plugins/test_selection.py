"""Which implementation a call takes: by name, by a plugin's choice, by priority; scopes."""

from __future__ import annotations

import _thread
import contextvars
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import trilith
from tests.support.devices import DEVICE
from trilith.kernels import rms_norm
from trilith.kernels._runtime.launch import observers
from trilith.plugins import (
    Implementation,
    Manager,
    OpSpec,
    PluginWarning,
    Registry,
    Sample,
    hookimpl,
    selection,
)
from trilith.plugins import op as op_module
from trilith.plugins.manager import PluginError
from trilith.plugins.selection import environment_variable

CPU = torch.device("cpu")


def _tagged(tag: float) -> tuple[Any, Any]:
    """A forward that adds `tag` to twice x, and a backward that gives `tag`."""

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x + tag,)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return (torch.full_like(dy, tag),)

    return forward, backward


def _spec(name: str, **options: Any) -> OpSpec:
    forward, backward = _tagged(1.0)
    options = {"devices": ("cpu", "cuda"), **options}
    return OpSpec(
        name=name,
        forward=forward,
        backward=backward,
        reference=lambda x: 2 * x,
        samples=lambda device, dtype: [Sample(torch.randn(3, device=device, dtype=dtype))],
        **options,
    )


def _other(op: str, provider: str = "other", tag: float = 2.0, **options: Any) -> Implementation:
    forward, backward = _tagged(tag)
    options = {"devices": ("cpu", "cuda"), "priority": -1, **options}
    return Implementation(op, provider, forward, backward, **options)


class Plugin:
    def __init__(self, ops: Any = (), implementations: Any = (), select: Any = None) -> None:
        self._ops, self._implementations, self._select = ops, implementations, select
        self.asked: list[Any] = []

    @hookimpl
    def trilith_register_ops(self) -> Any:
        return self._ops

    @hookimpl
    def trilith_register_implementations(self) -> Any:
        return self._implementations

    @hookimpl
    def trilith_select_implementation(self, op: str, key: Any, candidates: Any) -> Any:
        self.asked.append((op, key, [c.provider for c in candidates]))
        return self._select(op, key, candidates) if callable(self._select) else self._select


@pytest.fixture
def registry():
    made = Registry()
    yield made
    for op in made.ops():
        op.destroy()


@pytest.fixture
def manager(registry: Registry) -> Manager:
    return Manager(registry)


def _plugin(manager: Manager, name: str = "acme:sel", **brings: Any) -> Plugin:
    plugin = Plugin(**brings)
    assert manager.add(name, lambda: plugin), manager.failures
    return plugin


def _op(manager: Manager, *implementations: Implementation, select: Any = None, **options: Any):
    name = implementations[0].op if implementations else "acme_sel::op"
    _plugin(manager, ops=[_spec(name, **options)], implementations=implementations, select=select)
    return manager.registry.op(name)


def _tag(op: Any) -> float:
    """Which implementation ran: 0 is the reference."""
    return op(torch.zeros(3))[0].item()


def test_the_highest_priority_runs(manager):
    low, high = _other("acme_sel::op", "low"), _other("acme_sel::op", "high", 3.0, priority=5)
    op = _op(manager, low, high)
    assert _tag(op) == 3.0


def test_use_implementation_takes_the_provider_and_gives_it_back(manager):
    op = _op(manager, _other("acme_sel::op"))
    with trilith.use_implementation(op, "other"):
        assert _tag(op) == 2.0
        with trilith.use_implementation(op, "reference"):
            assert _tag(op) == 0.0
        assert _tag(op) == 2.0
    assert _tag(op) == 1.0


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
    op = _op(manager, _other("acme_sel::op"))
    x = torch.zeros(3, requires_grad=True)
    with trilith.use_implementation(op, "other"):
        y = op(x)
    op(torch.zeros(3))
    y.sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_a_scope_does_not_reach_other_threads(manager):
    op = _op(manager, _other("acme_sel::op"))
    tags: list[float] = []
    with trilith.use_implementation(op, "other"):
        thread = threading.Thread(target=lambda: tags.append(_tag(op)))
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
    op = _op(manager, _other("acme_sel::op"))
    assert in_a_thread_that_python_did_not_make(lambda: _tag(op)) == 1.0
    with trilith.use_implementation(op, "other"):
        assert in_a_thread_that_python_did_not_make(lambda: _tag(op)) == 2.0


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
    op = _op(manager, _other("acme_sel::op"))

    def as_autograd_does(context: contextvars.Context) -> float:
        torch._C._stash_obj_in_tls("context", context)
        try:
            return _tag(op)
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
    op = _op(
        manager,
        *(_other("acme_sel::op", n, 2.0 + i, priority=-1 - i) for i, n in enumerate(names)),
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
    assert _tag(op) == 1.0


def test_an_op_that_is_its_reference_on_a_cpu_says_so(manager):
    """Whoever reads it calls torch's own function, so nobody may want to be told or to choose."""
    op = _op(manager, devices=("cuda",))
    assert op.is_reference_on_cpu
    with trilith.use_implementation(op, "reference"):
        assert not op.is_reference_on_cpu
    assert op.is_reference_on_cpu
    with trilith.trace():
        assert not op.is_reference_on_cpu
    assert op.is_reference_on_cpu
    op.add_implementation(_other("acme_sel::op"))
    assert not op.is_reference_on_cpu


def test_plugins_have_a_say_before_an_op_is_its_reference_on_a_cpu(manager, monkeypatch):
    """A later answer would differ from the first, and a call from the one that it recomputes."""
    op = _op(manager, devices=("cuda",))
    op.forget_selections()
    plugin = functools.partial(op.add_implementation, _other("acme_sel::op"))
    monkeypatch.setattr(op_module, "before_first_choice", plugin)
    assert not op.is_reference_on_cpu
    with pytest.raises(AttributeError, match="no attribute 'is_reference'"):
        op.is_reference  # noqa: B018


def test_an_op_that_is_its_reference_says_so_of_a_call_in_its_scope_too(manager):
    op = _op(manager, devices=("cuda",))
    with trilith.use_implementation(op, "reference"):
        assert not op.is_reference_on_cpu  # somebody may be told


def test_an_op_that_the_environment_names_is_not_its_reference_on_a_cpu(manager, monkeypatch):
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "reference")
    op = _op(manager, devices=("cuda",))
    assert not op.is_reference_on_cpu
    assert _tag(op) == 0.0
    assert not op.is_reference_on_cpu


def test_an_exception_ends_the_scope(manager):
    op = _op(manager, _other("acme_sel::op"))
    with pytest.raises(KeyError), trilith.use_implementation(op, "other"):
        raise KeyError
    assert _tag(op) == 1.0


def test_a_provider_that_does_not_exist_is_refused_at_once(manager):
    op = _op(manager, _other("acme_sel::op"))
    with pytest.raises(ValueError, match="one of acme_sel, other, reference, got 'othr'"):
        trilith.use_implementation(op, "othr").__enter__()


def test_one_asked_for_by_name_raises_where_it_cannot_run(manager):
    op = _op(
        manager,
        _other("acme_sel::op", "no_cpu", devices=("cuda",)),
        _other("acme_sel::op", "half", dtypes=(torch.float16,), priority=-2),
    )
    with (
        trilith.use_implementation(op, "no_cpu"),
        pytest.raises(NotImplementedError, match="'no_cpu', which runs on cuda, not cpu"),
    ):
        _tag(op)
    with (
        trilith.use_implementation(op, "half"),
        pytest.raises(NotImplementedError, match="takes torch.float16, not torch.float32"),
    ):
        _tag(op)


def test_one_asked_for_by_name_raises_where_it_refuses_the_arguments(manager):
    op = _op(manager, _other("acme_sel::op", supports=lambda x: x.shape[0] > 3, priority=1))
    assert _tag(op) == 1.0
    with trilith.use_implementation(op, "other"):
        assert op(torch.zeros(4))[0].item() == 2.0
        with pytest.raises(NotImplementedError, match=r"supports\(\) refuses"):
            _tag(op)


def test_a_supports_that_raises_is_named(manager):
    _op(manager, _other("acme_sel::op", supports=lambda x: x.nothing, priority=1))
    with pytest.raises(RuntimeError, match=r"supports\(\) of 'other' \(of acme:sel\) raised Attr"):
        _tag(manager.registry.op("acme_sel::op"))


def test_architecture_bounds_where_there_is_no_device_to_ask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal = _other("acme_sel::op", arch=(90, None)).refusal(torch.device("cuda"), torch.float32)
    assert "no CUDA device here" in refusal


def test_architecture_bounds_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hopper = _other("acme_sel::op", arch=(90, None))
    assert "90.., not 80" in hopper.refusal(torch.device("cuda"), torch.float32)
    assert (
        _other("acme_sel::op", arch=(80, 89)).refusal(torch.device("cuda"), torch.float32) is None
    )


def _capability(monkeypatch, of: Any, hip: str | None = None, available: bool = True) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", of)


def _raising(error: Exception) -> Any:
    def capability(device: torch.device) -> tuple[int, int]:
        raise error

    return capability


@pytest.mark.parametrize(
    ("device", "setup", "expected"),
    [
        ("cpu", {"of": _raising(RuntimeError("asked"))}, None),
        ("meta", {"of": _raising(RuntimeError("asked"))}, None),
        ("cuda", {"of": _raising(RuntimeError("asked")), "available": False}, None),
        ("cuda:7", {"of": _raising(AssertionError("Invalid device id"))}, None),
        ("cuda:0", {"of": _raising(RuntimeError("Cannot re-initialize CUDA in fork"))}, None),
        ("cuda:0", {"of": lambda device: (9, 4), "hip": "6.4"}, None),
        ("cuda:0", {"of": lambda device: ((8, 0), (9, 0))[device.index]}, 80),
        ("cuda:1", {"of": lambda device: ((8, 0), (9, 0))[device.index]}, 90),
    ],
)
def test_architecture_is_of_the_device_or_none(monkeypatch, device, setup, expected):
    _capability(monkeypatch, **setup)
    key = selection.SelectionKey(torch.device(device), torch.float32)
    assert key.architecture == expected


def test_two_gpus_choose_each_for_itself(manager, monkeypatch):
    _capability(monkeypatch, lambda device: ((8, 0), (9, 0))[device.index])
    op = _op(manager, _other("acme_sel::op", arch=(90, None), priority=1))
    chosen = [op.selection(torch.device("cuda", i), torch.float32).first for i in range(2)]
    assert chosen == ["acme_sel", "other"]


def test_a_choice_by_architecture_works_on_fake_and_meta_tensors(manager, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    _capability(monkeypatch, _raising(RuntimeError("no driver")), available=False)
    chooser = lambda op, key, candidates: "other" if key.architecture == 90 else None  # noqa: E731
    other = _other("acme_sel::op", arch=(80, None), priority=1)
    op = _op(manager, other, select=chooser, devices=("cpu", "cuda", "meta"))
    assert op(torch.zeros(3, device="meta")).device.type == "meta"
    with FakeTensorMode():
        assert op(torch.empty(3, device="cuda")).shape == (3,)
    assert not manager.failures


def test_the_environment_names_a_provider(manager, monkeypatch):
    assert environment_variable("trilith::rms_norm") == "TRILITH_IMPL_TRILITH_RMS_NORM"
    op = _op(manager, _other("acme_sel::op"))
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "other")
    assert _tag(op) == 2.0
    with trilith.use_implementation(op, "acme_sel"):
        assert _tag(op) == 1.0


def test_an_empty_variable_names_nobody(manager, monkeypatch):
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "")
    assert _tag(_op(manager)) == 1.0


def test_the_environment_raises_for_what_is_not_there_or_cannot_run(manager, monkeypatch):
    op = _op(manager, _other("acme_sel::op", devices=("cuda",)))
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "othr")
    with pytest.raises(ValueError, match="TRILITH_IMPL_ACME_SEL_OP must name one of"):
        _tag(op)
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "other")
    with pytest.raises(NotImplementedError, match="TRILITH_IMPL_ACME_SEL_OP names 'other'"):
        _tag(op)


def test_a_plugin_chooses_once_and_the_answer_is_cached(manager):
    op = _op(manager, _other("acme_sel::op"))
    chooser = _plugin(manager, "b:chooser", select="other")
    for _ in range(3):
        assert _tag(op) == 2.0
    assert len(chooser.asked) == 1
    name, key, candidates = chooser.asked[0]
    assert (name, key.device, key.dtype) == ("acme_sel::op", CPU, torch.float32)
    assert key.architecture is None
    assert candidates == ["acme_sel", "other"]
    told = manager.registry.explain("acme_sel::op", CPU, torch.float32)
    assert told.endswith("why: plugin b:chooser chose it\n  takes: other")
    op(torch.zeros(3, dtype=torch.float16))
    assert len(chooser.asked) == 2


def test_a_plugin_without_an_opinion_leaves_it_to_the_next(manager):
    op = _op(manager, _other("acme_sel::op"), select="other")
    _plugin(manager, "b:silent", select=None)
    assert _tag(op) == 2.0


def test_of_two_opinions_that_of_who_came_last_counts(manager):
    op = _op(manager, _other("acme_sel::op"), select="other")
    _plugin(manager, "b:chooser", select="reference")
    assert _tag(op) == 0.0


def test_nobody_chooses_where_nothing_can_run(manager):
    op = _op(manager, devices=("cuda",), select="reference")
    assert op.selection(CPU, torch.float32).is_choice is False


def test_a_plugin_may_choose_the_reference(manager):
    op = _op(manager, select="reference")
    assert _tag(op) == 0.0


@pytest.mark.parametrize(
    ("select", "reason"),
    [
        ("nobody", "must answer one of acme_sel, other, reference, got 'nobody'"),
        (lambda op, key, candidates: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_choice_that_fails_is_told_and_ignored(manager, select, reason):
    op = _op(manager, _other("acme_sel::op"), select=select)
    with pytest.warns(PluginWarning, match=f"acme:sel is not heard about acme_sel::op.*{reason}"):
        assert _tag(op) == 1.0
    assert manager.failures[0].stage == "trilith_select_implementation"


def test_a_choice_that_fails_is_listed_once_and_raises_in_strict_mode(manager, monkeypatch):
    op = _op(manager, select="nobody")
    for _ in range(2):
        op.forget_selections()
        with pytest.warns(PluginWarning, match="acme:sel is not heard"):
            assert _tag(op) == 1.0
    assert len(manager.failures) == 1
    monkeypatch.setenv("TRILITH_STRICT_PLUGINS", "1")
    op.forget_selections()
    with pytest.raises(PluginError, match="must answer one of acme_sel, reference, got 'nobody'"):
        _tag(op)


def test_a_tie_of_each_op_is_told(manager):
    names = ["acme_tied::one", "acme_tied::two"]
    others = [_other(name, priority=0) for name in names]
    _plugin(manager, ops=[_spec(name) for name in names], implementations=others)
    for name in names:
        with pytest.warns(PluginWarning, match=f"{name}: acme_tied .* same priority"):
            _tag(manager.registry.op(name))


def test_a_tie_is_told_once_and_names_both(manager):
    _plugin(manager, "a:ops", ops=[_spec("acme_tie::op")])
    _plugin(manager, "b:impl", implementations=[_other("acme_tie::op", priority=0)])
    op = manager.registry.op("acme_tie::op")
    with pytest.warns(PluginWarning, match=r"acme_tie \(of a:ops\) and other \(of b:impl\)"):
        assert _tag(op) == 1.0
    op.forget_selections()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tag(op)


def test_no_tie_is_told_where_the_choice_was_made_by_name(manager, monkeypatch):
    op = _op(manager, _other("acme_sel::op", priority=0))
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tag(op) == 2.0


def test_a_plugin_that_comes_later_is_taken_in_eager_code(manager):
    op = _op(manager)
    assert _tag(op) == 1.0
    _plugin(manager, "b:late", implementations=[_other("acme_sel::op", priority=1)])
    assert _tag(op) == 2.0


def test_reference_is_no_provider_name(manager):
    with pytest.warns(PluginWarning, match="must not be called 'reference'"):
        manager.add(
            "a:ref",
            lambda: Plugin([_spec("acme_sel::op")], [_other("acme_sel::op", "reference")]),
        )


class TestCompiled:
    """The provider is part of compiled code; a swap compiles again, it never runs the old one."""

    @pytest.fixture
    def compiled(self, manager):
        torch._dynamo.reset()
        op = _op(manager, _other("acme_sel::op"), _other("acme_sel::op", "third", 3.0, priority=-2))
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
        _plugin(
            manager, "b:late", implementations=[_other("acme_sel::op", "late", 4.0, priority=9)]
        )
        assert tag() == 4.0

    def test_gradients_are_the_scopes(self, manager):
        torch._dynamo.reset()
        op = _op(manager, _other("acme_sel::op"))
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
        op = _op(manager, _other("acme_sel::op", supports=lambda x: True, priority=1))
        compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")
        assert _tag(op) == 2.0
        assert compiled(torch.zeros(3))[0].item() == 1.0
        with (
            trilith.use_implementation(op, "other"),
            pytest.raises(Exception, match=r"supports\(\) cannot see the arguments"),
        ):
            compiled(torch.zeros(3))


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape)


TWO_STEPS = {
    "dropout": lambda k: k.dropout(_x(3, 4), 0.5),
    "bias_dropout_add": lambda k: k.bias_dropout_add(_x(3, 4), _x(3, 4), p=0.5),
    "bias_act": lambda k: k.bias_act(_x(3, 4), p=0.5),
    "bias_act_linear": lambda k: k.bias_act_linear(_x(3, 4), None, _x(5, 4), p=0.5),
    "add_norm": lambda k: k.add_rms_norm(_x(3, 4), _x(3, 4), p=0.5),
    "add_norm_linear": lambda k: k.rms_norm_linear(
        _x(3, 4), None, _x(5, 4), residual=_x(3, 4), p=0.5
    ),
    "cross_entropy": lambda k: k.cross_entropy(_x(3, 4), torch.tensor([0, 1, 2])),
    "soft_cross_entropy": lambda k: k.cross_entropy(_x(3, 4), _x(3, 4).softmax(1)),
    "attention": lambda k: k.scaled_dot_product_attention(*_x(3, 1, 1, 4, 16), dropout_p=0.5),
    "decode_attention": lambda k: k.decode_attention(
        _x(1, 1, 1, 16), *_x(2, 1, 1, 4, 16), torch.tensor([3])
    ),
}


@pytest.mark.skipif("cpu" not in trilith.plugins.TRITON_DEVICES, reason="the CPU has no kernels")
@pytest.mark.parametrize("name", TWO_STEPS)
def test_functions_that_ask_first_choose_once(name):
    """What `supports` sees is what the implementation gets, and it is asked once a call."""
    asked: list[Any] = []
    op = trilith.op(f"trilith::{name}")

    def supports(*args: Any) -> bool:
        asked.append(args)
        return True

    own = Implementation(
        op.spec.name, "acme", op.spec.forward, op.spec.backward, priority=1, supports=supports
    )
    op.add_implementation(own, "tests")
    try:
        with torch.no_grad(), trilith.trace() as events:
            TWO_STEPS[name](trilith.kernels)
    finally:
        op.remove_implementation("acme")
    assert [(event.op, event.provider) for event in events] == [(op.spec.name, "acme")]
    assert len(asked) == 1
