"""trilith.inspect: what it says of models whose gradients are known to vanish, explode or stay."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import trilith
from tests.support.devices import DEVICE
from trilith.blocks import MLP, LMConfig, Residual, RMSNorm, build_lm
from trilith.blocks.spectrum import spectrum

DIM, DEPTH = 16, 12


def stack(block):
    torch.manual_seed(1)
    return nn.Sequential(*[block() for _ in range(DEPTH)]).to(DEVICE)


def flow_of(model):
    x = torch.randn(32, DIM, device=DEVICE)
    return trilith.inspect.gradient_flow(model, lambda m: m(x).square().mean())


def of_blocks(flow):
    return [row for row in flow.layers if row.name.count(".") == 0]


def sigmoids():
    return nn.Sequential(nn.Linear(DIM, DIM), nn.Sigmoid())


def residuals():
    branch = MLP(up=nn.Linear(DIM, DIM), down=nn.Linear(DIM, DIM), activation="sigmoid")
    return Residual(branch=branch, pre=RMSNorm(DIM))


def too_large():
    layer = nn.Linear(DIM, DIM, bias=False)
    nn.init.normal_(layer.weight, std=4 / math.sqrt(DIM))
    return nn.Sequential(layer, nn.LeakyReLU(0.5))


def test_deep_sigmoid_stack_vanishes():
    rows = of_blocks(flow_of(stack(sigmoids)))
    assert len(rows) == DEPTH
    assert rows[0].gradient < 1e-4 * rows[-1].gradient
    assert all(row.singular < 0.6 and row.radius <= row.singular for row in rows)


def test_residuals_and_norm_keep_the_gradient():
    rows = of_blocks(flow_of(stack(residuals)))
    assert 0.2 < rows[0].gradient / rows[-1].gradient < 5
    assert all(0.8 < row.radius < 2 for row in rows)


def test_bad_init_explodes():
    rows = of_blocks(flow_of(stack(too_large)))
    assert rows[0].gradient > 1e3 * rows[-1].gradient
    assert rows[-1].activation > 1e3 * rows[0].activation
    assert all(row.singular > 2 for row in rows)


def test_norms_are_those_of_autograd():
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, 3)).to(DEVICE)
    x = torch.randn(8, DIM, device=DEVICE)
    first, second = trilith.inspect.gradient_flow(model, lambda m: m(x).square().sum()).layers
    assert all(p.grad is None for p in model.parameters())
    hidden = model[0](x)
    hidden.retain_grad()
    model[1](hidden).square().sum().backward()
    assert first.activation == pytest.approx(hidden.norm().item(), rel=1e-5)
    assert first.gradient == pytest.approx(hidden.grad.norm().item(), rel=1e-5)
    own = torch.cat([p.grad.flatten() for p in model[1].parameters()]).norm().item()
    assert second.parameters == pytest.approx(own, rel=1e-5)
    assert math.isnan(second.radius)
    singular = torch.linalg.matrix_norm(model[1].weight, 2).item()
    assert second.singular == pytest.approx(singular, rel=0.05)


@pytest.mark.parametrize("kind", ["module", "mlp"])
def test_share_of_dead_relus(kind):
    up, down = nn.Linear(4, 8), nn.Linear(8, 4)
    with torch.no_grad():
        up.bias[:6] = -100.0
        up.bias[6:] = 100.0
    mlp = MLP(up=up, down=down, activation="relu")
    model = (nn.Sequential(up, nn.ReLU(), down) if kind == "module" else mlp).to(DEVICE)
    x = torch.randn(16, 4, device=DEVICE)
    flow = trilith.inspect.gradient_flow(model, lambda m: m(x).sum())
    assert [row.dead for row in flow.layers if not math.isnan(row.dead)] == [0.75]


def test_spectrum_of_known_matrices():
    x = torch.zeros(2)
    turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert spectrum(lambda v: turn @ v, x) == pytest.approx((0.9, 0.9), rel=1e-4)
    shear = torch.tensor([[0.5, 3.0], [0.0, 0.25]])
    singular, radius = spectrum(lambda v: shear @ v, x)
    assert singular == pytest.approx(torch.linalg.matrix_norm(shear, 2).item(), rel=1e-4)
    assert radius == pytest.approx(0.5, rel=1e-3)
    assert spectrum(lambda v: 0 * v, x) == (0.0, 0.0)


def test_language_model_has_a_row_for_each_block():
    model = build_lm(LMConfig(vocab_size=11, dim=8, n_layers=2, n_heads=2, max_len=8)).to(DEVICE)
    tokens = torch.randint(11, (2, 4), device=DEVICE)
    flow = trilith.inspect.gradient_flow(model, lambda m: m(tokens, targets=tokens))
    rows = {row.name: row for row in flow.layers}
    for name in ("blocks.0", "blocks.1"):
        row = rows[name]
        assert min(row.activation, row.gradient, row.parameters, row.singular, row.radius) > 0
    assert model.training and not any(m._forward_hooks for m in model.modules())


class Masked(nn.Linear):
    def forward(self, x, *, mask):
        return super().forward(x) * mask


class Paired(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x), mask


class Unmasked(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x)


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Masked(4, 4), Paired(4, 4), Unmasked(4, 4)])

    def forward(self, x):
        x = self.blocks[0](x, mask=torch.ones_like(x))
        x, _ = self.blocks[1](x)
        return self.blocks[2](x, mask=None)


def test_blocks_of_other_arguments_or_results_have_norms_and_no_jacobian():
    flow = trilith.inspect.gradient_flow(
        Called().to(DEVICE), lambda m: m(torch.randn(3, 4, device=DEVICE)).square().sum()
    )
    masked, paired, unmasked = flow.layers
    assert masked.activation > 0 and paired.gradient > 0
    assert math.isnan(masked.singular) and math.isnan(paired.singular)
    assert unmasked.singular > 0


def test_frozen_and_unused_parameters_have_no_gradient():
    first, second, unused = model = stack(lambda: nn.Linear(DIM, DIM))[:3]
    first.requires_grad_(False)
    x = torch.randn(8, DIM, device=DEVICE)
    flow = trilith.inspect.gradient_flow(model, lambda m: second(first(x)).square().mean())
    assert [row.name for row in flow.layers] == ["0", "1"]
    assert math.isnan(flow.layers[0].parameters) and flow.layers[1].parameters > 0


def test_each_module_keeps_its_mode():
    block = nn.Sequential(nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)).to(DEVICE)
    block[1].eval()
    flow_of(nn.Sequential(block))
    assert [m.training for m in block.modules()] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_jacobians_of_a_16_bit_model_are_those_in_float32(dtype):
    model = stack(lambda: nn.Linear(DIM, DIM)).to(dtype)
    x = torch.randn(4, DIM, device=DEVICE, dtype=dtype)
    flow = trilith.inspect.gradient_flow(model, lambda m: m(x).float().square().mean())
    for layer, row in zip(model, flow.layers, strict=True):
        expected = torch.linalg.matrix_norm(layer.weight.float(), ord=2).item()
        assert math.isclose(row.singular, expected, rel_tol=0.05)
        assert layer.weight.dtype == dtype


def test_table_and_plot(tmp_path):
    flow = flow_of(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()).to(DEVICE))
    head, *rows = str(flow).splitlines()
    assert head.split()[:4] == ["layer", "kind", "activation", "gradient"]
    assert head.split()[4:] == ["parameters", "dead", "singular", "radius"]
    assert [row.split()[:2] for row in rows] == [["0", "Linear"], ["1", "ReLU"]]
    pytest.importorskip("matplotlib")
    figure = flow.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 1000
    assert len(figure.axes) == 3


def test_loss_must_be_a_scalar_with_a_gradient():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="scalar"):
        trilith.inspect.gradient_flow(model, lambda m: m(torch.zeros(1, 2)))
    with pytest.raises(TypeError, match=r"loss must return a tensor, got float; leave its item"):
        trilith.inspect.gradient_flow(model, lambda m: m(torch.zeros(1, 2)).sum().item())
    assert not model._forward_hooks


def test_a_model_without_trained_parameters_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    x = torch.zeros(1, 2, requires_grad=True)
    with pytest.raises(ValueError, match="model must have parameters that require gradients"):
        trilith.inspect.gradient_flow(model, lambda m: m(x).sum())


def test_jacobian_of_a_linear_layer_is_its_weight():
    layer = nn.Linear(5, 3).to(DEVICE)
    x = torch.randn(5, device=DEVICE)
    torch.testing.assert_close(trilith.inspect.jacobian(layer, x), layer.weight)
    norm = RMSNorm(5).to(DEVICE)
    expected = torch.autograd.functional.jacobian(norm, x)
    torch.testing.assert_close(trilith.inspect.jacobian(norm, x), expected)


class Square(torch.autograd.Function):
    factor = 2.0

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 2 * grad * x * weight, Square.factor / 2 * grad * x * x


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x):
        return Square.apply(x, self.weight.expand_as(x))


def test_gradcheck_passes_and_fails(monkeypatch):
    x = torch.randn(2, 3)
    module = nn.Sequential(Squares(), nn.BatchNorm1d(3), nn.Dropout(0.5))
    assert trilith.inspect.gradcheck(module, x) is True
    assert module[1].num_batches_tracked == 0 and module[0].weight.dtype == torch.float32
    monkeypatch.setattr(Square, "factor", 3.0)
    with pytest.raises(GradcheckError, match="Sequential: the gradient of parameter 0.weight"):
        trilith.inspect.gradcheck(module, x)


def test_a_loss_that_was_computed_already_is_refused():
    with pytest.raises(TypeError, match=r"loss must be callable as loss\(model\), got Tensor"):
        trilith.inspect.gradient_flow(nn.Linear(2, 2), torch.zeros(()))
