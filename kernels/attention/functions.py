"""Attention: softmax(scale q k^T + bias) v, with everything that may change the scores."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._runtime.checks import require_same_device, require_shape
from trilith.kernels._runtime.random import draw_seed
from trilith.kernels.attention.arguments import (
    Scalars,
    Terms,
    options_of,
    require_axes,
    require_groups,
    require_head_dim,
    require_one_dtype,
)
from trilith.kernels.attention.config import LARGEST_HEAD_DIM
from trilith.kernels.attention.op import ATTENTION
from trilith.plugins.autocast import autocasts
from trilith.plugins.sharding import PLAIN, is_dtensor

_NAME = "attention"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    score_mod: str | None = None,
    precision: str = "ieee",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention of H query heads over Hkv key heads.

    score = softcap(score_mod(scale * q . k)) + bias - slope * |distance|, out = softmax(score) v.
    The distance of query t from key s is counted from the diagonal s = t ("top_left") or
    s = t + S - T ("bottom_right", also where `causal` is False).

    Args:
        q: (B, H, T, D), D from 1 to 512; any strides, as for all tensors here.
        k: (B, Hkv, S, D), q's dtype. Hkv divides H; query head h reads key head h // (H / Hkv).
        v: (B, Hkv, S, Dv), q's dtype; Dv from 1 to 512.
        causal: False, "top_left" or "bottom_right": no key beyond the diagonal. True where T == S.
        window: (left, right), how many keys before and after the diagonal's are seen; None for
            any number.
        bias: broadcasts to (B, H, T, S). Boolean: True where the key takes part. Floating: added.
            It is read whole and no key is passed over for it, unlike `causal` and `window`, which
            skip what they hide.
        alibi_slopes: (H,) or (B, H).
        softcap: positive; scores become softcap * tanh(score / softcap).
        sinks: (H,), one more score per head, which takes its share of the softmax and has no value.
        key_padding_mask: (B, S) boolean, True where the key takes part. Padding before the first
            such key and after the last is skipped.
        dropout_p: the probability that a weight is dropped.
        scale: 1 / sqrt(D) if None.
        score_mod: "vendor.name" of a change of the scaled scores that a plugin registered.
        precision: of float32's products: "ieee", or "tf32", whose factors have 10 bits of mantissa.
        return_lse: whether to return the log-sum-exp of the scores too.

    Returns:
        (B, H, T, Dv) in q's dtype; with `return_lse` also (B, H, T) in fp32, natural logarithm.
        Both are differentiable. A query that sees no key has output 0, lse -inf, and gradients 0.

    Raises:
        NotImplementedError: a head dim above 512 where kernels run.
        TypeError: a dtype that does not fit.
        ValueError: shapes that do not fit, causal=True where T != S, a value out of range.

    Numerics:
        Sums in fp32. Probabilities, and score gradients, are rounded to the inputs' dtype before
        they are multiplied. float32 products are IEEE unless `precision` says otherwise; where no
        kernel runs they always are. Deterministic.

    Source: Vaswani et al., "Attention is all you need", 2017; Dao et al., "FlashAttention", 2022;
        Press et al., "Train short, test long", 2021 (slopes); Xiao et al., "Efficient streaming
        language models with attention sinks", 2023.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> attention(q, k, v, causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    _check_shapes(q, k, v)
    sizes = (*q.shape[:3], k.shape[2], q.shape[3])
    terms, scalars = options_of(
        _NAME,
        q,
        sizes,
        causal=causal,
        window=window,
        bias=bias,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        scale=scale,
        score_mod=score_mod,
        precision=precision,
    )
    out, lse = _attend(q, k, v, terms, scalars, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, argument for argument.

    Args:
        query: (..., H, T, D), or (T, D); batch dimensions broadcast.
        key: (..., H, S, D).
        value: (..., H, S, Dv).
        attn_mask: broadcasts to (..., H, T, S). Boolean: True where the key takes part. Else added.
            Or torch's `CausalBias`, which says where the diagonal lies.
        dropout_p: the probability that a weight is dropped.
        is_causal: no key after the query's own position, counted from the first of each.
        scale: 1 / sqrt(D) if None.
        enable_gqa: key and value may have fewer heads, a divisor of query's.

    Returns:
        (..., H, T, Dv) in query's dtype. A query that sees no key has output 0.

    Raises:
        RuntimeError: as torch does: arguments that no kernel takes are handed to torch.

    Numerics: as `attention`.

    Source: Vaswani et al., "Attention is all you need", 2017.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 128, 64).unbind()
        >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 8, 128, 64])
    """
    mask, causal, alignment = attn_mask, is_causal, "top_left"
    said = None if is_causal else _said_by_causal_bias(attn_mask)
    if said is not None:
        mask, causal, alignment = None, True, said
    batch = _common_batch(query, key, value, mask, dropout_p, causal, enable_gqa)
    if batch is not None:
        name = "scaled_dot_product_attention"
        require_same_device(name, query, key=key, value=value, attn_mask=mask)
        heads = key.shape[-3:-2] if enable_gqa else batch[-1:]
        q = _as_4d(query, batch)
        k = _as_4d(key, (*batch[:-1], *heads))
        v = _as_4d(value, (*batch[:-1], *heads))
        bias = None if mask is None else _mask_as_4d(mask, batch)
        softmax_scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        tensors = (q, k, v, bias, None, None, None)
        right = 0 if causal else -1
        rest = (softmax_scale, 0.0, dropout_p, alignment, -1, right, "", "ieee")
        provider = ATTENTION.choose(*tensors, None, *rest)
        own = provider is not None or is_dtensor(query)
        if own or _asks_for_more_than_a_gradient(query, key, value, attn_mask):
            seed = draw_seed(q) if dropout_p > 0 and provider is not None else None
            out, _ = ATTENTION.run(provider, *tensors, seed, *rest)
            return out.reshape(*batch, *out.shape[2:])
    _require_one_length(key, value)
    if not 0.0 <= dropout_p <= 1.0:  # torch's own function does not look at it on a GPU
        raise RuntimeError(f"dropout_p must be between 0 and 1, got {dropout_p}")
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _said_by_causal_bias(mask: Tensor | None) -> str | None:
    """The alignment that torch's `CausalBias` stands for; None for any other mask."""
    if type(mask) in PLAIN:
        return None
    from torch.nn.attention.bias import CausalBias, CausalVariant  # which imports Dynamo

    if not isinstance(mask, CausalBias):
        return None
    return "bottom_right" if mask.variant is CausalVariant.LOWER_RIGHT else "top_left"


