"""A language model from a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from trilith.blocks.residual import Residual
from trilith.blocks.stochastic_depth import StochasticDepth
from trilith.blocks.transformer import TransformerBlock, TransformerLM, embedding_deviation
from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.plugins import registry

ACTS_ON = ("tokens", "heads", "scores")
RESIDUALS = ("pre", "post", "sandwich")


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Sizes and choices of a language model. `build_lm` makes it.

    Sizes
        vocab_size, dim, n_layers, n_heads: positive; heads divide dim.
        n_kv_heads: divides n_heads; None for as many as heads.
        mlp_hidden: None lets the MLP choose (4 * dim; gated about 8/3 * dim).
        max_len: longest sequence.
    Names, looked up in the registry, so that a plugin's are used by naming them
        norm, mlp, attention, position ("rotary", "learned", "sinusoidal", "alibi").
    Choices
        activation: a name that the MLP's kernel knows, or of the registry's slot "activation": such
            a module is called, unfused.
        residual: "pre", "post" or "sandwich".
        rotary_base: of the position "rotary".
        bias: whether linear layers and LayerNorm have one.
        dropout: of the embedded tokens, the attention weights, and each residual branch.
        stochastic_depth: probability that the last block's branches are left out of a sample;
            those of block l of n by l / n of it.
        tied: whether the head is the embedding's table.
        checkpoint_activations: recompute each block in backward.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    mlp_hidden: int | None = None
    max_len: int = 1024
    norm: str = "rms_norm"
    mlp: str = "gated_mlp"
    attention: str = "self_attention"
    position: str = "rotary"
    activation: str = "silu"
    residual: str = "pre"
    rotary_base: float = 10000.0
    bias: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    tied: bool = True
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "mlp_hidden", "max_len"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"LMConfig: {name} must be positive, got {getattr(self, name)}")
        if self.dim % self.n_heads:
            raise ValueError(f"LMConfig: n_heads must divide dim={self.dim}, got {self.n_heads}")
        if self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"LMConfig: n_kv_heads must divide n_heads={self.n_heads}, got {self.n_kv_heads}"
            )
        if self.residual not in RESIDUALS:
            raise ValueError(
                f"LMConfig: residual must be one of {RESIDUALS}, got {self.residual!r}"
            )
        for name in ("dropout", "stochastic_depth"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"LMConfig: {name} must be a probability between 0 and 1, "
                    f"got {getattr(self, name)}"
                )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def residual_gain(self) -> float:
        """What keeps the sum of all residual branches at the scale of one."""
        return 1.0 / math.sqrt(2 * self.n_layers)

    @property
    def position_scale(self) -> float:
        """Positions added to embedded tokens have the tokens' scale."""
        return embedding_deviation(self.dim, tied=self.tied)


def build_lm(config: LMConfig) -> TransformerLM:
    """The model that a configuration describes, freshly initialised.

    Raises:
        KeyError: a norm, mlp, attention, position or activation of that name is not registered; the
            message lists those that are.
        TypeError, ValueError: a position module does not say what it acts on.
    """
    model = TransformerLM(
        embedding=nn.Embedding(config.vocab_size, config.dim),
        position=build_position(config, "tokens"),
        blocks=nn.ModuleList(build_block(config, 1 + i) for i in range(config.n_layers)),
        norm=nn.Identity() if config.residual == "post" else _norm(config),
        head=None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False),
        dropout=config.dropout,
        checkpoint_activations=config.checkpoint_activations,
    )
    model.reset_parameters()
    return model


def build_block(config: LMConfig, number: int = 1) -> TransformerBlock:
    """Block `number` of the model, from 1; its weights are not yet scaled."""
    attention = registry.build_module("attention", config.attention, config)
    mlp = registry.build_module("mlp", config.mlp, config)
    return TransformerBlock(
        attention=_residual(config, attention, number), mlp=_residual(config, mlp, number)
    )


def build_position(config: LMConfig, *acts_on: str) -> nn.Module | None:
    """The configured position module if it acts on one of these, else None.

    They are "tokens", or "heads" (queries and keys) and "scores", which are attention's.
    """
    with torch.device("meta"):
        probe = registry.build_module("position", config.position, config)
    known = ", ".join(map(repr, ACTS_ON))
    module = f"position {config.position!r}: {type(probe).__name__}.acts_on"
    if not hasattr(probe, "acts_on"):
        raise TypeError(f"{module} is missing; it must say what it takes, one of {known}")
    if probe.acts_on not in ACTS_ON:
        raise ValueError(f"{module} must be one of {known}, got {probe.acts_on!r}")
    if probe.acts_on not in acts_on:
        return None
    return registry.build_module("position", config.position, config)


def build_activation(config: LMConfig) -> str | nn.Module:
    """The kernels' name of the activation; the module registered by it where they have none."""
    name = config.activation
    if name in ACTIVATIONS:
        return name
    modules = registry.module_names("activation")
    if name not in modules:
        raise KeyError(
            f"no activation {name!r}; kernels have: {', '.join(ACTIVATIONS)}; "
            f"registered modules are: {', '.join(modules) or 'none'}"
        )
    return registry.build_module("activation", name, config)


def _residual(config: LMConfig, branch: nn.Module, number: int) -> Residual:
    inner = [_norm(config)] if config.residual == "sandwich" else []
    if config.stochastic_depth:
        inner.append(StochasticDepth(config.stochastic_depth * number / config.n_layers))
    return Residual(
        branch=branch,
        pre=_norm(config) if config.residual in ("pre", "sandwich") else None,
        inner=nn.Sequential(*inner) if len(inner) > 1 else next(iter(inner), None),
        post=_norm(config) if config.residual == "post" else None,
        dropout=config.dropout,
    )


def _norm(config: LMConfig) -> nn.Module:
    return registry.build_module("norm", config.norm, config)
