"""Attention: the drop-in function, the full one, merging of parts, and the ops beneath them."""

from trilith.kernels.attention.functions import attention, scaled_dot_product_attention
from trilith.kernels.attention.merge import merge_attention

__all__ = ["attention", "merge_attention", "scaled_dot_product_attention"]
