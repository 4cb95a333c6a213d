"""A norm and the linear layers that read it, without keeping what is between them.

    y = norm(x) @ weight.T + bias        norm is layer_norm or rms_norm

of one weight, or of two that share the norm (a gated MLP's); with a residual, of the sum

    summed = residual + dropout(x)       y = norm(summed) @ weight.T + bias

which is an output too. x, residual (..., N), weight (K, N), bias (K,).

Matrix products are PyTorch's, in weight's dtype: the norm is rounded to it. Everything else is as
in layer_norm and add_layer_norm.

Source: Ba et al., "Layer Normalization", 2016; Chen et al., "Training deep nets with sublinear
memory cost", 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trilith.kernels._norm_linear_ops import ADD_NORM_LINEAR, NORM_LINEAR
from trilith.kernels._runtime import checks
from trilith.kernels._runtime.lead import as_lead
from trilith.kernels._runtime.matrix import require_linear
from trilith.kernels._runtime.random import run_seeded
from trilith.kernels.add_norm import check_sum
from trilith.kernels.norms import rms_eps
from trilith.plugins.autocast import autocasts

__all__ = ["layer_norm_linear", "rms_norm_linear"]

Weights = Tensor | tuple[Tensor, Tensor]
Biases = Tensor | tuple[Tensor | None, Tensor | None] | None
Results = Tensor | tuple[Tensor, Tensor]


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Weights,
    bias: Biases = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Results | tuple[Results, Tensor]:
    """linear(layer_norm(x), weight, bias); what the norm gives is not kept for backward.

    Args:
        x: (..., N), any floating dtype, any strides.
        norm_weight, norm_bias: (N,), of the norm.
        weight: (K, N), or a pair of such that share the norm.
        bias: (K,) in weight's dtype, or a pair of biases, each of which may be None.
        eps: added to the variance under the square root.
        residual: of x's shape, maybe of a wider dtype: residual + dropout(x) takes the place of x.
        p: probability that an element of x is dropped, where there is a residual.
        training: False switches dropout off.

    Returns:
        y (..., K) in weight's dtype, a pair of them for a pair of weights; with a residual
        `(y, summed)`, where summed = residual + dropout(x) has residual's dtype.

    Raises:
        ValueError: shapes, devices or weights' dtypes that do not fit, p without a residual.
        TypeError: a tensor that is not floating-point.

    Numerics:
        The norm in fp32, rounded to weight's dtype; the product is PyTorch's. Under autocast weight
        and bias are lowered, x and residual keep their precision.

    Source:
        Ba et al., "Layer Normalization", 2016; Chen et al., "Training deep nets with sublinear
        memory cost", 2016.

    Example:
        >>> x, weight = torch.randn(8, 512), torch.randn(2048, 512)
        >>> layer_norm_linear(x, torch.ones(512), None, weight).shape
        torch.Size([8, 2048])
    """
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    return _call("layer_norm_linear", x, norm, weight, bias, eps, residual, p, training)


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Weights,
    bias: Biases = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Results | tuple[Results, Tensor]:
    """linear(rms_norm(x), weight, bias); what the norm gives is not kept for backward.

    Args:
        x: (..., N), any floating dtype, any strides.
        norm_weight: (N,), of the norm.
        weight: (K, N), or a pair of such that share the norm.
        bias: (K,) in weight's dtype, or a pair of biases, each of which may be None.
        eps: added to the mean square under the square root; None is as in rms_norm.
        residual: of x's shape, maybe of a wider dtype: residual + dropout(x) takes the place of x.
        p: probability that an element of x is dropped, where there is a residual.
        training: False switches dropout off.

    Returns:
        y (..., K) in weight's dtype, a pair of them for a pair of weights; with a residual
        `(y, summed)`, where summed = residual + dropout(x) has residual's dtype.

    Raises:
        ValueError: shapes, devices or weights' dtypes that do not fit, p without a residual.
        TypeError: a tensor that is not floating-point.

    Numerics:
        As layer_norm_linear.

    Source:
        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; Chen et al., "Training
        deep nets with sublinear memory cost", 2016.

    Example:
        >>> x, gate, up = torch.randn(8, 512), torch.randn(64, 512), torch.randn(64, 512)
        >>> a, b = rms_norm_linear(x, torch.ones(512), (gate, up))
    """
    norm = {"norm_weight": norm_weight}
    return _call("rms_norm_linear", x, norm, weight, bias, eps, residual, p, training)


def _call(
    op: str,
    x: Tensor,
    norm: dict[str, Tensor | None],
    weight: Weights,
    bias: Biases,
    eps: float | None,
    residual: Tensor | None,
    p: float,
    training: bool,
) -> Results | tuple[Results, Tensor]:
    rows = x if residual is None else residual
    check_sum(op, x, rows, norm, p)
    if autocasts(x):
        weight, bias = _lowered(weight, x.device.type), _lowered(bias, x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return _call(op, x, norm, weight, bias, eps, residual, p, training)
    is_pair = isinstance(weight, tuple)
    linear = _layers(op, x, weight, bias)
    centred = "norm_bias" in norm
    eps = rms_eps(rows) if eps is None else eps
    given = (norm["norm_weight"], norm.get("norm_bias"), *linear, eps)
    if residual is None:
        checks.require(p == 0.0, op, "p", "be 0 where there is no residual", p)
        y, y2 = NORM_LINEAR(x, *given, centred)
        return (y, y2) if is_pair else y
    x, p = as_lead(x, residual.dtype), p if training else 0.0
    rest = (*given, p, centred, None if x.dtype == residual.dtype else x.dtype)
    y, y2, summed = run_seeded(ADD_NORM_LINEAR, (x, residual), p, rest)
    return (y, y2) if is_pair else y, summed


def _layers(op: str, x: Tensor, weight: Weights, bias: Biases) -> tuple[Tensor | None, ...]:
    """Weight and bias of the first layer, and of the second, None where there is none."""
    if not isinstance(weight, tuple):
        if isinstance(bias, tuple):
            raise ValueError(f"{op}: bias must be one, as weight is, got a pair")
        require_linear(op, x, weight, bias)
        return weight, bias, None, None
    checks.require(len(weight) == 2, op, "weight", "be one or a pair", f"{len(weight)} of them")
    biases = (None, None) if bias is None else bias
    is_pair = isinstance(biases, tuple) and len(biases) == 2
    checks.require(is_pair, op, "bias", "be a pair, as weight is, or None", type(bias).__name__)
    for w, b in zip(weight, biases, strict=True):
        require_linear(op, x, w, b)
    return weight[0], biases[0], weight[1], biases[1]


def _lowered(operands: Any, device_type: str) -> Any:
    """A matrix product's operands under autocast, cast as PyTorch would."""
    if isinstance(operands, tuple):
        return tuple(_lowered(operand, device_type) for operand in operands)
    if operands is None or operands.dtype == torch.float64:
        return operands
    return operands.to(torch.get_autocast_dtype(device_type))
