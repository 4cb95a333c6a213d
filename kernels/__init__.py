"""Fused kernels: tensors in, tensors out.

Where torch.nn.functional has the function, ours has its name, positional order and semantics.
"""

if __name__ == "kernels":
    raise ImportError("import trilith.kernels, not kernels: the folder is mapped by the package")

from trilith.kernels._runtime.launch import launch
from trilith.kernels.activations import bias_act, gated_act
from trilith.kernels.attention import attention, scaled_dot_product_attention
from trilith.kernels.cross_entropy import cross_entropy
from trilith.kernels.dropout import bias_dropout_add, dropout
from trilith.kernels.norms import layer_norm, rms_norm
from trilith.kernels.rotary import rotary

__all__ = [
    "attention",
    "bias_act",
    "bias_dropout_add",
    "cross_entropy",
    "dropout",
    "gated_act",
    "launch",
    "layer_norm",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
]
