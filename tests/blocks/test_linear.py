"""When a weight may be read past its module's forward, and what happens when it may not."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.support.devices import DEVICE
from trilith.blocks import MLP, GatedMLP, linear
from trilith.blocks.linear import plain_linear, reset_linear


class Lora(nn.Module):
    """A frozen linear layer and a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Subclass(nn.Linear):
    pass


def hooked(register: str) -> nn.Linear:
    linear = nn.Linear(3, 3)
    getattr(linear, register)(lambda *args: None)
    return linear


def patched() -> nn.Linear:
    linear = nn.Linear(3, 3)
    linear.forward = lambda x: x
    return linear


NOT_PLAIN = {
    "subclass": lambda: Subclass(3, 3),
    "lora": lambda: Lora(nn.Linear(3, 3)),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "patched": patched,
    "pre_hook": lambda: hooked("register_forward_pre_hook"),
    "hook": lambda: hooked("register_forward_hook"),
    "backward_pre_hook": lambda: hooked("register_full_backward_pre_hook"),
    "backward_hook": lambda: hooked("register_full_backward_hook"),
    "other": lambda: nn.Identity(),
}


def test_linear_itself_is_plain():
    assert plain_linear(nn.Linear(3, 3))
    assert plain_linear(nn.Linear(3, 3, bias=False))


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_whatever_does_more_when_called_is_not_plain(kind):
    assert not plain_linear(NOT_PLAIN[kind]())


def make_mlp(gated: bool, wrap) -> nn.Module:
    up, down = wrap(nn.Linear(6, 10)), wrap(nn.Linear(10, 6))
    if gated:
        return GatedMLP(gate=wrap(nn.Linear(6, 10)), up=up, down=down).to(DEVICE)
    return MLP(up=up, down=down, activation="silu").to(DEVICE)


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "gated_mlp"])
def test_adapter_takes_part_and_gets_gradients(gated):
    mlp = make_mlp(gated, Lora)
    x = torch.randn(5, 6, device=DEVICE)
    before = mlp(x)
    with torch.no_grad():
        for adapter in mlp.children():
            adapter.b.weight.mul_(3.0)
    after = mlp(x)
    after.square().sum().backward()

    assert not torch.allclose(before, after)
    for name, adapter in mlp.named_children():
        assert adapter.a.weight.grad.abs().sum() > 0, name
        assert adapter.b.weight.grad.abs().sum() > 0, name
        assert adapter.base.weight.grad is None


@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "gated_mlp"])
def test_hooks_of_a_child_are_called(gated):
    mlp = make_mlp(gated, lambda linear: linear)
    called = []
    for name, child in mlp.named_children():
        child.register_forward_hook(lambda *_, name=name: called.append(name))
    mlp(torch.randn(2, 6, device=DEVICE))
    assert sorted(called) == sorted(name for name, _ in mlp.named_children())


def test_wrapped_and_plain_linear_give_the_same():
    plain = make_mlp(False, lambda linear: linear)
    x = torch.randn(5, 6, device=DEVICE)
    fused = plain(x)
    plain.up.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(plain(x), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels_run", [True, False])
def test_bias_is_added_by_the_activation_only_where_kernels_run(kernels_run, monkeypatch):
    given = []

    def spy(x, bias, *rest, **options):
        given.append(bias)
        return x

    monkeypatch.setattr(linear, "TRITON_DEVICES", (DEVICE,) if kernels_run else ())
    for name in ("bias_act", "bias_act_linear"):
        monkeypatch.setattr(linear, name, spy)
    mlp = make_mlp(False, lambda linear: linear)
    mlp(torch.zeros(1, 6, device=DEVICE))
    assert given[0] is (mlp.up.bias if kernels_run else None)


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_init_scale(gain):
    linear = nn.Linear(300, 200)
    reset_linear(linear, gain)
    assert linear.weight.std().item() == pytest.approx(gain / math.sqrt(300), rel=0.02)
    assert linear.weight.mean().abs() < 0.001
    assert linear.bias.abs().max() == 0
