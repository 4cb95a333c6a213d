"""When a weight may be read past its module's forward, and what happens when it may not."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from tests.blocks.twin import TwinLM
from tests.support.devices import DEVICE
from trilith.blocks import MLP, GatedMLP, LMConfig, Residual, RMSNorm, build_lm, linear
from trilith.blocks.drop_in.swap import unhooked
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


class Quantized(torch.Tensor):
    """A weight whose numbers are not where a kernel would read them."""


def quantized() -> nn.Linear:
    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantized), False)
    return linear


NOT_PLAIN = {
    "quantized": quantized,
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


KINDS = {
    "gpt": {"norm": "layer_norm", "mlp": "mlp", "activation": "gelu", "position": "learned"},
    "gated": {},
}


def config_of(kind: str) -> LMConfig:
    sizes = {"vocab_size": 16, "dim": 16, "n_layers": 2, "n_heads": 2, "max_len": 8}
    return LMConfig(**sizes, **KINDS[kind], mlp_hidden=24, bias=kind == "gpt")


def test_linear_itself_is_plain():
    assert plain_linear(nn.Linear(3, 3))
    assert plain_linear(nn.Linear(3, 3, bias=False))
    assert plain_linear(nn.Linear(3, 3, device="meta"))
    with FakeTensorMode():
        assert plain_linear(nn.Linear(3, 3))
    view = nn.Linear(3, 3)
    weight = view._parameters.pop("weight")
    view.weight = weight.detach()  # as FSDP's flat parameters have them
    assert plain_linear(view)


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_whatever_does_more_when_called_is_not_plain(kind):
    assert not plain_linear(NOT_PLAIN[kind]())


GLOBAL_HOOKS = (
    "register_module_forward_pre_hook",
    "register_module_forward_hook",
    "register_module_full_backward_pre_hook",
    "register_module_full_backward_hook",
)


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_nothing_is_plain_while_all_modules_have_a_hook(register):
    layer = nn.Linear(3, 3)
    handle = getattr(nn.modules.module, register)(lambda *args: None)
    try:
        assert not plain_linear(layer)
        assert not unhooked(layer)
    finally:
        handle.remove()
    assert plain_linear(layer)
    assert unhooked(layer)


@pytest.mark.parametrize("kind", ["gpt", "gated"])
def test_a_hook_of_all_modules_sees_every_linear_layer(kind):
    model = build_lm(config_of(kind)).to(DEVICE)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        model(torch.zeros(1, 4, dtype=torch.long, device=DEVICE))
    finally:
        hook.remove()
    linears = [m for m in model.blocks.modules() if type(m) is nn.Linear]
    assert all(any(m is s for s in seen) for m in linears)


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


def with_adapters(model: nn.Module) -> nn.Module:
    """Every linear layer of the blocks wrapped, as PEFT does it, and all else frozen."""
    model.requires_grad_(False)
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Lora(child))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_whole_blocks_get_the_gradients_of_plain_torch(kind):
    """Attention's too; the judge is the same model in torch.nn, in float64."""
    ours = with_adapters(build_lm(config_of(kind)))
    theirs = with_adapters(TwinLM(config_of(kind))).double()
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(16, (2, 8))
    loss = ours.to(DEVICE)(tokens.to(DEVICE), targets=tokens.roll(-1, 1).to(DEVICE))
    expected = theirs(tokens, tokens.roll(-1, 1))
    loss.backward()
    expected.backward()

    torch.testing.assert_close(loss.cpu(), expected.float(), rtol=1e-5, atol=1e-6)
    wanted = dict(theirs.named_parameters())
    trained = {n: p.grad.cpu() for n, p in ours.named_parameters() if p.requires_grad}
    layers = 2 * (4 if kind == "gpt" else 5)
    assert len(trained) == 2 * layers
    for name, grad in trained.items():
        assert grad.abs().sum() > 0, name
        scale = wanted[name].grad.abs().max().item()
        torch.testing.assert_close(
            grad, wanted[name].grad.float(), rtol=1e-4, atol=1e-5 * scale, msg=name
        )


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


@pytest.mark.parametrize("called", ["gate", "up"])
def test_one_of_a_gated_pair_may_be_called(called):
    block = Residual(branch=make_mlp(True, lambda linear: linear), pre=RMSNorm(6)).to(DEVICE)
    x = torch.randn(5, 6, device=DEVICE)
    expected = block(x)
    getattr(block.branch, called).register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-6)


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
