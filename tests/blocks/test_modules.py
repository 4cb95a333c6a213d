"""Norms, MLPs and residuals: each is the formula it says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.devices import DEVICE
from trilith.blocks import MLP, GatedMLP, LayerNorm, Residual, RMSNorm
from trilith.kernels import gated_act


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_torch_layer_norm(bias):
    ours, theirs = LayerNorm(12, bias=bias), nn.LayerNorm(12, bias=bias)
    with torch.no_grad():
        for p in ours.parameters():
            p.uniform_(0.5, 2.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 12, device=DEVICE)
    torch.testing.assert_close(ours.to(DEVICE)(x), theirs.to(DEVICE)(x))


@pytest.mark.parametrize("eps", [1e-6, None])
def test_rms_norm_is_torch_rms_norm(eps):
    ours, theirs = RMSNorm(12, eps=eps), nn.RMSNorm(12, eps=eps)
    nn.init.uniform_(ours.weight, 0.5, 2.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 12, device=DEVICE)
    torch.testing.assert_close(ours.to(DEVICE)(x), theirs.to(DEVICE)(x))


@pytest.mark.parametrize("bias", [True, False])
def test_mlp_formula(bias):
    mlp = MLP(up=nn.Linear(6, 9, bias=bias), down=nn.Linear(9, 6, bias=bias)).to(DEVICE)
    x = torch.randn(4, 6, device=DEVICE)
    torch.testing.assert_close(mlp(x), mlp.down(F.gelu(mlp.up(x))), rtol=1e-5, atol=1e-6)


def test_gated_mlp_formula():
    linears = {"gate": nn.Linear(6, 9), "up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}
    mlp = GatedMLP(**linears, activation="gelu").to(DEVICE)
    x = torch.randn(4, 6, device=DEVICE)
    expected = mlp.down(F.gelu(mlp.gate(x)) * mlp.up(x))
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


def relu2(x):
    return F.relu(x).square()


GATES = {"GLU": "sigmoid", "SwiGLU": "silu", "GeGLU": "gelu", "ReGLU": "relu", "relu2": "relu2"}
FORMULAS = {"sigmoid": torch.sigmoid, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@pytest.mark.parametrize("name", GATES)
def test_gated_units_by_name(name):
    """GLU(g, u) = sigmoid(g) u, and its kin with other gates; output and gradients."""
    act = FORMULAS.get(GATES[name], relu2)
    gate, up, dy = torch.randn(3, 5, 9, device=DEVICE)
    linears = {"gate": nn.Linear(9, 9), "up": nn.Linear(9, 9), "down": nn.Linear(9, 9)}
    mlp = GatedMLP(**linears, activation=GATES[name]).to(DEVICE)
    expected = mlp.down(act(mlp.gate(gate)) * mlp.up(gate))
    torch.testing.assert_close(mlp(gate), expected, rtol=1e-5, atol=1e-6)
    inputs = (gate.requires_grad_(), up.requires_grad_())
    ours, theirs = gated_act(gate, up, GATES[name]), act(gate) * up
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found, wanted = (torch.autograd.grad(y, inputs, dy) for y in (ours, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_mlp_of_relu2():
    mlp = MLP(up=nn.Linear(6, 9), down=nn.Linear(9, 6), activation="relu2").to(DEVICE)
    x = torch.randn(4, 6, device=DEVICE)
    torch.testing.assert_close(mlp(x), mlp.down(relu2(mlp.up(x))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_dropout_acts_on_the_hidden_layer_in_training_only(gated):
    options = {"up": nn.Linear(6, 64), "down": nn.Identity(), "dropout": 0.5}
    mlp = GatedMLP(gate=nn.Linear(6, 64), **options) if gated else MLP(**options)
    x = torch.randn(8, 6, device=DEVICE)
    mlp.to(DEVICE)
    assert 0.35 < (mlp(x) == 0).float().mean() < 0.65
    assert (mlp.eval()(x) != 0).all()


def test_unknown_activation_is_named_with_those_that_exist():
    mlp = MLP(up=nn.Linear(6, 9), down=nn.Linear(9, 6), activation="swoosh").to(DEVICE)
    with pytest.raises(ValueError, match="(?s)silu.*swoosh"):
        mlp(torch.zeros(1, 6, device=DEVICE))


@pytest.mark.parametrize("placement", ["none", "pre", "post", "sandwich"])
def test_residual_formula(placement):
    norms = {
        "none": {},
        "pre": {"pre": RMSNorm(6)},
        "post": {"post": LayerNorm(6)},
        "sandwich": {"pre": RMSNorm(6), "inner": RMSNorm(6)},
    }[placement]
    residual = Residual(branch=nn.Linear(6, 6), **norms).to(DEVICE)
    x = torch.randn(4, 6, device=DEVICE)
    pre, inner, post = (norms.get(name, nn.Identity()) for name in ("pre", "inner", "post"))
    expected = post(x + inner(residual.branch(pre(x))))
    torch.testing.assert_close(residual(x), expected, rtol=1e-5, atol=1e-6)


def test_residual_dropout_drops_the_branch_and_keeps_the_stream():
    residual = Residual(branch=nn.Linear(6, 6), dropout=1.0).to(DEVICE)
    x = torch.randn(4, 6, device=DEVICE)
    assert torch.equal(residual(x), x)
    assert not torch.equal(residual.eval()(x), x)
