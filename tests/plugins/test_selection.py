"""Which implementation a call takes: by name, by a plugin's choice, by priority."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import trilith
from tests.plugins.tagged_ops import Plugin, op_of, plug_in, rival, spec_of, tag_of
from trilith.plugins import Implementation, PluginWarning, selection
from trilith.plugins.manager import PluginError
from trilith.plugins.selection import environment_variable

CPU = torch.device("cpu")


def test_the_highest_priority_runs(manager):
    low, high = (
        rival("acme_sel::op", "low"),
        rival("acme_sel::op", "high", 3.0, priority=5),
    )
    op = op_of(manager, low, high)
    assert tag_of(op) == 3.0


def test_a_provider_that_does_not_exist_is_refused_at_once(manager):
    op = op_of(manager, rival("acme_sel::op"))
    with pytest.raises(ValueError, match="one of acme_sel, other, reference, got 'othr'"):
        trilith.use_implementation(op, "othr").__enter__()


def test_one_asked_for_by_name_raises_where_it_cannot_run(manager):
    op = op_of(
        manager,
        rival("acme_sel::op", "no_cpu", devices=("cuda",)),
        rival("acme_sel::op", "half", dtypes=(torch.float16,), priority=-2),
    )
    with (
        trilith.use_implementation(op, "no_cpu"),
        pytest.raises(NotImplementedError, match="'no_cpu', which runs on cuda, not cpu"),
    ):
        tag_of(op)
    with (
        trilith.use_implementation(op, "half"),
        pytest.raises(NotImplementedError, match="takes torch.float16, not torch.float32"),
    ):
        tag_of(op)


def test_one_asked_for_by_name_raises_where_it_refuses_the_arguments(manager):
    op = op_of(manager, rival("acme_sel::op", supports=lambda x: x.shape[0] > 3, priority=1))
    assert tag_of(op) == 1.0
    with trilith.use_implementation(op, "other"):
        assert op(torch.zeros(4))[0].item() == 2.0
        with pytest.raises(NotImplementedError, match=r"supports\(\) refuses"):
            tag_of(op)


def test_a_supports_that_raises_is_named(manager):
    op_of(manager, rival("acme_sel::op", supports=lambda x: x.nothing, priority=1))
    with pytest.raises(RuntimeError, match=r"supports\(\) of 'other' \(of acme:sel\) raised Attr"):
        tag_of(manager.registry.op("acme_sel::op"))


def test_architecture_bounds_where_there_is_no_device_to_ask(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal = rival("acme_sel::op", arch=(90, None)).refusal(torch.device("cuda"), torch.float32)
    assert "no CUDA device here" in refusal


def test_architecture_bounds_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hopper = rival("acme_sel::op", arch=(90, None))
    assert "90.., not 80" in hopper.refusal(torch.device("cuda"), torch.float32)
    assert rival("acme_sel::op", arch=(80, 89)).refusal(torch.device("cuda"), torch.float32) is None


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
    op = op_of(manager, rival("acme_sel::op", arch=(90, None), priority=1))
    chosen = [op.selection(torch.device("cuda", i), torch.float32).first for i in range(2)]
    assert chosen == ["acme_sel", "other"]


def test_a_choice_by_architecture_works_on_fake_and_meta_tensors(manager, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    _capability(monkeypatch, _raising(RuntimeError("no driver")), available=False)
    chooser = lambda op, key, candidates: "other" if key.architecture == 90 else None  # noqa: E731
    other = rival("acme_sel::op", arch=(80, None), priority=1)
    op = op_of(manager, other, select=chooser, devices=("cpu", "cuda", "meta"))
    assert op(torch.zeros(3, device="meta")).device.type == "meta"
    with FakeTensorMode():
        assert op(torch.empty(3, device="cuda")).shape == (3,)
    assert not manager.failures


def test_the_environment_names_a_provider(manager, monkeypatch):
    assert environment_variable("trilith::rms_norm") == "TRILITH_IMPL_TRILITH_RMS_NORM"
    op = op_of(manager, rival("acme_sel::op"))
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "other")
    assert tag_of(op) == 2.0
    with trilith.use_implementation(op, "acme_sel"):
        assert tag_of(op) == 1.0


def test_an_empty_variable_names_nobody(manager, monkeypatch):
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "")
    assert tag_of(op_of(manager)) == 1.0


def test_the_environment_raises_for_what_is_not_there_or_cannot_run(manager, monkeypatch):
    op = op_of(manager, rival("acme_sel::op", devices=("cuda",)))
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "othr")
    with pytest.raises(ValueError, match="TRILITH_IMPL_ACME_SEL_OP must name one of"):
        tag_of(op)
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "other")
    with pytest.raises(NotImplementedError, match="TRILITH_IMPL_ACME_SEL_OP names 'other'"):
        tag_of(op)


def test_a_plugin_chooses_once_and_the_answer_is_cached(manager):
    op = op_of(manager, rival("acme_sel::op"))
    chooser = plug_in(manager, "b:chooser", select="other")
    for _ in range(3):
        assert tag_of(op) == 2.0
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
    op = op_of(manager, rival("acme_sel::op"), select="other")
    plug_in(manager, "b:silent", select=None)
    assert tag_of(op) == 2.0


def test_of_two_opinions_that_of_who_came_last_counts(manager):
    op = op_of(manager, rival("acme_sel::op"), select="other")
    plug_in(manager, "b:chooser", select="reference")
    assert tag_of(op) == 0.0


def test_nobody_chooses_where_nothing_can_run(manager):
    op = op_of(manager, devices=("cuda",), select="reference")
    assert op.selection(CPU, torch.float32).is_choice is False


def test_a_plugin_may_choose_the_reference(manager):
    op = op_of(manager, select="reference")
    assert tag_of(op) == 0.0


@pytest.mark.parametrize(
    ("select", "reason"),
    [
        ("nobody", "must answer one of acme_sel, other, reference, got 'nobody'"),
        (lambda op, key, candidates: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_choice_that_fails_is_told_and_ignored(manager, select, reason):
    op = op_of(manager, rival("acme_sel::op"), select=select)
    with pytest.warns(PluginWarning, match=f"acme:sel is not heard about acme_sel::op.*{reason}"):
        assert tag_of(op) == 1.0
    assert manager.failures[0].stage == "trilith_select_implementation"


def test_a_choice_that_fails_is_listed_once_and_raises_in_strict_mode(manager, monkeypatch):
    op = op_of(manager, select="nobody")
    for _ in range(2):
        op.forget_selections()
        with pytest.warns(PluginWarning, match="acme:sel is not heard"):
            assert tag_of(op) == 1.0
    assert len(manager.failures) == 1
    monkeypatch.setenv("TRILITH_STRICT_PLUGINS", "1")
    op.forget_selections()
    with pytest.raises(PluginError, match="must answer one of acme_sel, reference, got 'nobody'"):
        tag_of(op)


def test_a_tie_of_each_op_is_told(manager):
    names = ["acme_tied::one", "acme_tied::two"]
    others = [rival(name, priority=0) for name in names]
    plug_in(manager, ops=[spec_of(name) for name in names], implementations=others)
    for name in names:
        with pytest.warns(PluginWarning, match=f"{name}: acme_tied .* same priority"):
            tag_of(manager.registry.op(name))


def test_a_tie_is_told_once_and_names_both(manager):
    plug_in(manager, "a:ops", ops=[spec_of("acme_tie::op")])
    plug_in(manager, "b:impl", implementations=[rival("acme_tie::op", priority=0)])
    op = manager.registry.op("acme_tie::op")
    with pytest.warns(PluginWarning, match=r"acme_tie \(of a:ops\) and other \(of b:impl\)"):
        assert tag_of(op) == 1.0
    op.forget_selections()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tag_of(op)


def test_no_tie_is_told_where_the_choice_was_made_by_name(manager, monkeypatch):
    op = op_of(manager, rival("acme_sel::op", priority=0))
    monkeypatch.setenv("TRILITH_IMPL_ACME_SEL_OP", "other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tag_of(op) == 2.0


def test_a_plugin_that_comes_later_is_taken_in_eager_code(manager):
    op = op_of(manager)
    assert tag_of(op) == 1.0
    plug_in(manager, "b:late", implementations=[rival("acme_sel::op", priority=1)])
    assert tag_of(op) == 2.0


def test_reference_is_no_provider_name(manager):
    with pytest.warns(PluginWarning, match="must not be called 'reference'"):
        manager.add(
            "a:ref",
            lambda: Plugin([spec_of("acme_sel::op")], [rival("acme_sel::op", "reference")]),
        )


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
