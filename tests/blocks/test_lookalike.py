"""Layers of other libraries that are known by their parts and by what they compute."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import trilith
from tests.blocks.test_fuse import CLOSE, OwnNorm, PlainRMSNorm, SwiGLU, results
from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE, DTYPES, dtype_name


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rms_norms_of_other_libraries_are_known_by_what_they_compute(shift, dtype, launches):
    norm = PlainRMSNorm(12, shift).to(DEVICE, dtype)
    x = torch.randn(5, 12, device=DEVICE, dtype=dtype)
    expected, generator = norm(x), torch.get_rng_state()
    assert trilith.fuse(norm).swapped
    assert torch.equal(torch.get_rng_state(), generator)
    launches.clear()
    close = CLOSE if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(norm(x), expected, **close)
    assert launches
    trilith.unfuse(norm)
    assert type(norm) is PlainRMSNorm
    assert torch.equal(norm(x), expected)


def test_gated_mlps_of_other_libraries(launches):
    mlp, x = SwiGLU().to(DEVICE), torch.randn(5, 12, device=DEVICE)
    expected = results(mlp, x)
    report = trilith.fuse(mlp)
    assert report.swapped[0].became == "GatedMLP"
    launches.clear()
    torch.testing.assert_close(results(mlp, x), expected, **CLOSE)
    assert any("gated" in name for name in launches)


class LlamasMLP(nn.Module):
    """As in Llama's own code, torchtitan and others; torchtune's has its activation as a module."""

    def __init__(self, activation=None):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 20)
        if activation is not None:
            self.activation = activation

    def forward(self, x):
        act = self.activation if hasattr(self, "activation") else nn.functional.silu
        return self.w2(act(self.w1(x)) * self.w3(x))


class ReluMLP(LlamasMLP):
    def forward(self, x):
        return self.w2(self.w1(x).relu() * self.w3(x))


@pytest.mark.parametrize("activation", [None, nn.SiLU(), nn.GELU()], ids=repr)
def test_gated_mlps_with_the_names_of_llamas_own_code(activation, launches):
    mlp, x = LlamasMLP(activation).to(DEVICE), torch.randn(5, 12, device=DEVICE)
    expected = results(mlp, x)
    assert trilith.fuse(mlp).swapped[0].became == "NumberedGatedMLP"
    launches.clear()
    torch.testing.assert_close(results(mlp, x), expected, **CLOSE)
    assert any("gated" in name for name in launches)
    called = []
    mlp.w3.register_forward_hook(lambda *_: called.append(mlp.w3))
    mlp(x)
    assert called


class ScaleRMSNorm(nn.Module):
    """As torchtune's."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, dim))
        self.eps = 1e-6

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_rms_norm_may_call_its_weight_scale(dtype, launches):
    norm = ScaleRMSNorm(12).to(DEVICE, dtype)
    x = torch.randn(5, 12, device=DEVICE, dtype=dtype)
    expected, keys = norm(x), list(norm.state_dict())
    assert len(trilith.fuse(norm).swapped) == 1
    assert_like_eager(norm(x), copy.deepcopy(norm).double()(x.double()), expected)
    assert launches and list(norm.state_dict()) == keys
    assert "(12,), eps=1e-06" in repr(norm)


def as_a_replica(norm, name):
    """DataParallel's replicas and FSDP1's layers have tensors where their parameters were."""
    value = norm._parameters.pop(name)
    setattr(norm, name, value.detach())


def parametrized(norm, name):
    parametrize.register_parametrization(norm, name, nn.Identity())


@pytest.mark.parametrize("change", [as_a_replica, parametrized])
@pytest.mark.parametrize(("make", "name"), [(PlainRMSNorm, "weight"), (ScaleRMSNorm, "scale")])
def test_the_weight_need_not_stay_a_parameter(make, name, change):
    norm, x = make(12).to(DEVICE), torch.randn(5, 12, device=DEVICE)
    trilith.fuse(norm)
    expected = norm(x)
    change(norm, name)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=0)


class WideLayerNorm(nn.LayerNorm):
    """As Whisper's, CLIP's and diffusers', each in its own words."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Float32LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_layer_norm_that_casts_is_known_by_what_it_computes(dtype, options, launches):
    norm = WideLayerNorm(12, **options).to(DEVICE)
    x = torch.randn(5, 12, device=DEVICE, dtype=dtype)
    expected = norm(x)
    assert trilith.fuse(norm).swapped[0].became == "CastLayerNorm"
    assert_like_eager(norm(x), copy.deepcopy(norm).double()(x.double()), expected)
    assert launches and isinstance(norm, nn.LayerNorm)
    trilith.unfuse(norm)
    assert type(norm) is WideLayerNorm


class WideRMSNorm(PlainRMSNorm):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.shift + self.weight) * wide.to(x.dtype)


class WeightsRMSNorm(PlainRMSNorm):
    def forward(self, x):
        wide = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide if self.weight.dtype == torch.float32 else wide.bfloat16())


class EpsOutside(PlainRMSNorm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class GatedNorm(PlainRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * nn.functional.silu(gate))


class ClampedNorm(PlainRMSNorm):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class Float32Norm(PlainRMSNorm):
    def forward(self, x):
        return super().forward(x.float())


class ClampedMLP(SwiGLU):
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=10.0), self.up_proj(x).clamp(-10.0, 10.0)
        return self.down_proj(self.act_fn(gate) * up)


class DroppingMLP(SwiGLU):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class ScaledMLP(SwiGLU):
    def forward(self, x, scale=None):
        return super().forward(x) if scale is None else super().forward(x) * scale


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: EpsOutside(12),
        lambda: GatedNorm(12),
        lambda: ClampedNorm(12),
        lambda: Float32Norm(12),
        lambda: Float32LayerNorm(12),
        lambda: OwnNorm(12),
        ClampedMLP,
        DroppingMLP,
        ScaledMLP,
        ReluMLP,
    ],
    ids=[
        "eps outside",
        "gate",
        "clamped norm",
        "dtype",
        "dtype of a layer norm",
        "twice",
        "clamped MLP",
        "dropout",
        "scale",
        "relu",
    ],
)
def test_what_differs_on_some_inputs_or_in_training_is_left(make, training):
    module = make().train(training)
    generator = torch.get_rng_state()
    assert "" not in {entry.name for entry in trilith.fuse(module).swapped}
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("cls", [PlainRMSNorm, WideRMSNorm, WeightsRMSNorm])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=["w32", "w16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
def test_a_norm_of_another_dtype_than_its_input_gives_the_dtype_it_gave(cls, weight, dtype):
    norm = cls(12).to(DEVICE, weight)
    x = torch.randn(5, 12, device=DEVICE, dtype=dtype)
    expected = norm(x)
    assert trilith.fuse(norm).swapped
    torch.testing.assert_close(norm(x), expected, rtol=2e-2, atol=1e-3)
