"""Models by name: the registry's modules, ours and a stranger's."""

import pytest
import torch
from torch import nn

from tests.support.devices import DEVICE
from trilith import blocks
from trilith.blocks import LMConfig, build_lm
from trilith.plugins import ModuleSpec, manager, registry

SIZES = {"vocab_size": 20, "dim": 16, "n_layers": 1, "n_heads": 2, "max_len": 8}


@pytest.fixture
def own_registry(monkeypatch):
    manager.load()
    monkeypatch.setattr(registry, "_modules", dict(registry._modules))
    return registry


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("mlp", ["mlp", "gated_mlp"])
@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal", "alibi"])
def test_named_modules_are_built(norm, mlp, position):
    model = build_lm(LMConfig(**SIZES, norm=norm, mlp=mlp, position=position))
    kinds = {type(module).__name__ for module in model.modules()}
    norms = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
    mlps = {"mlp": "MLP", "gated_mlp": "GatedMLP"}
    positions = {
        "rotary": "Rotary",
        "learned": "LearnedPosition",
        "sinusoidal": "SinusoidalPosition",
        "alibi": "Alibi",
    }
    for names, chosen in ((norms, norm), (mlps, mlp), (positions, position)):
        assert kinds & set(names.values()) == {names[chosen]}
    assert model.to(DEVICE)(torch.zeros(1, 8, dtype=torch.long, device=DEVICE)).isfinite().all()


def test_a_module_registered_by_someone_else_is_used_by_its_name(own_registry):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    own_registry.add_module(
        ModuleSpec(slot="mlp", name="doubled", build=lambda c: Doubled(c.dim, c.dim))
    )
    model = build_lm(LMConfig(**SIZES, mlp="doubled")).to(DEVICE)
    assert isinstance(model.blocks[0].mlp.branch, Doubled)
    model(torch.zeros(1, 8, dtype=torch.long, device=DEVICE)).sum().backward()
    assert model.blocks[0].mlp.branch.weight.grad is not None