def _require_one_length(key: Tensor, value: Tensor) -> None:
    """torch's own function does not check it on the CPU, and reads past the end of the values."""
    tensors = [t for t in (key, value) if isinstance(t, Tensor) and t.ndim >= 2 and not t.is_nested]
    lengths = [t.shape[-2] for t in tensors]
    if lengths and lengths[0] != lengths[-1]:  # to torch.jit.trace they are tensors
        raise RuntimeError(
            f"scaled_dot_product_attention: key and value must have one length, got {lengths[0]} "
            f"and {lengths[1]}"
        )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, scalars: Scalars, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The op; where no kernel runs and the lse is not wanted, torch's function for what it can.

    Not for float64, which asks for second derivatives: torch's CPU kernel has none. Nor where a
    transform asks for more than a gradient, nor for DTensors, for which it has no rule.
    """
    provider = ATTENTION.choose(q, k, v, *terms, None, *scalars)
    scale, softcap, p, alignment, left, right, score_mod, _ = scalars
    if provider is not None:
        require_head_dim(_NAME, q, v)
        seed = draw_seed(q) if p > 0 else None
        return ATTENTION.run(provider, q, k, v, *terms, seed, *scalars)
    bias, *others = terms
    plain = all(t is None for t in others) and softcap == 0 and left < 0 and right <= 0
    plain = plain and q.dtype != torch.float64 and not (is_dtensor(q) or score_mod)
    from_top = right < 0 or alignment == "top_left" or q.shape[2] == k.shape[2]
    plain = plain and from_top and not return_lse and not (right == 0 and bias is not None)
    if plain and not _asks_for_more_than_a_gradient(q, k, v, bias):
        gqa = bool(q.shape[1] != k.shape[1])  # of tensors, under torch.jit.trace
        causal = right == 0
        out = F.scaled_dot_product_attention(q, k, v, bias, p, causal, scale=scale, enable_gqa=gqa)
        return out, None
    return ATTENTION.run(provider, q, k, v, *terms, None, *scalars)


def _asks_for_more_than_a_gradient(*tensors: Tensor | None) -> bool:
    """Whether forward mode is on, or a tensor has a gradient taken of it at two levels."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_dynamo_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(_gradients_of(tensor) > 1 for tensor in tensors if tensor is not None)


