"""Attention: the drop-in function, the full one, and the op beneath them."""

from trilith.kernels.attention.functions import attention, scaled_dot_product_attention

__all__ = ["attention", "scaled_dot_product_attention"]
