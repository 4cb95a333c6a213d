"""A decoder-only transformer language model, from the top down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trilith.blocks import generation
from trilith.blocks.linear import plain, plain_linear, reset, reset_linear
from trilith.blocks.residual import Residual
from trilith.blocks.stream import Stream
from trilith.kernels import (
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    cross_entropy,
    dropout,
    linear_cross_entropy,
)
from trilith.plugins import may_fuse
from trilith.plugins.sharding import is_dtensor

LOGIT_DEVIATION = 0.5


class TransformerLM(nn.Module):
    """Tokens to logits, or to a loss.

    Args:
        embedding: token table (vocabulary, dim).
        blocks: called in order on (B, T, dim).
        norm: called before the head.
        head: dim -> vocabulary; None ties it to the embedding's weight.
        position: called as `position(x) -> x` on the embedded tokens, such as `LearnedPosition`.
        dropout: probability, applied to the embedded tokens.
        checkpoint_activations: recompute each block in backward instead of keeping what it made.
            The sum that leaves a recomputed block is not fused with the norm after it: on a GPU
            gradients may differ in the last bit from those without.
    """

    def __init__(
        self,
        *,
        embedding: nn.Embedding,
        blocks: nn.ModuleList,
        norm: nn.Module,
        head: nn.Module | None = None,
        position: nn.Module | None = None,
        dropout: float = 0.0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.position = position or nn.Identity()
        self.blocks = blocks
        self.norm = norm
        self.head = head
        self.dropout = dropout
        self.checkpoint_activations = checkpoint_activations
        self.projection = Projection()

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        logits: bool = False,
        num_items: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, vocabulary), or with targets (B, T) the mean cross-entropy in nats.

        Args:
            tokens: (B, T), integers.
            targets: (B, T), integers; those of -100 are ignored.
            logits: with targets, return (loss, logits). Without it the logits are never all in
                memory, if the head is the embedding's table or a plain nn.Linear.
            num_items: what the mean divides by, instead of the targets counted here.
        """
        x = self.hidden(tokens)
        if targets is None:
            return self.logits(x)
        fused = not logits and self._head_is_read()
        if fused and may_fuse(LINEAR_CROSS_ENTROPY, x, CROSS_ENTROPY):
            return self.projection.loss(x, *self._head_parameters(), targets, num_items)
        every = self.logits(x)
        rows, labels = every.flatten(0, -2), targets.flatten()
        if num_items is None:
            loss = cross_entropy(rows, labels)
        else:
            loss = cross_entropy(rows, labels, reduction="sum") / num_items
        return (loss, every) if logits else loss

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the blocks and the norm make of tokens (B, T): (B, T, dim)."""
        x = dropout(self.position(self.embedding(tokens)), self.dropout, self.training)
        stream = Stream(x)
        for block in self.blocks:
            stream = run_block(block, stream, recompute=self.checkpoint_activations)
        x, _ = stream.normed(self.norm)
        return x

    def generate(
        self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **options: Any
    ) -> list[Tensor]:
        """Continue each prompt; `generate_stream` yields the tokens as they come.

        Args:
            prompts: token ids, (B, T) or a list of 1-D tensors, of any lengths from 1.
            max_new_tokens: most tokens that a prompt is continued by.
            temperature: 0, the default, takes the likeliest token; else logits are divided by it
                and a token is drawn.
            top_k: draw among so many of the likeliest tokens; None for all.
            top_p: draw among the likeliest tokens that together have this probability; None for 1.
            stop_tokens: ids that end a sequence; the one that does is kept.
            generator: on the model's device, draws the tokens; None for torch's own.
            use_cache: False computes all of the text anew for each token, as is done anyhow where
                an attention or position module knows no cache. None chooses, True insists.

        Returns:
            One 1-D tensor for each prompt: the prompt and its continuation.

        Raises:
            ValueError: an option out of range, or the text would outgrow the positions' max_len;
                use_cache=True where a module knows no cache.
        """
        return generation.generate(self, prompts, max_new_tokens, **options)

    def generate_stream(
        self, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, **options: Any
    ) -> Iterator[Tensor]:
        """`generate`, token by token: (B,) ids at each step, -1 where a sequence has ended."""
        return generation.stream(self, prompts, max_new_tokens, **options)

    def logits(self, x: Tensor) -> Tensor:
        """The head's output for hidden states that have passed the norm."""
        if self._head_is_read():
            return self.projection.logits(x, *self._head_parameters())
        return cast(nn.Module, self.head)(x)

    def _head_is_read(self) -> bool:
        return self.head is None or plain_linear(self.head)

    def _head_parameters(self) -> tuple[Tensor, Tensor | None]:
        if self.head is not None:
            return cast(Tensor, self.head.weight), cast("Tensor | None", self.head.bias)
        weight = self.embedding.weight
        if is_dtensor(weight) and not self.projection.takes_shards:
            raise ValueError(
                "TransformerLM: embedding.weight must be whole where the head reads it, got a "
                f"shard {weight.placements}; shard a tied embedding with the whole model, not "  # type: ignore[attr-defined]
                "apart: fully_shard(model) without fully_shard(model.embedding)"
            )
        return weight, None

    def reset_parameters(self) -> None:
        """Initialise every weight. A fresh model's loss is near log(vocabulary).

        The embedding has deviation `embedding_deviation`, the head such that logits have 0.5.
        """
        dim = self.embedding.embedding_dim
        deviation = embedding_deviation(dim, tied=self.head is None)
        nn.init.normal_(self.embedding.weight, std=deviation)
        reset(self.position, *self.blocks, self.norm)
        if self.head is not None:
            reset_linear(self.head, LOGIT_DEVIATION)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, tied={self.head is None}"


class Projection:
    """The head: hidden states (..., dim) to logits, or straight to the mean cross-entropy."""

    takes_shards = False  # of the weight, as a DTensor
    splits_tokens = False  # each rank has its share of x's tokens

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def loss(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        num_items: int | Tensor | None,
    ) -> Tensor:
        return linear_cross_entropy(x, weight, targets, linear_bias=bias, num_items=num_items)


def run_block(block: nn.Module, stream: Stream, *, recompute: bool) -> Stream:
    """The stream behind a block; in training its activations may be recomputed, not kept."""
    if recompute and block.training and torch.is_grad_enabled():
        return Stream(checkpoint(block, stream.total(), use_reentrant=False))
    return extended(block, stream)


def extended(part: nn.Module, stream: Stream) -> Stream:
    """The stream behind a part of the model; one that must be called is called with the sum."""
    if plain(part, TransformerBlock, Residual):
        return cast("TransformerBlock | Residual", part).extend(stream)
    return Stream(part(stream.total()))


class TransformerBlock(nn.Module):
    """Attention, then an MLP: x (B, T, dim) to the same shape.

    Args:
        attention, mlp: called one after the other, each usually in a `Residual`, which brings norm,
            sum and dropout.
    """

    def __init__(self, *, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp

    def reset_parameters(self) -> None:
        reset(self.attention, self.mlp)

    def forward(self, x: Tensor) -> Tensor:
        return self.extend(Stream(x)).total()

    def extend(self, stream: Stream) -> Stream:
        """The stream behind the block; each part's last sum is made where the next one reads it."""
        return extended(self.mlp, extended(self.attention, stream))


def embedding_deviation(dim: int, *, tied: bool) -> float:
    """1 for a table of its own; as a head's where it is the head too.

    A tied table at unit scale would give each token's own logit a lead of order sqrt(dim).
    """
    return LOGIT_DEVIATION / math.sqrt(dim) if tied else 1.0
