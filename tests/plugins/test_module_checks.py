"""Every module of ours passes the checks of modules, and each check catches one that is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.devices import DEVICE
from trilith.plugins import ModuleSpec, Registry, manager, registry
from trilith.plugins.conformance.modules import MODULE_CHECKS
from trilith.plugins.report import check_module, named_modules, run_module_check

DEVICE = torch.device(DEVICE)
manager.load()
BY_NAME = {check.__name__: check for check in MODULE_CHECKS}


@pytest.mark.parametrize(
    "spec",
    [spec for spec, owner in registry.modules() if owner.startswith("trilith")],
    ids=lambda spec: f"{spec.slot}-{spec.name}",
)
@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda check: check.__name__)
def test_our_modules_pass(spec, check):
    run_module_check(spec, check, DEVICE)


class Gain(nn.Module):
    """A norm that is right."""

    def __init__(self, dim):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gain


class Transposes(Gain):
    def forward(self, x):
        return super().forward(x).mT


class Mixes(Gain):
    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True))


class Detaches(Gain):
    def forward(self, x):
        return x * self.gain.detach()


class HoldsALambda(Gain):
    def __init__(self, dim):
        super().__init__(dim)
        self.scale = lambda x: x * self.gain

    def forward(self, x):
        return self.scale(x)


class KeepsStateBeside(Gain):
    """What a state dict does not have, a build draws anew."""

    def __init__(self, dim):
        super().__init__(dim)
        self.offset = torch.rand(()).item()

    def forward(self, x):
        return super().forward(x) + self.offset


class WidensBfloat16(Gain):
    def forward(self, x):
        return super().forward(x.float())


class FewTokens(Gain):
    def forward(self, x):
        if x.shape[1] > 5:
            raise ValueError("x must have at most 5 tokens")
        return super().forward(x)


class LooksAheadInLongSequences(Gain):
    def forward(self, x):
        return super().forward(x if x.shape[1] < 9 else x + x.roll(-1, 1))


class MixesInTraining(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x):
        return self.norm(x.mT).mT


class MixesTheBatch(Gain):
    def forward(self, x):
        return super().forward(x - x.mean(0, keepdim=True))


class FiveTimesTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain):
        ctx.save_for_backward(gain)
        return x * gain

    @staticmethod
    def backward(ctx, dy):
        (gain,) = ctx.saved_tensors
        return 5 * dy * gain, 0 * gain


class DifferentiatesWrongly(Gain):
    def forward(self, x):
        return FiveTimesTheGradient.apply(x, self.gain)


class KeepsARunningSize(Gain):
    """Right: in training a call moves what none of its outputs depends on."""

    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("size", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.size.lerp_(x.detach().square().mean(), 0.1)
        return super().forward(x)


ONE = Gain(16)
WRONG = {
    "transposes": (lambda config: Transposes(config.dim), "shapes_are_kept"),
    "mixes": (lambda config: Mixes(config.dim), "nothing_is_foreseen"),
    "detaches": (lambda config: Detaches(config.dim), "gradients_reach_all"),
    "one_for_all": (lambda config: ONE, "builds_are_apart"),
    "widens_bfloat16": (lambda config: WidensBfloat16(config.dim), "shapes_are_kept"),
    "looks_ahead": (lambda config: LooksAheadInLongSequences(config.dim), "nothing_is_foreseen"),
    "mixes_in_training": (lambda config: MixesInTraining(config.dim), "nothing_is_foreseen"),
    "mixes_the_batch": (lambda config: MixesTheBatch(config.dim), "nothing_is_foreseen"),
    "differentiates_wrongly": (
        lambda config: DifferentiatesWrongly(config.dim),
        "gradients_are_derivatives",
    ),
    "holds_a_lambda": (lambda config: HoldsALambda(config.dim), "copies_agree"),
    "keeps_state_beside": (lambda config: KeepsStateBeside(config.dim), "copies_agree"),
}


def rows_of(build):
    spec = ModuleSpec(slot="norm", name="bad.norm", build=build)
    return {row.check: row for row in check_module(spec, "bad:norm", DEVICE)}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_module_is_caught_by_one_check(fault):
    build, check = WRONG[fault]
    failed = {name: row for name, row in rows_of(build).items() if row.reason}
    assert set(failed) == {check}
    assert failed[check].reason.startswith(f"norm bad.norm: {check}: ")
    assert failed[check].hint


@pytest.mark.parametrize("kind", [Gain, KeepsARunningSize])
def test_a_sound_module_passes(kind):
    assert not [row for row in rows_of(lambda config: kind(config.dim)).values() if row.reason]


def test_a_module_of_few_tokens_is_caught():
    rows = rows_of(lambda config: FewTokens(config.dim))
    assert "shapes_are_kept: ValueError: x must have" in rows["shapes_are_kept"].reason


def test_every_check_of_modules_catches_something():
    assert {check for _, check in WRONG.values()} == set(BY_NAME)


def test_modules_are_found_by_name_vendor_and_plugin():
    found = [spec.name for spec, _ in named_modules(manager, "trilith")]
    assert "rms_norm" in found
    assert [spec.slot for spec, _ in named_modules(manager, "rms_norm")] == ["norm"]
    assert not Registry().modules()
