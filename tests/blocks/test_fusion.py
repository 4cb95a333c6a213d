"""Blocks do several ops in one pass, but never past an implementation that was chosen for one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trilith
from tests.support.devices import DEVICE
from trilith.blocks import MLP, LMConfig, Residual, RMSNorm, build_lm
from trilith.blocks.drop_in import TransformerEncoderLayer
from trilith.plugins import Implementation, may_fuse, registry

# Where kernels don't run there is nothing to fuse, and no implementation of the library's.
pytestmark = pytest.mark.skipif(
    DEVICE not in trilith.plugins.TRITON_DEVICES, reason="no kernels here"
)


@pytest.fixture
def provide():
    """Give an op a second implementation, "acme", which runs the library's kernels."""
    given: list[Any] = []

    def provide(name: str, **options: Any) -> None:
        op = registry.op(name)
        options = {"priority": -1, **options}
        spec = op.spec
        own = Implementation(name, "acme", spec.forward, spec.backward, **options)
        op.add_implementation(own, "tests")
        given.append(op)

    yield provide
    for op in given:
        op.remove_implementation("acme")


def _language_model(norm: str, mlp: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    config = LMConfig(vocab_size=16, dim=16, n_layers=1, n_heads=1, norm=norm, mlp=mlp, dropout=0.1)
    tokens = torch.arange(4, device=DEVICE).view(1, 4)
    return build_lm(config).to(DEVICE), lambda model: model(tokens, targets=tokens)


def _encoder_layer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = TransformerEncoderLayer(16, 2, 32, dropout=0.1).to(DEVICE)
    x = torch.randn(3, 2, 16, device=DEVICE)
    return model, lambda model: model(x).sum()


MODELS = {
    "rms_norm": lambda: _language_model("rms_norm", "gated_mlp"),
    "layer_norm": lambda: _language_model("layer_norm", "mlp"),
    "encoder": _encoder_layer,
}
PARTS = [
    ("rms_norm", "trilith::rms_norm"),
    ("rms_norm", "trilith::bias_dropout_add"),
    ("rms_norm", "trilith::cross_entropy"),
    ("rms_norm", "trilith::add_norm"),
    ("rms_norm", "trilith::gated_act"),
    ("layer_norm", "trilith::layer_norm"),
    ("layer_norm", "trilith::bias_act"),
    ("layer_norm", "trilith::dropout"),
    ("encoder", "trilith::layer_norm"),
    ("encoder", "trilith::bias_dropout_add"),
]


def _ran(model: str, *scopes: Any) -> set[tuple[str, str]]:
    module, loss = MODELS[model]()
    with ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(scope)
        events = stack.enter_context(trilith.trace())
        with torch.no_grad():
            loss(module)
    return {(event.op, event.provider) for event in events}


@pytest.mark.parametrize(("model", "part"), PARTS)
def test_blocks_run_who_was_chosen_for_a_part(provide, model, part):
    provide(part)
    ran = _ran(model, trilith.use_implementation(part, "acme"))
    assert (part, "acme") in ran
    wholes = {op.spec.name for op in registry.ops() if part in op.spec.parts}
    if part == "trilith::dropout":  # these run without dropping anything, too
        wholes -= {"trilith::bias_act_linear", "trilith::bias_dropout_add"}
    assert wholes
    assert not wholes & {op for op, _ in ran}
    assert (part, "trilith") not in ran


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: MLP(up=nn.Linear(16, 16), down=nn.Linear(16, 16), dropout=0.5), 1),
        (lambda: Residual(branch=nn.Linear(16, 16), dropout=0.5), 1),
        (lambda: TransformerEncoderLayer(16, 2, 16, dropout=0.5), 3),
    ],
    ids=["mlp", "residual", "encoder"],
)
def test_every_dropout_is_who_was_chosens(provide, make, count):
    provide("trilith::dropout")
    module, x = make().to(DEVICE), torch.randn(3, 16, device=DEVICE)
    scope = trilith.use_implementation("trilith::dropout", "acme")
    with torch.no_grad(), scope, trilith.trace() as events:
        module(x)
    ran = [event.provider for event in events if event.op == "trilith::dropout"]
    assert ran == ["acme"] * count


