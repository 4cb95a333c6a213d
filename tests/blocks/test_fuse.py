"""Existing models on our layers and back: what is swapped, what is left, and why."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import parametrizations

import trilith
from tests.support.compare import assert_like_eager, assert_one_rounding
from tests.support.devices import DEVICE
from trilith.blocks import drop_in

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Model(nn.Module):
    """Every kind of layer that is swapped, one of them twice, and some that are not."""

    def __init__(self, p=0.0):
        super().__init__()
        self.embedding = nn.Embedding(7, 12)
        self.norm = nn.LayerNorm(12)
        self.again = self.norm
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Dropout(p), nn.Linear(20, 12))
        layer = nn.TransformerEncoderLayer(12, 2, 16, p, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.rms = nn.RMSNorm(12)
        self.head = nn.Linear(12, 7)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        x = x + self.mlp(self.again(x))
        return self.head(self.rms(self.encoder(x)))


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


class PlainRMSNorm(nn.Module):
    def __init__(self, dim, shift=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, dim))
        self.eps = 1e-6
        self.shift = shift

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (self.shift + self.weight.float())).to(x.dtype)


class NotANorm(PlainRMSNorm):
    def forward(self, x):
        return super().forward(x) + 1.0


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(12, 20), nn.Linear(12, 20)
        self.down_proj = nn.Linear(20, 12)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherWayRound(SwiGLU):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def tokens():
    return torch.randint(7, (2, 5), device=DEVICE)


def results(model, x):
    loss = model(x).square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def classes(model):
    return [type(module) for module in model.modules()]


def test_outputs_gradients_parameters_and_keys_are_the_same(launches):
    model, x = Model().to(DEVICE), tokens()
    expected, identities = results(model, x), [id(p) for p in model.parameters()]
    with torch.no_grad():
        before = model.eval()(x)
    keys, was = list(model.state_dict()), classes(model)
    report = trilith.fuse(model)
    assert not launches
    torch.testing.assert_close(results(model.train(), x), expected, **CLOSE)
    assert len(set(launches)) >= 8
    launches.clear()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), before, **CLOSE)
    assert len(launches) == 12  # 3 norms, 1 activation; a layer: attention, activation, 2 norms
    assert [id(p) for p in model.parameters()] == identities
    assert list(model.state_dict()) == keys
    assert model.again is model.norm
    assert {e.name for e in report.swapped} >= {"norm", "mlp", "encoder.layers.0", "rms"}
    assert {e.name for e in report.left} >= {"embedding", "head"}
    trilith.unfuse(model)
    assert classes(model) == was
    assert not any(m._forward_pre_hooks for m in model.modules())
    launches.clear()
    torch.testing.assert_close(results(model.train(), x), expected, rtol=0, atol=0)
    assert not launches


def test_twice_is_once():
    model = Model()
    trilith.fuse(model)
    once = classes(model)
    assert not trilith.fuse(model).swapped
    assert classes(model) == once
    trilith.unfuse(model)
    assert not trilith.unfuse(model).entries


class TheirSiLU(nn.Module):
    __module__ = "transformers.activations"

    def forward(self, x):
        return nn.functional.silu(x)


class QuickGELU(nn.Module):
    def __init__(self, factor=1.702):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * torch.sigmoid(self.factor * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_gelu_of_clip_is_known_by_its_class_and_what_it_computes(dtype, launches):
    model = nn.Sequential(nn.Linear(6, 9), QuickGELU(), nn.Linear(9, 6)).to(DEVICE, dtype)
    x = torch.randn(5, 6, device=DEVICE, dtype=dtype)
    expected, wide = model(x), copy.deepcopy(model).double()(x.double())
    report = trilith.fuse(model)
    assert [(e.name, e.became) for e in report.swapped] == [
        ("", "FusedSequential"),
        ("1", "Activation"),
    ]
    exact = QuickGELU()(model[0](x).double())
    assert_one_rounding(model[1](model[0](x)), exact, scale=exact.abs())
    launches.clear()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert_like_eager(model(x), wide, expected)
    product = nn.functional.linear(x, model[0].weight)  # to which the activation's pass adds
    assert any(t.shape == product.shape and torch.equal(t, product) for t in kept)
    assert "_bias_act_fwd_kernel" in launches
    whole = torch.arange(-3, 4, device=DEVICE)
    torch.testing.assert_close(model[1](whole), QuickGELU()(whole))
    assert not trilith.fuse(nn.Sequential(QuickGELU(1.7))).swapped


def test_nothing_is_left_of_what_fuse_did():
    model = nn.ModuleList([Model(), SwiGLU(), PlainRMSNorm(12), TheirSiLU()])
    before = [(set(vars(m)), len(m._forward_pre_hooks)) for m in model.modules()]
    assert {entry.name for entry in trilith.fuse(model).swapped} >= {"0.norm", "1", "2", "3"}
    trilith.unfuse(model)
    assert [(set(vars(m)), len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_other_instances_are_untouched():
    fused, other = nn.Sequential(nn.LayerNorm(4)), nn.LayerNorm(4)
    trilith.fuse(fused)
    assert type(other) is nn.LayerNorm
    assert type(nn.LayerNorm(4)) is nn.LayerNorm


def test_the_model_itself_may_be_a_layer():
    norm = nn.LayerNorm(4)
    assert trilith.fuse(norm).swapped[0].name == ""
    assert type(norm) is drop_in.LayerNorm
    trilith.unfuse(norm)
    assert type(norm) is nn.LayerNorm


def test_what_is_left_and_why():
    replaced = nn.GELU()
    replaced.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "subclass": OwnNorm(4),
            "parametrized": parametrizations.weight_norm(nn.LayerNorm((4, 4))),
            "replaced": replaced,
            "unlike_norm": NotANorm(4),
            "unlike_mlp": OtherWayRound(),
        }
    )
    before = classes(model)
    why = {entry.name: entry.why for entry in trilith.fuse(model).left}
    model["unlike_mlp"].act_fn.__class__ = nn.SiLU
    model["unlike_mlp"].act_fn._forward_pre_hooks.clear()
    assert classes(model) == before
    assert "subclass of LayerNorm" in why["subclass"]
    assert "parametrized" in why["parametrized"]
    assert "forward was replaced" in why["replaced"]
    assert "no RMS norm" in why["unlike_norm"]
    assert "not down" in why["unlike_mlp"]


def test_hooks_are_kept_and_hooked_linears_are_called():
    model, seen = Model().to(DEVICE), []
    for module in (model.norm, model.mlp[0], model.encoder.layers[0].linear1):
        module.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    trilith.fuse(model)
    model(tokens())
    assert sorted(seen) == ["LayerNorm", "LayerNorm", "Linear", "Linear"]
    trilith.unfuse(model)
    assert len(model.norm._forward_hooks) == 1


def test_hooks_from_before_can_be_removed_after():
    norm, seen = nn.LayerNorm(4).to(DEVICE), []
    handle = norm.register_forward_pre_hook(lambda *_: seen.append(norm))
    trilith.fuse(norm)
    norm(torch.randn(2, 4, device=DEVICE))
    handle.remove()
    norm(torch.randn(2, 4, device=DEVICE))
    assert seen == [norm]


@pytest.mark.parametrize("own", ["forward", "hook"])
def test_a_norm_within_a_layer_that_does_more_is_called(own):
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True).to(DEVICE)
    x, seen = torch.randn(2, 3, 4, device=DEVICE), []
    if own == "forward":
        layer.norm2.forward = lambda x: seen.append(x) or x
    else:
        layer.norm2.register_forward_pre_hook(lambda *_: seen.append(x))
    trilith.fuse(layer)
    layer(x)
    with torch.no_grad():
        layer.eval()(x)
    assert len(seen) == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_fused_models_copy_and_pickle(again):
    model, x = Model().to(DEVICE), tokens()
    was = classes(model)
    trilith.fuse(model)
    twin = again(model)
    assert torch.equal(twin(x), model(x))
    trilith.unfuse(twin)
    assert classes(twin) == was
    assert classes(model) != was


def test_an_optimizer_made_before_keeps_training():
    model, x = Model().to(DEVICE), tokens()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    trilith.fuse(model)
    for _ in range(2):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), **CLOSE)


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) + 1.0


def test_wrapped_layers_are_called_and_layers_within_wrappers_swapped():
    mlp, x = SwiGLU().to(DEVICE), torch.randn(5, 12, device=DEVICE)
    mlp.gate_proj = LoRA(mlp.gate_proj)
    model = LoRA(nn.Sequential(mlp, nn.LayerNorm(12).to(DEVICE)))
    expected = model(x)
    assert len(trilith.fuse(model).swapped) == 3
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_a_compiled_model_is_treated_inside():
    model, x = Model().to(DEVICE), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    assert {e.name for e in trilith.fuse(compiled).swapped} >= {"_orig_mod.norm"}
    torch.testing.assert_close(compiled(x), expected, **CLOSE)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo shards on CPUs")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_sharded_modules_are_treated_inside(process_group):
    model, x = Model(), tokens()
    expected = model(x)
    for module in (model.mlp, *model.encoder.layers, model.norm, model):
        fully_shard(module, mesh=process_group)
    was = classes(model)
    names = {entry.name for entry in trilith.fuse(model).swapped}
    assert names >= {"mlp", "encoder.layers.0", "norm", "rms"}
    assert isinstance(model.norm, (drop_in.LayerNorm, FSDPModule))
    out = model(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    out.square().mean().backward()
    assert not trilith.fuse(model).swapped
    trilith.unfuse(model)
    assert classes(model) == was


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("follows", ["nothing", "an activation"])
def test_a_norm_before_a_linear_layer_is_not_kept(norm, follows, launches):
    more = [] if follows == "nothing" else [nn.GELU(), nn.Linear(20, 4)]
    sequence = nn.Sequential(norm(12), nn.Linear(12, 20), *more).to(DEVICE)
    nn.init.uniform_(sequence[0].weight, 0.5, 2.0)
    x, saved = torch.randn(5, 12, device=DEVICE), []
    normed = sequence[0](x)

    def run():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            found = results(sequence, x)
        kept = [t for t in saved if t.shape == x.shape and torch.allclose(t, normed, atol=1e-5)]
        return found, bool(kept)

    expected, kept = run()
    assert kept
    assert {e.became for e in trilith.fuse(sequence).swapped} >= {"FusedSequential"}
    actual, kept = run()
    assert not kept
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert launches
    sequence[1].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(results(sequence, x), expected, **CLOSE)


def hooked(activation):
    activation.register_forward_hook(lambda module, args, out: 2 * out)
    return activation


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LeakyReLU(0.3),
        lambda: nn.ELU(0.5),
        lambda: hooked(nn.ReLU()),
        lambda: hooked(QuickGELU()),
    ],
    ids=["slope", "alpha", "hook", "hook of another library's"],
)
def test_an_activation_within_others_keeps_its_options_and_hooks(make):
    sequence = nn.Sequential(nn.Linear(12, 64), make(), nn.Linear(64, 12))
    layer = nn.TransformerEncoderLayer(12, 2, 64, 0.0, batch_first=True)
    layer.activation = make()
    mlp = SwiGLU()
    mlp.act_fn = make()
    model, x = nn.Sequential(sequence, layer, mlp), torch.randn(2, 5, 12, device=DEVICE)
    model.to(DEVICE)
    expected = results(model, x)
    trilith.fuse(model)
    torch.testing.assert_close(results(model, x), expected, **CLOSE)


def test_dropout_within_a_sequence_acts_in_training_only():
    sequence = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4))
    sequence.to(DEVICE)
    x = torch.randn(5, 12, device=DEVICE)
    expected = sequence.eval()(x)
    trilith.fuse(sequence)
    torch.testing.assert_close(sequence(x), expected, **CLOSE)
    assert not torch.equal(sequence.train()(x), sequence(x))


def test_the_report_is_a_table():
    lines = str(trilith.fuse(Model())).splitlines()
    assert lines[0].split() == ["layer", "became", "count", "first", "why"]
    assert any(line.split()[:4] == ["LayerNorm", "LayerNorm", "5", "norm"] for line in lines)
    assert any(line.split()[:2] == ["Embedding", "left"] for line in lines)


def test_a_class_that_another_library_changed_since_is_left():
    model = nn.Sequential(nn.LayerNorm(4))
    trilith.fuse(model)
    model[0].__class__ = type("Sharded", (drop_in.LayerNorm,), {})
    assert [e.why for e in trilith.unfuse(model).left]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_fused_model_trains_under_autocast_with_a_scaler_as_before(dtype):
    model, x = Model().to(DEVICE), tokens()
    twin = copy.deepcopy(model)
    trilith.fuse(model)
    for m in (model, twin):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype):
                loss = m(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**8
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=2e-2, atol=2e-2)


def test_a_model_fused_on_meta_loads_what_a_plain_one_saved():
    model, x = Model().to(DEVICE), tokens()
    with torch.device("meta"):
        empty = Model()
    trilith.fuse(empty)
    empty.to_empty(device=DEVICE).load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(x), model(x), **CLOSE)


def test_a_default_device_changes_nothing():
    with torch.device("meta"):
        model = nn.Sequential(PlainRMSNorm(12), SwiGLU())
        assert {entry.name for entry in trilith.fuse(model).swapped} == {"0", "1", "1.act_fn"}


def test_explain_says_what_fuse_would_do_and_did_and_changes_nothing():
    model = Model()
    classes = [type(m) for m in model.modules()]
    state = [dict(vars(m)) for m in model.modules()]
    before = trilith.explain(model)
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)) for m in model.modules()] == state
    report = trilith.fuse(model)
    after = trilith.explain(model)
    for entry in report.swapped:
        assert f"would be swapped: {entry.why}" in before
    assert "swapped by fuse" in after and "would be" not in after
    named = {line.split()[0] for line in after.splitlines() if "swapped by fuse" in line}
    assert named == {entry.was for entry in report.swapped}
    for entry in report.left:
        assert entry.why in before and entry.why in after
