"""The drop-in modules beside torch's: outputs, gradients, state dicts."""

import copy

import pytest
import torch
from torch import nn

from tests.support.devices import DEVICE
from trilith.blocks import drop_in

NORMS = {
    "plain": {},
    "not-affine": {"affine": False},
    "cumulative": {"momentum": None},
    "no-statistics": {"track_running_stats": False},
    "options": {"momentum": 0.4, "eps": 1e-2},
}


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 7)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_trains_and_evaluates_as_torchs(name, shape):
    ours = drop_in.BatchNorm1d(5, **NORMS[name]).to(DEVICE)
    theirs = nn.BatchNorm1d(5, **NORMS[name]).to(DEVICE)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for step in range(4):
        ours.train(step < 3)
        theirs.train(step < 3)
        x = (2 * torch.randn(shape, device=DEVICE) + step).requires_grad_()
        outputs = [ours(x), theirs(x)]
        torch.testing.assert_close(*outputs)
        upstream = torch.randn(shape, device=DEVICE)
        found = [
            torch.autograd.grad(y, [x, *m.parameters()], upstream)
            for y, m in zip(outputs, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_batch_norm_loads_torchs_state_and_copies():
    theirs = nn.BatchNorm1d(3)
    theirs(torch.randn(8, 3))
    ours = drop_in.BatchNorm1d(3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3)
    torch.testing.assert_close(copy.deepcopy(ours).eval()(x), theirs.eval()(x))
    with pytest.raises(ValueError, match="2D or 3D"):
        ours(torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours.train()(torch.randn(1, 3))


def test_statistics_that_are_not_tracked_any_more_stay():
    ours, theirs = drop_in.BatchNorm1d(5).to(DEVICE), nn.BatchNorm1d(5).to(DEVICE)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(6, 5, device=DEVICE) + 3
    for module in (ours, theirs):
        module.track_running_stats = False
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Softmax", "LogSoftmax"])
def test_softmax_modules(name):
    x = torch.randn(3, 4, 5, device=DEVICE)
    torch.testing.assert_close(getattr(drop_in, name)(1)(x), getattr(nn, name)(1)(x))
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        torch.testing.assert_close(getattr(drop_in, name)()(x), getattr(nn, name)(0)(x))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_loss_modules(reduction):
    x, target = torch.randn(3, 4, device=DEVICE), torch.rand(3, 4, device=DEVICE)
    weights = {"weight": torch.rand(4, device=DEVICE), "pos_weight": torch.rand(4, device=DEVICE)}
    for name, options in (("BCEWithLogitsLoss", weights), ("MSELoss", {})):
        ours, theirs = (getattr(m, name)(reduction=reduction, **options) for m in (drop_in, nn))
        torch.testing.assert_close(ours(x, target), theirs(x, target))
        assert list(ours.state_dict()) == list(theirs.state_dict())
