"""Attention: the drop-in function, the full one, decoding, merging of parts, and their ops."""

from trilith.kernels.attention.decode import decode_attention
from trilith.kernels.attention.functions import attention, scaled_dot_product_attention
from trilith.kernels.attention.merge import merge_attention

__all__ = ["attention", "decode_attention", "merge_attention", "scaled_dot_product_attention"]
