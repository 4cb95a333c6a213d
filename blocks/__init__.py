"""Transformer blocks made of the kernels."""

if __name__ == "blocks":
    raise ImportError("import trilith.blocks, not blocks: the folder is mapped by the package")

from trilith.blocks.activations import GLU, GatedActivation, GeGLU, ReGLU, ReLU2, SwiGLU
from trilith.blocks.alibi import Alibi
from trilith.blocks.attention import SelfAttention
from trilith.blocks.cache import KVCache, PagedKVCache
from trilith.blocks.config import LMConfig, build_lm
from trilith.blocks.cross_attention import CrossAttention
from trilith.blocks.mlp import MLP, GatedMLP
from trilith.blocks.norms import LayerNorm, RMSNorm
from trilith.blocks.positions import LearnedPosition, Rotary, SinusoidalPosition
from trilith.blocks.residual import Residual
from trilith.blocks.stochastic_depth import StochasticDepth
from trilith.blocks.transformer import TransformerBlock, TransformerLM

__all__ = [
    "Alibi",
    "CrossAttention",
    "MLP",
    "GLU",
    "GatedActivation",
    "GatedMLP",
    "GeGLU",
    "KVCache",
    "LMConfig",
    "LayerNorm",
    "LearnedPosition",
    "PagedKVCache",
    "RMSNorm",
    "ReGLU",
    "ReLU2",
    "Residual",
    "Rotary",
    "SelfAttention",
    "SinusoidalPosition",
    "StochasticDepth",
    "SwiGLU",
    "TransformerBlock",
    "TransformerLM",
    "build_lm",
]
