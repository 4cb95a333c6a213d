"""Models over many processes, on PyTorch's own engines: plans, stages and rings."""

from trilith.blocks.parallel.checkpoint import load_checkpoint, save_checkpoint
from trilith.blocks.parallel.context import context_parallel, context_parallel_attention
from trilith.blocks.parallel.pipeline import pipeline_stage
from trilith.blocks.parallel.tensor import tensor_parallel_plan
from trilith.blocks.parallel.vocab import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

__all__ = [
    "context_parallel",
    "context_parallel_attention",
    "load_checkpoint",
    "pipeline_stage",
    "save_checkpoint",
    "tensor_parallel_plan",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