class Swish(nn.Module):
    """x sigmoid(slope x), with a slope that is learned."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.empty(()))

    def reset_parameters(self):
        nn.init.constant_(self.slope, 1.5)

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


@pytest.mark.parametrize("mlp", ["mlp", "gated_mlp"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_activation_registered_by_someone_else_is_called(mlp, bias, own_registry):
    own_registry.add_module(
        ModuleSpec(slot="activation", name="acme.swish", build=lambda c: Swish())
    )
    model = build_lm(LMConfig(**SIZES, mlp=mlp, bias=bias, activation="acme.swish")).to(DEVICE)
    block = model.blocks[0].mlp
    act, branch = block.branch.activation, block.branch
    assert isinstance(act, Swish)
    assert act.slope.item() == 1.5
    for layer in (branch.up, branch.down):
        if bias:
            nn.init.normal_(layer.bias)
    x = torch.randn(2, 3, 16, device=DEVICE)
    h = block.pre(x)
    hidden = act(branch.gate(h)) * branch.up(h) if mlp == "gated_mlp" else act(branch.up(h))
    expected = x + branch.down(hidden)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)

    tokens = torch.arange(8, device=DEVICE).view(1, 8)
    model(tokens, targets=tokens).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert act.slope.grad.abs() > 0


def test_an_activation_that_nobody_has_is_refused_with_both_lists(own_registry):
    config = LMConfig(**SIZES, activation="acme.swish")
    kernels = "kernels have: identity, relu, relu2, .*, silu; registered modules are"
    with pytest.raises(KeyError, match=f"no activation 'acme.swish'; {kernels}: none"):
        build_lm(config)
    own_registry.add_module(ModuleSpec(slot="activation", name="acme.mish", build=nn.Mish))
    with pytest.raises(KeyError, match=f"{kernels}: acme.mish"):
        build_lm(config)


@pytest.mark.parametrize("acts_on", ["tokens", "heads"])
def test_a_position_of_someone_else_is_called_with_what_it_acts_on(acts_on, own_registry):
    given = []

    class Somewhere(nn.Module):
        def forward(self, *tensors):
            given.extend(tuple(t.shape) for t in tensors)
            return tensors if len(tensors) > 1 else tensors[0]

    Somewhere.acts_on = acts_on
    own_registry.add_module(
        ModuleSpec(slot="position", name="acme.somewhere", build=lambda c: Somewhere())
    )
    model = build_lm(LMConfig(**SIZES, position="acme.somewhere", n_kv_heads=1)).to(DEVICE)
    model(torch.zeros(3, 5, dtype=torch.long, device=DEVICE))
    shapes = {"tokens": [(3, 5, 16)], "heads": [(3, 2, 5, 8), (3, 1, 5, 8)]}
    assert given == shapes[acts_on]


@pytest.mark.parametrize(
    ("acts_on", "error", "message"),
    [
        (None, TypeError, "acts_on is missing; it must say what it takes, one of 'tokens',"),
        ("rows", ValueError, "acts_on must be one of 'tokens', 'heads', 'scores', got 'rows'"),
    ],
)
def test_a_position_says_what_it_acts_on(acts_on, error, message, own_registry):
    class Somewhere(nn.Identity):
        pass

    if acts_on:
        Somewhere.acts_on = acts_on
    own_registry.add_module(
        ModuleSpec(slot="position", name="acme.somewhere", build=lambda c: Somewhere())
    )
    with pytest.raises(error, match=f"position 'acme.somewhere': Somewhere.{message}"):
        build_lm(LMConfig(**SIZES, position="acme.somewhere"))


@pytest.mark.parametrize(
    ("slot", "names"),
    [
        ("norm", "layer_norm, rms_norm"),
        ("mlp", "gated_mlp, mlp"),
        ("attention", "self_attention"),
        ("position", "alibi, learned, rotary, sinusoidal"),
    ],
)
def test_unknown_name_says_which_exist(slot, names):
    with pytest.raises(KeyError, match=f"no {slot} 'nonsense'; there are: {names}"):
        build_lm(LMConfig(**SIZES, **{slot: "nonsense"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide dim=16, got 3"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads=2, got 3"),
        ({"n_layers": 0}, "n_layers must be positive, got 0"),
        ({"mlp_hidden": 0}, "mlp_hidden must be positive, got 0"),
        ({"residual": "sideways"}, "residual must be one of .*, got 'sideways'"),
        ({"stochastic_depth": -0.1}, "stochastic_depth must be a probability .*, got -0.1"),
        ({"dropout": 1.5}, "dropout must be a probability between 0 and 1, got 1.5"),
    ],
)
def test_bad_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"LMConfig: {message}"):
        LMConfig(**{**SIZES, **changes})


@pytest.mark.parametrize("residual", ["pre", "post", "sandwich"])
def test_stochastic_depth_grows_with_depth(residual):
    sizes = {**SIZES, "n_layers": 2}
    model = build_lm(LMConfig(**sizes, stochastic_depth=0.4, residual=residual)).to(DEVICE)
    drops = [m.p for m in model.modules() if isinstance(m, blocks.StochasticDepth)]
    assert drops == pytest.approx([0.2, 0.2, 0.4, 0.4])
    tokens = torch.arange(8, device=DEVICE)[None]
    plain = build_lm(LMConfig(**sizes, residual=residual)).to(DEVICE)
    assert [p.shape for p in plain.parameters()] == [p.shape for p in model.parameters()]
    for theirs, ours in zip(plain.parameters(), model.parameters(), strict=True):
        theirs.data.copy_(ours)
    found, expected = model.eval()(tokens), plain.eval()(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model.train()(tokens, tokens).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_alibi_reaches_the_scores():
    model = build_lm(LMConfig(**SIZES, position="alibi")).to(DEVICE).eval()
    tokens = torch.tensor([[3, 3, 5, 3, 3]], device=DEVICE)
    before = model(tokens)
    model.blocks[0].attention.branch.position.slopes.zero_()
    assert not torch.allclose(model(tokens), before)
    [text] = model.generate(tokens, 12)  # past max_len: slopes know no longest text
    assert len(text) == 17


def test_sizes():
    model = build_lm(LMConfig(**{**SIZES, "dim": 96, "n_heads": 4, "n_kv_heads": 2}))
    attention, mlp = model.blocks[0].attention.branch, model.blocks[0].mlp.branch
    assert attention.qkv.out_features == (4 + 2 * 2) * 24
    assert mlp.gate.out_features == 256
    model = build_lm(LMConfig(**SIZES, mlp="mlp"))
    assert model.blocks[0].mlp.branch.up.out_features == 64


def test_public_names_exist():
    assert all(hasattr(blocks, name) for name in blocks.__all__)
    assert sorted(blocks.__all__, key=str.lower) == sorted(set(blocks.__all__), key=str.lower)