def _gradients_of(tensor: Tensor) -> int:
    """At how many levels of transforms, and outside of them, a tensor's gradient is wanted."""
    functorch = torch._C._functorch
    found = int(tensor.requires_grad)
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
        found += int(tensor.requires_grad)
    return found


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    require_axes(_NAME, "batch", "heads", "length", "dim", q=q, k=k, v=v)
    require_one_dtype(_NAME, q=q, k=k, v=v)
    (B, H, _, D), (Hkv, S) = q.shape, k.shape[1:3]
    require_shape(_NAME, "k", k, (B, Hkv, S, D))
    require_shape(_NAME, "v", v, (B, Hkv, S, v.shape[3]))
    require_groups(_NAME, H, Hkv)


def _common_batch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> tuple[int, ...] | None:
    """The batch dimensions of a call that our kernels take, heads last; None for any other call."""
    tensors = (query, key, value)
    if not all(isinstance(t, Tensor) and t.ndim >= 2 and not t.is_nested for t in tensors):
        return None
    autocast = autocasts(query)
    dtypes = {t.dtype for t in tensors}
    shapes_fit = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    if (len(dtypes) > 1 and not autocast) or not shapes_fit or not 0.0 <= p <= 1.0:
        return None
    if max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD_DIM or (is_causal and mask is not None):
        return None
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return None
    return _batch_shape(query, key, value, mask, enable_gqa)


def _batch_shape(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[int, ...] | None:
    trailing = 3 if enable_gqa else 2
    if enable_gqa:
        heads = [t.shape[-3] if t.ndim > 2 else 0 for t in (query, key, value)]
        if 0 in heads or heads[1] != heads[2] or heads[0] % heads[1]:
            return None
    try:
        leads = [t.shape[:-trailing] for t in (query, key, value)]
        lead = leads[0]
        if not lead == leads[1] == leads[2]:
            lead = torch.broadcast_shapes(*leads)  # which takes longer than all else here
        batch = (*lead, *query.shape[-trailing:-2])
        if mask is not None:
            full = (*batch, query.shape[-2], key.shape[-2])
            if mask.ndim < 2 or torch.broadcast_shapes(mask.shape, full) != full:
                return None
    except RuntimeError:
        return None
    return batch


def _as_4d(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    if len(batch) == 2 and tensor.shape[:-2] == batch:
        return tensor
    tensor = tensor.expand(*batch, *tensor.shape[-2:])
    if len(batch) <= 2:
        return tensor[(None,) * (2 - len(batch))]
    return tensor.flatten(0, len(batch) - 2)


def _mask_as_4d(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    mask = mask[(None,) * (max(2, len(batch)) + 2 - mask.ndim)]
    if len(batch) <= 2:
        return mask
    return mask.expand(*batch[:-1], *mask.shape[-3:]).flatten(0, len(batch) - 2)
