"""Attention: the drop-in, the full one, packed sequences, decoding, merging, and their ops."""

from trilith.kernels.attention.decode import decode_attention
from trilith.kernels.attention.functions import attention, scaled_dot_product_attention
from trilith.kernels.attention.merge import merge_attention
from trilith.kernels.attention.qkvpacked import attention_qkvpacked
from trilith.kernels.attention.varlen import varlen_attention

__all__ = [
    "attention",
    "attention_qkvpacked",
    "decode_attention",
    "merge_attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]
