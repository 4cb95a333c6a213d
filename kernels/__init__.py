"""Fused kernels: tensors in, tensors out.

Where torch.nn.functional has the function, ours has its name, positional order and semantics.
"""

if __name__ == "kernels":
    raise ImportError("import trilith.kernels, not kernels: the folder is mapped by the package")

from trilith.kernels._norm_linear_ops import ADD_NORM_LINEAR, NORM_LINEAR
from trilith.kernels._runtime.launch import launch
from trilith.kernels._runtime.plan import planned
from trilith.kernels._soft_cross_entropy import SOFT_CROSS_ENTROPY
from trilith.kernels.act_linear import (
    BIAS_ACT_LINEAR,
    GATED_ACT_LINEAR,
    bias_act_linear,
    gated_act_linear,
)
from trilith.kernels.activations import BIAS_ACT, GATED_ACT, bias_act, gated_act
from trilith.kernels.add_norm import ADD_NORM, add_layer_norm, add_rms_norm
from trilith.kernels.attention import (
    attention,
    attention_qkvpacked,
    decode_attention,
    merge_attention,
    scaled_dot_product_attention,
    varlen_attention,
)
from trilith.kernels.attention.decode import DECODE_ATTENTION
from trilith.kernels.attention.merge import MERGE_ATTENTION
from trilith.kernels.attention.op import ATTENTION
from trilith.kernels.attention.qkvpacked import ATTENTION_QKVPACKED
from trilith.kernels.attention.varlen import VARLEN_ATTENTION
from trilith.kernels.batch_norm import BATCH_NORM, BATCH_NORM_GIVEN, batch_norm
from trilith.kernels.cross_entropy import CROSS_ENTROPY, cross_entropy
from trilith.kernels.dropout import BIAS_DROPOUT_ADD, DROPOUT, bias_dropout_add, dropout
from trilith.kernels.linear_cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from trilith.kernels.losses import (
    BCE_WITH_LOGITS,
    MSE_LOSS,
    binary_cross_entropy_with_logits,
    mse_loss,
)
from trilith.kernels.norm_linear import layer_norm_linear, rms_norm_linear
from trilith.kernels.norms import LAYER_NORM, RMS_NORM, layer_norm, rms_norm
from trilith.kernels.rotary import ROTARY, rotary
from trilith.kernels.rotary_qkvpacked import ROTARY_QKVPACKED, rotary_qkvpacked
from trilith.kernels.softmax import LOG_SOFTMAX, SOFTMAX, log_softmax, softmax

OPS = (
    ADD_NORM,
    ADD_NORM_LINEAR,
    ATTENTION,
    ATTENTION_QKVPACKED,
    BATCH_NORM,
    BATCH_NORM_GIVEN,
    BCE_WITH_LOGITS,
    BIAS_ACT,
    BIAS_ACT_LINEAR,
    BIAS_DROPOUT_ADD,
    CROSS_ENTROPY,
    DECODE_ATTENTION,
    DROPOUT,
    GATED_ACT,
    GATED_ACT_LINEAR,
    LAYER_NORM,
    LINEAR_CROSS_ENTROPY,
    LOG_SOFTMAX,
    MERGE_ATTENTION,
    MSE_LOSS,
    NORM_LINEAR,
    RMS_NORM,
    ROTARY,
    ROTARY_QKVPACKED,
    SOFTMAX,
    SOFT_CROSS_ENTROPY,
    VARLEN_ATTENTION,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_qkvpacked",
    "batch_norm",
    "bias_act",
    "bias_act_linear",
    "bias_dropout_add",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "decode_attention",
    "dropout",
    "gated_act",
    "gated_act_linear",
    "launch",
    "layer_norm",
    "layer_norm_linear",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "mse_loss",
    "planned",
    "rms_norm",
    "rms_norm_linear",
    "rotary",
    "rotary_qkvpacked",
    "scaled_dot_product_attention",
    "softmax",
    "varlen_attention",
]
