"""Checkpoints of one process: the optimizer's state in all its forms."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from trilith.blocks.parallel import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Counting(torch.optim.Optimizer):
    """Momentum, and the number of steps as Python's numbers."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    own = self.state[p]
                    own.setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.5)
                    own["steps"] = own.get("steps", 0) + 1
                    own["decay"] = own.get("decay", 1.0) * 0.9
                    p -= group["lr"] * own["mean"] / own["steps"]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5),
    "numbers": Counting,
}
by_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def model_and(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, make(model.parameters())


def gradients(model, part=slice(None)):
    model[part](torch.ones(2, model[part][0].in_features)).square().sum().backward()


def train(model, optimizer, steps=2, part=slice(None)):
    for _ in range(steps):
        optimizer.zero_grad()
        gradients(model, part)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def state_of(optimizer):
    return {
        (i, name): value.clone() if isinstance(value, torch.Tensor) else value
        for i, p in enumerate(q for g in optimizer.param_groups for q in g["params"])
        for name, value in optimizer.state.get(p, {}).items()
    }


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert type(value) is type(theirs[name])
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


@by_optimizer
@pytest.mark.parametrize("with_gradients", [False, True], ids=["without gradients", "with"])
def test_training_goes_on_as_without_a_break(make, with_gradients, tmp_path):
    model, optimizer = model_and(make)
    train(model, optimizer)
    save_checkpoint(tmp_path / "saved", model, optimizer)
    saved = state_of(optimizer)
    wanted = train(model, optimizer)

    again, other = model_and(make)
    if with_gradients:
        gradients(again)
    before = [None if p.grad is None else p.grad.clone() for p in again.parameters()]
    load_checkpoint(tmp_path / "saved", again, other)
    assert_same_state(state_of(other), saved)
    for p, gradient in zip(again.parameters(), before, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    assert all(map(torch.equal, train(again, other), wanted))


@by_optimizer
@pytest.mark.parametrize("with_gradients", [False, True], ids=["without gradients", "with"])
def test_an_optimizer_that_has_not_stepped(make, with_gradients, tmp_path):
    wanted = train(*model_and(make))
    model, optimizer = model_and(make)
    if with_gradients:
        gradients(model)
    save_checkpoint(tmp_path / "saved", model, optimizer)
    assert not optimizer.state
    assert all(map(torch.equal, train(model, optimizer), wanted))
    load_checkpoint(tmp_path / "saved", model, optimizer)
    assert not optimizer.state
    assert all(map(torch.equal, train(model, optimizer), wanted))


def test_a_parameter_that_was_not_used_has_no_state(tmp_path):
    make = OPTIMIZERS["adamw"]
    model, optimizer = model_and(make)
    train(model, optimizer, part=slice(2, None))
    save_checkpoint(tmp_path / "saved", model, optimizer)
    saved = state_of(optimizer)
    assert {i for i, _ in saved} == {2, 3}
    again, other = model_and(make)
    train(again, other)
    load_checkpoint(tmp_path / "saved", again, other)
    assert_same_state(state_of(other), saved)


def test_a_folder_without_the_optimizer_is_refused_and_nothing_is_lost(tmp_path):
    model, optimizer = model_and(OPTIMIZERS["adamw"])
    train(model, optimizer)
    save_checkpoint(tmp_path / "saved", model)
    before = state_of(optimizer)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint.*state\.0\."):
        load_checkpoint(tmp_path / "saved", model, optimizer)
    assert_same_state(state_of(optimizer), before)
