"""A stranger's module in each slot of a language model: by name, trained, and wrong ones named."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from tests.support.devices import DEVICE
from trilith.blocks import LMConfig, build_lm
from trilith.blocks.config import build_position
from trilith.plugins import ModuleSpec, PluginWarning, hookimpl, registry, use_implementation
from trilith.plugins.manager import Manager
from trilith.plugins.registry import Registry
from trilith.plugins.spec import SLOTS

SIZES = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 2, "max_len": 12}


class Centred(nn.Module):
    """A norm: x minus its mean, times a gain."""

    def __init__(self, config):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(config.dim))

    def reset_parameters(self):
        nn.init.ones_(self.gain)

    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) * self.gain


class Mixer(nn.Module):
    """An attention that asks the configured position for its share."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.position = build_position(config, "heads")

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        if self.position is not None:
            q, k = self.position(q, k)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """An MLP of one layer."""

    def __init__(self, config):
        super().__init__()
        self.inner = nn.Linear(config.dim, config.dim)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Slope(nn.Module):
    """An activation with a slope that is learned."""

    def __init__(self, config):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


class Table(nn.Module):
    """Positions as a learned table that is added to the tokens."""

    acts_on = "tokens"

    def __init__(self, config):
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.max_len, config.dim))

    def reset_parameters(self):
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x):
        return x + self.table[: x.shape[1]]


class Scale(nn.Module):
    """Positions as a learned factor of queries and keys."""

    acts_on = "heads"

    def __init__(self, config):
        super().__init__()
        self.factor = nn.Parameter(torch.empty(config.max_len, 1))

    def reset_parameters(self):
        nn.init.ones_(self.factor)

    def forward(self, q, k):
        return q * self.factor[: q.shape[-2]], k * self.factor[: k.shape[-2]]


MODULES = {
    "norm": [Centred],
    "mlp": [Layer],
    "attention": [Mixer],
    "activation": [Slope],
    "position": [Table, Scale],
}


class Layers:
    """A plugin of modules: (slot, what builds it), named `vendor.<class>`."""

    def __init__(self, *modules):
        self.modules = modules

    @hookimpl
    def trilith_register_modules(self):
        return [
            ModuleSpec(slot=slot, name=name(build), build=build) for slot, build in self.modules
        ]


def name(build):
    return f"vendor.{build.__name__.lower()}"


@pytest.fixture
def bring(monkeypatch):
    """Adds modules by a plugin to the registry that configurations ask, for one test.

    Our own ops run as their references: the interpreter has nothing to add here.
    """
    registry.before_lookup()
    monkeypatch.setattr(registry, "_modules", dict(registry._modules))
    monkeypatch.setattr(registry, "vote", registry.vote)
    manager = Manager(registry)

    def bring(*modules):
        assert manager.add("vendor:layers", lambda: Layers(*modules))

    with ExitStack() as stack:
        for op in registry.op_names():
            stack.enter_context(use_implementation(op, "reference"))
        yield bring


def trained(config, steps=12):
    """The model, and its losses on a text that it can learn by heart."""
    torch.manual_seed(0)
    model = build_lm(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(24, device=DEVICE).remainder(12).view(2, 12)
    losses = []
    for _ in range(steps):
        loss = model(tokens, targets=tokens.roll(-1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


EACH = [(slot, build) for slot, builds in MODULES.items() for build in builds]


def test_every_slot_is_tried():
    assert set(MODULES) == set(SLOTS)


@pytest.mark.parametrize("residual", ["pre", "post", "sandwich"])
@pytest.mark.parametrize(("slot", "build"), EACH)
def test_a_model_trains_with_a_module_named_in_its_slot(slot, build, residual, bring):
    bring((slot, build))
    model, losses = trained(LMConfig(**SIZES, residual=residual, **{slot: name(build)}))
    found = [module for module in model.modules() if isinstance(module, build)]
    assert found
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in found for p in m.parameters())


@pytest.mark.parametrize("position", MODULES["position"])
def test_a_model_of_nothing_but_a_strangers_modules_trains(position, bring):
    bring(*EACH)
    names = {slot: name(builds[0]) for slot, builds in MODULES.items()}
    names |= {"mlp": "mlp", "position": name(position)}  # our MLP calls the activation
    model, losses = trained(LMConfig(**SIZES, **names))
    kinds = {type(module) for module in model.modules()}
    assert {Centred, Mixer, Slope, position} <= kinds
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("slot", SLOTS)
def test_a_constructor_that_takes_something_else_is_refused(slot):
    def build(dim, eps):
        raise AssertionError

    manager = Manager(Registry())
    with pytest.warns(PluginWarning, match="plugin bad:layers is left out"):
        assert not manager.add("bad:layers", lambda: Layers((slot, build)))
    (failure,) = manager.failures
    assert failure.stage == "trilith_register_modules"
    wanted = f"{slot} 'vendor.build': build must take one argument, the LMConfig, got (dim, eps)"
    assert wanted in failure.reason


@pytest.mark.parametrize("slot", SLOTS)
def test_a_constructor_that_takes_the_configuration_for_something_else_is_named(slot, bring):
    def linear(dim):
        return nn.Linear(dim, dim)

    bring((slot, linear))
    wanted = f"{slot} 'vendor.linear' of vendor:layers: build is given the whole LMConfig, and said"
    with pytest.raises(TypeError, match=wanted):
        build_lm(LMConfig(**SIZES, **{"mlp": "mlp", slot: "vendor.linear"}))
