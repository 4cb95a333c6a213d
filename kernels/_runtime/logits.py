"""Logits, labels and class weights as the loss kernels see them."""

from __future__ import annotations

from trilith.kernels._runtime.functors import ACTIVATIONS
from trilith.kernels._runtime.language import tl, triton

_tanh, _tanh_grad = ACTIVATIONS["tanh"].f, ACTIVATIONS["tanh"].df


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to full relative precision near 0."""
    z = x / (2.0 + x)
    zz = z * z
    series = 2.0 * z * (1.0 + zz * (1 / 3 + zz * (1 / 5 + zz * (1 / 7 + zz * (1 / 9)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to full relative precision near 0."""
    series = 1.0 + x * (1 / 6) * (1.0 + x * (1 / 7))
    series = 1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5) * series))
    return tl.where(x > -0.35, x * (1.0 + x * 0.5 * series), tl.exp(x) - 1.0)


@triton.jit
def capped(x, softcap):
    """The logits in fp32, after the soft cap if there is one."""
    y = x.to(tl.float32)
    if softcap is not None:
        cap = tl.cast(softcap, tl.float32)
        y = _tanh(y / cap) * cap
    return y


@triton.jit
def cap_slope(x, softcap):
    """The derivative of `capped` where there is a soft cap."""
    return _tanh_grad(x.to(tl.float32) / tl.cast(softcap, tl.float32), 1.0)


@triton.jit
def load_labels(target_ptr, target_stride, rows, M, N, ignore_index):
    """Labels of rows [R], which of them name a class, and which of them are out of range."""
    inside = rows < M
    label = tl.load(target_ptr + rows * target_stride, mask=inside, other=0)
    counted = inside & (label != ignore_index)
    in_range = (label >= 0) & (label < N)
    live = counted & in_range
    return tl.where(live, label, 0).to(tl.int32), live, counted & ~in_range


@triton.jit
def class_weights(weight_ptr, weight_stride, classes, mask):
    """Weights of the classes, 1 where there are none."""
    weight = tl.full(classes.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        offsets = classes.to(tl.int64) * weight_stride
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return weight
