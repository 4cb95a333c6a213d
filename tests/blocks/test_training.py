"""Models that train: beside plain torch.nn, and on a problem that needs a hidden layer."""

import pytest
import torch
from torch import nn

from tests.blocks.twin import TwinLM
from tests.support.devices import DEVICE
from trilith.blocks import MLP, LMConfig, build_lm
from trilith.kernels._runtime.launch import observers

SIZES = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden": 48, "max_len": 24}
STYLES = {
    "llama": {"n_kv_heads": 2, "tied": False},
    "gpt": {
        "norm": "layer_norm",
        "mlp": "mlp",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
    },
}


@pytest.mark.parametrize("style", STYLES)
def test_loss_curve_is_that_of_plain_torch(style, launched):
    config = LMConfig(**SIZES, **STYLES[style])
    ours, twin = build_lm(config).to(DEVICE), TwinLM(config).to(DEVICE)
    twin.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 7, (20, 2, 13), device=DEVICE)

    curves = torch.tensor([losses(model, tokens) for model in (ours, twin)])

    assert launched, "our model must run on kernels here"
    assert curves[0, -1] < curves[0, 0] - 0.2
    assert (curves[0] - curves[1]).abs().max() <= 1e-4


@pytest.fixture
def launched():
    """Every kernel that starts during the test."""
    kernels = []

    def observe(kernel, *_):
        kernels.append(kernel)

    observers.append(observe)
    yield kernels
    observers.remove(observe)


def losses(model: nn.Module, tokens: torch.Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for batch in tokens:
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_mlp_learns_xor_and_a_linear_model_cannot():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], device=DEVICE)
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]], device=DEVICE)
    linear = nn.Linear(2, 1)
    mlp = MLP(up=nn.Linear(2, 8), down=nn.Linear(8, 1), activation="tanh")

    assert fit(linear.to(DEVICE), x, y) == pytest.approx(0.25, abs=1e-3)
    assert fit(mlp.to(DEVICE), x, y) < 1e-3


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
