"""What attention's public functions make of their options, or refuse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trilith.kernels._runtime.checks import (
    require,
    require_floating,
    require_floating_if_given,
    require_probability,
    require_same_device,
    require_shape,
    require_tensors,
)
from trilith.kernels.attention.config import LARGEST_HEAD_DIM
from trilith.plugins import registry
from trilith.plugins.autocast import autocasts

# bias, key_mask, slopes, sinks; and scale, softcap, p, alignment, left, right, score_mod, precision
Terms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Scalars = tuple[float, float, float, str, int, int, str, str]


def require_axes(op: str, *axes: str, **tensors: Tensor) -> None:
    """Floating-point tensors on one device, with these axes."""
    lead: Tensor | None = None
    for arg, tensor in tensors.items():
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            require_tensors(op, **{arg: tensor})
            require_floating(op, **{arg: tensor})
        if lead is None:
            lead = tensor
        elif tensor.device != lead.device:
            require_same_device(op, lead, **{arg: tensor})
        if tensor.ndim != len(axes):
            rule = f"be {len(axes)}-D ({', '.join(axes)})"
            require(False, op, arg, rule, tuple(tensor.shape))


def require_one_dtype(op: str, **tensors: Tensor) -> None:
    """Unless autocast, which takes any, gives them one."""
    if len({t.dtype for t in tensors.values()}) == 1 or autocasts(next(iter(tensors.values()))):
        return
    *args, last = tensors
    got = ", ".join(str(t.dtype) for t in tensors.values())
    raise TypeError(f"{op}: {', '.join(args)} and {last} must have one dtype, got {got}")


def require_groups(op: str, heads: int, key_heads: int) -> None:
    """Each key head is read by as many query heads."""
    if heads % key_heads if key_heads else heads:
        require(False, op, "q's heads", f"be a multiple of the keys' {key_heads}", heads)


def as_qkv(op: str, qkv: Tensor, n_heads: int | None) -> tuple[Tensor, int]:
    """qkv as (B, T, H + 2 Hkv, D), and H."""
    require_floating(op, qkv=qkv)
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        qkv = qkv.flatten(2, 3)
    rule = "be (B, T, H + 2 Hkv, D) or (B, T, 3, H, D)"
    require(qkv.ndim == 4, op, "qkv", rule, tuple(qkv.shape))
    heads = qkv.shape[2] // 3 if n_heads is None else n_heads
    others = qkv.shape[2] - heads
    key_heads = others // 2
    fits = heads > 0 and key_heads > 0 and others % 2 == 0 and heads % key_heads == 0
    rule = f"be H of the {qkv.shape[2]} = H + 2 Hkv heads, Hkv a divisor of H"
    require(fits, op, "n_heads", rule, n_heads)
    return qkv, heads


def require_head_dim(op: str, q: Tensor, v: Tensor) -> None:
    """Where kernels run."""
    dims = q.shape[-1], v.shape[-1]
    if max(dims) > LARGEST_HEAD_DIM:
        raise NotImplementedError(
            f"{op}: there are kernels for head dims up to {LARGEST_HEAD_DIM}, got {dims[0]} and "
            f"{dims[1]}; torch.nn.functional.scaled_dot_product_attention takes more"
        )


def require_indices(op: str, **tensors: Any) -> None:
    for arg, tensor in tensors.items():
        is_tensor = isinstance(tensor, Tensor)
        if not (is_tensor and tensor.dtype in (torch.int32, torch.int64)):
            kind = tensor.dtype if is_tensor else type(tensor).__name__
            raise TypeError(f"{op}: {arg} must be a tensor of int32 or int64, got {kind}")


def require_bias_dtype(op: str, bias: Tensor | None) -> None:
    if bias is not None:
        require_tensors(op, bias=bias)
        if bias.dtype != torch.bool:
            require_floating(op, bias=bias)


def options_of(
    op: str,
    q: Tensor,
    sizes: tuple[int, int, int, int, int],
    *,
    causal: bool | str,
    window: Any,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    score_mod: str | None,
    precision: str,
) -> tuple[Terms, Scalars]:
    """What `attention` takes, as the op has it. sizes: B, H, T, S and D."""
    B, H, T, S, D = sizes
    require_probability(op, "dropout_p", dropout_p)
    if causal is True:
        causal = _aligned(op, T, S)
    alignment, left, right = score_window(op, causal, window)
    cap = known_softcap(op, softcap)
    bias = _bias_as_4d(op, (B, H, T, S), bias)
    slopes = slopes_by_head(op, q, alibi_slopes, B, H)
    require_floating_if_given(op, sinks=sinks)
    if key_padding_mask is not None:
        require_tensors(op, key_padding_mask=key_padding_mask)
    require_same_device(op, q, bias=bias, sinks=sinks, key_padding_mask=key_padding_mask)
    require_shape(op, "key_padding_mask", key_padding_mask, (B, S))
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: key_padding_mask must be boolean, True where a key takes part, "
            f"got {key_padding_mask.dtype}"
        )
    require_shape(op, "sinks", sinks, (H,))
    scale = 1 / math.sqrt(max(1, D)) if scale is None else scale
    mod, products = known_score_mod(op, score_mod), known_precision(op, precision)
    scalars = (scale, cap, dropout_p, alignment, left, right, mod, products)
    return (bias, key_padding_mask, slopes, sinks), scalars


def _aligned(op: str, T: int, S: int) -> str:
    if T != S:
        raise ValueError(
            f"{op}: causal must say where the diagonal lies when there are {T} queries and "
            f'{S} keys, "top_left" or "bottom_right", got True'
        )
    return "top_left"


def _bias_as_4d(op: str, full: tuple[int, ...], bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    require_bias_dtype(op, bias)
    sizes = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    fits = len(sizes) == 4 and all(n in (1, m) for n, m in zip(sizes, full, strict=True))
    require(fits, op, "bias", f"broadcast to {full}", tuple(bias.shape))
    return bias[(None,) * (4 - bias.ndim)]


def slopes_by_head(
    op: str, q: Tensor, slopes: Tensor | None, batch: int, heads: int
) -> Tensor | None:
    """(1 or batch, heads)."""
    if slopes is None:
        return None
    require_floating(op, alibi_slopes=slopes)
    require_same_device(op, q, alibi_slopes=slopes)
    fits = tuple(slopes.shape) in ((heads,), (batch, heads))
    rule = f"be {(heads,)} or {(batch, heads)}"
    require(fits, op, "alibi_slopes", rule, tuple(slopes.shape))
    return slopes if slopes.ndim == 2 else slopes[None]


def score_window(op: str, causal: bool | str, window: Any) -> tuple[str, int, int]:
    """(alignment, how far left and right of the diagonal is seen), negative for any distance."""
    alignment, right = "bottom_right", -1
    if causal is not False:
        rule = 'be False, True, "top_left" or "bottom_right"'
        require(causal in ("top_left", "bottom_right"), op, "causal", rule, repr(causal))
        alignment, right = str(causal), 0
    before, after = sides(op, window)
    return alignment, before, after if right < 0 else 0


def sides(op: str, window: Any) -> tuple[int, int]:
    """How far left and right a window reaches, negative for any distance."""
    if window is None:
        return -1, -1
    valid = isinstance(window, tuple | list) and len(window) == 2
    valid = valid and all(
        n is None or (isinstance(n, int | torch.SymInt) and n >= 0) for n in window
    )
    require(valid, op, "window", "be (left, right), each None or an int from 0 on", window)
    before, after = (-1 if n is None else n for n in window)
    return before, after


def known_softcap(op: str, softcap: float | None) -> float:
    """0 for none."""
    if softcap is None:
        return 0.0
    require(0 < softcap < math.inf, op, "softcap", "be positive and finite", softcap)
    return softcap


def known_score_mod(op: str, name: str | None) -> str:
    """The name, "" for none."""
    if name is None:
        return ""
    names = registry.score_mod_names()
    require(name in names, op, "score_mod", f"be one of those registered: {names}", repr(name))
    return name


def known_precision(op: str, precision: str) -> str:
    require(precision in ("ieee", "tf32"), op, "precision", 'be "ieee" or "tf32"', repr(precision))
    return precision
