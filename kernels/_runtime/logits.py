"""Logits, labels and class weights as the loss kernels see them."""

from __future__ import annotations

from trilith.kernels._runtime.language import tl, triton


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
def tanh(x):
    """tanh(x) and its derivative, to full relative precision everywhere."""
    e = tl.exp(-2.0 * tl.abs(x))
    xx = x * x
    series = xx * (62 / 2835 - xx * (1382 / 155925))
    series = x * (1.0 - xx * (1 / 3 - xx * (2 / 15 - xx * (17 / 315) + series * xx)))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.3, series, far), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def capped(x, softcap):
    """The logits after the soft cap, and the cap's derivative (None without one)."""
    x = x.to(tl.float32)
    if softcap is None:
        return x, None
    cap = tl.cast(softcap, tl.float32)
    y, slope = tanh(x / cap)
    return y * cap, slope


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
    if weight_ptr is None:
        return tl.full(classes.shape, 1.0, tl.float32)
    offsets = classes.to(tl.int64) * weight_stride
    return tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
