"""Transformer blocks made of the kernels."""

if __name__ == "blocks":
    raise ImportError("import trilith.blocks, not blocks: the folder is mapped by the package")

from trilith.blocks.attention import SelfAttention
from trilith.blocks.cache import KVCache, PagedKVCache
from trilith.blocks.config import LMConfig, build_lm
from trilith.blocks.mlp import MLP, GatedMLP
from trilith.blocks.norms import LayerNorm, RMSNorm
from trilith.blocks.positions import LearnedPosition, Rotary, SinusoidalPosition
from trilith.blocks.residual import Residual
from trilith.blocks.transformer import TransformerBlock, TransformerLM

__all__ = [
    "MLP",
    "GatedMLP",
    "KVCache",
    "LMConfig",
    "LayerNorm",
    "LearnedPosition",
    "PagedKVCache",
    "RMSNorm",
    "Residual",
    "Rotary",
    "SelfAttention",
    "SinusoidalPosition",
    "TransformerBlock",
    "TransformerLM",
    "build_lm",
]
