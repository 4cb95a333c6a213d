"""The plugin `trilith`: our own ops and modules, brought in through the hooks of any plugin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from trilith.blocks.alibi import Alibi
from trilith.blocks.attention import SelfAttention
from trilith.blocks.config import LMConfig, build_activation, build_position
from trilith.blocks.mlp import MLP, GatedMLP
from trilith.blocks.norms import LayerNorm, RMSNorm
from trilith.blocks.positions import LearnedPosition, Rotary, SinusoidalPosition
from trilith.kernels import OPS
from trilith.plugins import ModuleSpec, Op, hookimpl, registry

_HIDDEN_MULTIPLE = 64


def _layer_norm(config: LMConfig) -> LayerNorm:
    return LayerNorm(config.dim, bias=config.bias)


def _rms_norm(config: LMConfig) -> RMSNorm:
    return RMSNorm(config.dim)


def _mlp(config: LMConfig) -> MLP:
    hidden = config.mlp_hidden or 4 * config.dim
    return MLP(
        up=nn.Linear(config.dim, hidden, bias=config.bias),
        down=nn.Linear(hidden, config.dim, bias=config.bias),
        activation=build_activation(config),
        gain=config.residual_gain,
    )


def _gated_mlp(config: LMConfig) -> GatedMLP:
    hidden = config.mlp_hidden or _rounded_up(8 * config.dim / 3)
    return GatedMLP(
        gate=nn.Linear(config.dim, hidden, bias=config.bias),
        up=nn.Linear(config.dim, hidden, bias=config.bias),
        down=nn.Linear(hidden, config.dim, bias=config.bias),
        activation=build_activation(config),
        gain=config.residual_gain,
    )


def _self_attention(config: LMConfig) -> SelfAttention:
    heads = config.n_heads + 2 * config.kv_heads
    return SelfAttention(
        qkv=nn.Linear(config.dim, heads * config.head_dim, bias=config.bias),
        out=nn.Linear(config.dim, config.dim, bias=config.bias),
        n_heads=config.n_heads,
        n_kv_heads=config.kv_heads,
        position=build_position(config, "heads", "scores"),
        dropout=config.dropout,
        gain=config.residual_gain,
    )


def _rotary(config: LMConfig) -> Rotary:
    return Rotary(config.head_dim, config.max_len, base=config.rotary_base)


def _learned(config: LMConfig) -> LearnedPosition:
    return LearnedPosition(config.max_len, config.dim, scale=config.position_scale)


def _sinusoidal(config: LMConfig) -> SinusoidalPosition:
    return SinusoidalPosition(config.max_len, config.dim, scale=config.position_scale * 2**0.5)


def _alibi(config: LMConfig) -> Alibi:
    return Alibi(config.n_heads)


def _rounded_up(size: float) -> int:
    return -int(-size // _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE


MODULES = (
    ModuleSpec(slot="norm", name="layer_norm", build=_layer_norm),
    ModuleSpec(slot="norm", name="rms_norm", build=_rms_norm),
    ModuleSpec(slot="mlp", name="mlp", build=_mlp),
    ModuleSpec(slot="mlp", name="gated_mlp", build=_gated_mlp),
    ModuleSpec(slot="attention", name="self_attention", build=_self_attention),
    ModuleSpec(slot="position", name="rotary", build=_rotary),
    ModuleSpec(slot="position", name="learned", build=_learned),
    ModuleSpec(slot="position", name="sinusoidal", build=_sinusoidal),
    ModuleSpec(slot="position", name="alibi", build=_alibi),
)


def _example_config(slot: str, name: str) -> LMConfig:
    """What a module is checked with."""
    small = LMConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_len=8)
    chosen: dict[str, Any] = {slot: name}
    return replace(small, **chosen)


registry.example_config = _example_config


@hookimpl
def trilith_register_ops() -> tuple[Op, ...]:
    return OPS


@hookimpl
def trilith_register_modules() -> tuple[ModuleSpec, ...]:
    return MODULES
