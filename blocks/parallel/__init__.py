"""Models over many processes, on PyTorch's own engines: plans, stages and rings."""

from trilith.blocks.parallel.tensor import tensor_parallel_plan
from trilith.blocks.parallel.vocab import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

__all__ = [
    "tensor_parallel_plan",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
