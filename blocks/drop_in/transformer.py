"""torch.nn's transformer layers.

Where kernels run, every sub-module is called, in eval too: torch's fused eval path, which reads
their weights instead, is not taken. What runs in one pass, where the sub-modules are what the
constructor made: the bias and activation and dropout of the feed-forward layer; dropout, residual
addition and the norm after.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trilith.blocks.drop_in.activations import kernel_name
from trilith.blocks.drop_in.attention import MultiheadAttention
from trilith.blocks.drop_in.dropout import Dropout
from trilith.blocks.drop_in.layouts import nested, padded
from trilith.blocks.drop_in.norms import LayerNorm
from trilith.blocks.drop_in.swap import adopt, constructed_like, may_be_passed_over, unhooked
from trilith.blocks.linear import kernels_run, linear_act
from trilith.kernels import (
    ADD_NORM,
    ATTENTION,
    BIAS_ACT,
    BIAS_DROPOUT_ADD,
    DROPOUT,
    LAYER_NORM,
    add_layer_norm,
    bias_dropout_add,
)
from trilith.plugins import may_fuse

_OPS = (ATTENTION, BIAS_ACT, BIAS_DROPOUT_ADD, DROPOUT, LAYER_NORM)
_CHILDREN: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.LayerNorm: LayerNorm,
    nn.Dropout: Dropout,
}


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, also within torch.nn.TransformerEncoder."""

    @constructed_like(nn.TransformerEncoderLayer)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt_children(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if _is_torchs_own(src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested and src_mask is None and src_key_padding_mask is None:
            x, padding = padded(src)
            return nested(self.forward(x, None, padding), padding, src.layout)
        masks = (src_key_padding_mask, src_mask, is_causal)
        x = src
        if self.norm_first:
            y = self.norm1(x)
            mixed = _mix(self.self_attn, y, y, *masks)
            y, x = _added_and_normed(self.dropout1, self.norm2, mixed, x)
            return _residual(self.dropout2, _feed_forward(self, y), x)
        mixed = _mix(self.self_attn, x, x, *masks)
        x, _ = _added_and_normed(self.dropout1, self.norm1, mixed, x)
        return _added_and_normed(self.dropout2, self.norm2, _feed_forward(self, x), x)[0]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer, also within torch.nn.TransformerDecoder."""

    @constructed_like(nn.TransformerDecoderLayer)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt_children(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if _is_torchs_own(tgt):
            return super().forward(
                *(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask),
                *(memory_key_padding_mask, tgt_is_causal, memory_is_causal),
            )
        own = (tgt_key_padding_mask, tgt_mask, tgt_is_causal)
        cross = (memory_key_padding_mask, memory_mask, memory_is_causal)
        x = tgt
        if self.norm_first:
            y = self.norm1(x)
            mixed = _mix(self.self_attn, y, y, *own)
            y, x = _added_and_normed(self.dropout1, self.norm2, mixed, x)
            mixed = _mix(self.multihead_attn, y, memory, *cross)
            y, x = _added_and_normed(self.dropout2, self.norm3, mixed, x)
            return _residual(self.dropout3, _feed_forward(self, y), x)
        mixed = _mix(self.self_attn, x, x, *own)
        x, _ = _added_and_normed(self.dropout1, self.norm1, mixed, x)
        mixed = _mix(self.multihead_attn, x, memory, *cross)
        x, _ = _added_and_normed(self.dropout2, self.norm2, mixed, x)
        return _added_and_normed(self.dropout3, self.norm3, _feed_forward(self, x), x)[0]


def _adopt_children(layer: nn.Module) -> None:
    for child in layer.children():
        if type(child) in _CHILDREN:
            adopt(child, _CHILDREN[type(child)])
    calls_its_own(layer)


def calls_its_own(layer: nn.Module) -> None:
    """Its children need not tell torch that they must be called: torch is not asked where they do.

    On a CPU that no kernel runs on, torch's own forward is free to take its fused path.
    """
    for child in layer.children():
        may_be_passed_over(child)


def _is_torchs_own(x: Tensor) -> bool:
    return x.is_cpu and not x.is_nested and all(op.is_reference_on_cpu for op in _OPS)


def _mix(
    attention: nn.Module,
    x: Tensor,
    keys: Tensor,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    return attention(
        *(x, keys, keys),
        attn_mask=mask,
        key_padding_mask=padding,
        need_weights=False,
        is_causal=is_causal,
    )[0]


def _residual(dropout: nn.Module, branch: Tensor, x: Tensor) -> Tensor:
    plain = plain_dropout(dropout) and branch.dtype == x.dtype
    if plain and may_fuse(BIAS_DROPOUT_ADD, x, DROPOUT):
        return bias_dropout_add(branch, x, None, float(dropout.p), dropout.training)  # type: ignore[arg-type]
    return x + dropout(branch)


def _added_and_normed(
    dropout: nn.Module, norm: nn.Module, branch: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """norm(x + dropout(branch)), and the sum; one pass where both are what they look like."""
    if not (
        kernels_run(x)
        and plain_dropout(dropout)
        and isinstance(norm, nn.LayerNorm)
        and type(norm) in (nn.LayerNorm, LayerNorm)
        and unhooked(norm)
        and len(norm.normalized_shape) == 1
        and branch.dtype == x.dtype
        and may_fuse(ADD_NORM, x, LAYER_NORM, BIAS_DROPOUT_ADD, DROPOUT)
    ):
        total = _residual(dropout, branch, x)
        return norm(total), total
    return add_layer_norm(
        *(branch, x, norm.weight, norm.bias, norm.eps),
        p=float(dropout.p),  # type: ignore[arg-type]
        training=dropout.training,
    )


def _feed_forward(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: Tensor
) -> Tensor:
    name, dropout = kernel_name(layer.activation), layer.dropout
    if name is not None and plain_dropout(dropout):
        hidden = linear_act(layer.linear1, x, name, dropout.p if dropout.training else 0.0)
    else:
        hidden = dropout(layer.activation(layer.linear1(x)))
    return layer.linear2(hidden)


def plain_dropout(dropout: nn.Module) -> bool:
    return type(dropout) in (nn.Dropout, Dropout) and not dropout.inplace and unhooked(dropout)