def test_the_reference_is_a_choice_too():
    ran = _ran("rms_norm", trilith.use_implementation("trilith::rms_norm", "reference"))
    assert ("trilith::rms_norm", "reference") in ran
    assert "trilith::norm_linear" not in {op for op, _ in ran}


def test_priority_and_environment_are_choices_too(provide, monkeypatch):
    provide("trilith::rms_norm", priority=1)
    assert ("trilith::rms_norm", "acme") in _ran("rms_norm")
    monkeypatch.setenv("TRILITH_IMPL_TRILITH_RMS_NORM", "trilith")
    registry.op("trilith::rms_norm").forget_selections()
    assert "trilith::rms_norm" not in {op for op, _ in _ran("rms_norm")}


def test_what_is_not_chosen_does_not_break_a_pass(provide):
    provide("trilith::rms_norm")
    ops = {op for op, _ in _ran("rms_norm")}
    assert {"trilith::norm_linear", "trilith::add_norm_linear", "trilith::add_norm"} <= ops
    ops = {
        op for op, _ in _ran("layer_norm", trilith.use_implementation("trilith::rms_norm", "acme"))
    }
    assert {"trilith::norm_linear", "trilith::add_norm_linear"} <= ops


def test_a_provider_of_whole_and_part_runs_the_whole(provide):
    for name in ("trilith::rms_norm", "trilith::add_norm"):
        provide(name, priority=1)
    ran = _ran("rms_norm")
    assert ("trilith::add_norm", "acme") in ran


def test_an_implementation_that_looks_at_arguments_gets_to_see_them(provide):
    provide("trilith::rms_norm", priority=1, supports=lambda x, weight, eps: x.shape[-1] == 16)
    assert ("trilith::rms_norm", "acme") in _ran("rms_norm")


def test_compiled_blocks_follow_the_choice(provide):
    provide("trilith::rms_norm")
    torch._dynamo.reset()
    branch = MLP(up=nn.Linear(16, 16), down=nn.Linear(16, 16))
    module = Residual(branch=branch, pre=RMSNorm(16)).to(DEVICE)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(2, 16, device=DEVICE)
    for provider, fused in (("trilith", True), ("acme", False), ("trilith", True)):
        with (
            torch.no_grad(),
            trilith.use_implementation("trilith::rms_norm", provider),
            trilith.trace() as events,
        ):
            compiled(x)
        ran = {(event.op, event.provider) for event in events}
        assert (("trilith::rms_norm", "acme") in ran) is not fused
        assert ("trilith::norm_linear" in {op for op, _ in ran}) is fused
    torch._dynamo.reset()


def test_explain_tells_what_is_done_in_one_pass(provide):
    provide("trilith::rms_norm")
    told = trilith.explain("trilith::rms_norm", DEVICE, torch.float32)
    wholes = "trilith::add_norm, trilith::add_norm_linear, trilith::norm_linear"
    assert f"done in blocks by: {wholes}" in told
    with trilith.use_implementation("trilith::rms_norm", "acme"):
        told = trilith.explain("trilith::rms_norm", DEVICE, torch.float32)
        assert f"not done in blocks by: {wholes}" in told
        whole = trilith.explain("trilith::norm_linear", DEVICE, torch.float32)
    assert "stands in blocks for: trilith::layer_norm" in whole
    assert "stands not in blocks for: trilith::rms_norm (" in whole


def test_only_parts_that_a_spec_names_can_be_asked_for():
    whole, part = registry.op("trilith::norm_linear"), registry.op("trilith::softmax")
    with pytest.raises(ValueError, match="norm_linear: parts must name trilith::softmax"):
        may_fuse(whole, torch.zeros(2, device=DEVICE), part)


def test_every_part_is_an_op():
    names = set(registry.op_names())
    assert all(set(op.spec.parts) <= names for op in registry.ops())
