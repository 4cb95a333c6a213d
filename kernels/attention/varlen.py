"""Attention over packed sequences: q (total queries, H, D), cut by cumulative lengths.

Sequence n has the queries cu_seqlens_q[n] to cu_seqlens_q[n + 1] and the keys likewise; the kernels
are those of `attention`, and each program finds its sequence on the device, in a grid of
total / BLOCK + B + 1 tiles a head. Nothing is padded, and the host reads no length. Rows past the
last sequence have tiles too, which write zeros.

Letters, formulas, numerics and source as in forward.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilith.kernels._runtime.checks import (
    require,
    require_floating_if_given,
    require_probability,
    require_same_device,
    require_shape,
)
from trilith.kernels._runtime.plan import planned
from trilith.kernels._runtime.random import draw_seed, reference_keep_mask
from trilith.kernels.attention import sharding
from trilith.kernels.attention.arguments import (
    known_precision,
    known_score_mod,
    known_softcap,
    require_axes,
    require_bias_dtype,
    require_groups,
    require_head_dim,
    require_indices,
    require_one_dtype,
    score_window,
    slopes_by_head,
)
from trilith.kernels.attention.decode_reference import host_lengths
from trilith.kernels.attention.launchers import AttentionCall, Packed, sink_gradient
from trilith.kernels.attention.reference import attend
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

_NAME = "varlen_attention"


def _as_batch(packed: Tensor) -> Tensor:
    """(total, H, D) -> (1, H, total, D), a view."""
    return packed.transpose(0, 1)[None]


def _packed(batch: Tensor) -> Tensor:
    return batch[0].transpose(0, 1)


def _out(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    rows = (q.shape[1], q.shape[0])
    lse, lse2 = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return out, lse, lse2


@planned
def _varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    p: float,
    alignment: str,
    left: int,
    right: int,
    score_mod: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, lse2 = _out(q, v)
    rest = (scale, softcap, p, alignment, left, right, score_mod, precision)
    call = _call(q, k, v, cu_seqlens_q, cu_seqlens_k, bias, slopes, seed, *rest)
    call.forward(sinks, _as_batch(out), lse, lse2)
    return out, lse, lse2


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    *rest: Any,
) -> AttentionCall:
    q, k, v = map(_as_batch, (q, k, v))
    starts = Packed(cu_q.contiguous(), cu_k.contiguous())
    return AttentionCall(q, k, v, bias, None, slopes, seed, *rest, packed=starts)


@planned
def _varlen_bwd(
    ctx: BackwardContext, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, bias, slopes, sinks, seed, *rest = ctx.inputs
    (out,) = ctx.outputs
    (lse2,) = ctx.aux
    needs = ctx.needs_input_grad
    call = _call(q, k, v, cu_q, cu_k, bias, slopes, seed, *rest)
    upstream = call.upstream(
        _as_batch(out),
        lse2,
        None if dout is None else _as_batch(dout),
        None if dlse is None else dlse[None],
    )
    dq = dk = dv = dbias = dslopes = dsinks = None
    if needs[0] or needs[6]:
        dq, dslopes = call.query_gradients(upstream, slopes if needs[6] else None)
        dq = _packed(dq)
    if needs[1] or needs[2]:
        dk, dv = map(_packed, call.key_gradients(upstream))
    if needs[5]:
        dbias = call.bias_gradient(bias, upstream)
    if needs[7]:
        dsinks = sink_gradient(sinks, lse2[None], upstream.delta)
    return dq, dk, dv, None, None, dbias, dslopes, dsinks


def _reference_starts(cu_seqlens: Tensor, total: int) -> list[int]:
    """Where sequences start, and the last ends; without data one of all rows, for its shapes."""
    return [0, total] if cu_seqlens.is_meta else cu_seqlens.tolist()


def varlen_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    p: float,
    alignment: str,
    left: int,
    right: int,
    score_mod: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence by itself, one after the other; reads the lengths on the host."""
    begin, end = _reference_starts(cu_seqlens_q, len(q)), _reference_starts(cu_seqlens_k, len(k))
    kept = None
    if seed is not None and p > 0:
        kept = reference_keep_mask(seed, (q.shape[1], q.shape[0], k.shape[0]), p)
    outs, lses = [q.new_empty((0, q.shape[1], v.shape[2]))], []
    for n, ((i, j), (a, b)) in enumerate(
        zip(zip(begin, begin[1:], strict=False), zip(end, end[1:], strict=False), strict=True)
    ):
        own_bias = None
        if bias is not None:
            own_bias = bias[n % bias.shape[0]][None, :, : j - i, : b - a]
            missing = (0, b - a - own_bias.shape[3], 0, j - i - own_bias.shape[2])
            own_bias = F.pad(own_bias, missing)
        own_slopes = None if slopes is None else slopes[n % slopes.shape[0]][None]
        own_kept = None if kept is None else kept[None, :, i:j, : b - a]
        out, lse = attend(
            *(_as_batch(q[i:j]), _as_batch(k[a:b]), _as_batch(v[a:b])),
            *(own_bias, None, own_slopes, sinks, own_kept),
            scale,
            softcap,
            p,
            alignment,
            left,
            right,
            score_mod,
            n,
        )
        outs.append(_packed(out))
        lses.append(lse[0])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    beyond = q.shape[0] - begin[-1] + begin[0]
    outs.append(q.new_zeros((beyond, q.shape[1], v.shape[2])))
    lses.append(q.new_full((q.shape[1], beyond), -torch.inf, dtype=wide))
    return torch.cat(outs), torch.cat(lses, 1)


def _cost(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, bias: Tensor | None, right: int
) -> Cost:
    """As if all sequences had one length."""
    (total, H, D), Dv = q.shape, v.shape[2]
    sequences = max(1, cu_seqlens_q.shape[0] - 1)
    pairs = H * total * k.shape[0] // sequences // (2 if right >= 0 else 1)
    out_bytes, lse_bytes = total * H * Dv * q.element_size(), total * H * 4
    inputs = sum(t.numel() * t.element_size() for t in (q, k, v))
    bias_bytes = 0 if bias is None else bias.numel() * bias.element_size()
    return Cost(
        forward_bytes=inputs + bias_bytes + out_bytes + lse_bytes,
        backward_bytes=2 * inputs + bias_bytes + 2 * out_bytes + lse_bytes,
        forward_flops=2 * pairs * (D + Dv),
        backward_flops=2 * pairs * (3 * D + 2 * Dv),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def sample(
        lengths_q: list[int], lengths_k: list[int], H: int, Hkv: int, D: int, Dv: int, **given: Any
    ) -> Sample:
        starts = [
            torch.tensor([0, *lengths], device=device, dtype=torch.int32).cumsum(0).int()
            for lengths in (lengths_q, lengths_k)
        ]
        total_q, total_k = sum(lengths_q), sum(lengths_k)
        defaults: dict[str, Any] = dict.fromkeys(("bias", "slopes", "sinks", "seed"), None)
        defaults |= {"scale": 0.3, "softcap": 0.0, "p": 0.0}
        defaults |= {"alignment": "bottom_right", "left": -1, "right": -1}
        tensors = (randn(total_q, H, D), randn(total_k, Hkv, D), randn(total_k, Hkv, Dv))
        return Sample(*tensors, *starts, **(defaults | given))

    seed = torch.tensor([2**40 + 7], device=device)
    yield sample([33, 2], [20, 9], 2, 1, 8, 12, right=0)
    terms = {"bias": randn(2, 1, 20, 18), "slopes": randn(2, 2).abs(), "sinks": randn(2)}
    rest = {"p": 0.3, "seed": seed, "softcap": 2.0, "alignment": "top_left"}
    yield sample([3, 18], [17, 9], 2, 1, 16, 16, **terms, **rest)
    yield sample([1, 40], [1, 40], 2, 2, 5, 3, left=3, right=2, scale=-0.2)
    yield sample([5, 0, 34, 3], [7, 4, 33, 0], 2, 2, 16, 16)


VARLEN_ATTENTION = Op(
    OpSpec(
        name="trilith::varlen_attention",
        forward=_varlen_fwd,
        backward=_varlen_bwd,
        reference=varlen_reference,
        samples=_samples,
        outputs=2,
        fake=_out,
        materialize_grads=False,
        save_outputs=(0,),
        cost=_cost,
        sharding=sharding.packed,
        autocast="low",
    )
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    score_mod: str | None = None,
    precision: str = "ieee",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of B sequences that lie one behind the other, of any lengths, also of none.

    Args:
        q: (total queries, H, D), D from 1 to 512; any strides, as for all floating tensors here.
        k: (total keys, Hkv, D), q's dtype. Hkv divides H.
        v: (total keys, Hkv, Dv), q's dtype; Dv from 1 to 512.
        cu_seqlens_q: (B + 1,) int32 or int64 on q's device: where each sequence's queries begin,
            from 0 to the total, or less: rows past the last sequence have output 0, lse -inf and
            gradients 0. On a GPU the values are not checked, for that would wait for it.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q, max_seqlen_k: for those who have them at hand. A bias with R or C of 1 is
            spread over as many, or over all queries or keys, of which its gradient is a sum.
        causal: False, "top_left" or "bottom_right", of each sequence. True where queries and keys
            have one and the same `cu_seqlens`.
        window: (left, right), how many keys before and after the diagonal's are seen.
        bias: (B or 1, H or 1, R, C), added to score [i, j] of a sequence, or boolean; R and C at
            least the longest sequence's queries and keys, or 1 for all of them. Beyond R and C it
            reads as 0, or False.
        alibi_slopes: (H,) or (B, H).
        softcap: positive; scores become softcap * tanh(score / softcap).
        sinks: (H,), one more score per head, without a value.
        dropout_p: the probability that a weight is dropped.
        scale: 1 / sqrt(D) if None.
        score_mod, precision: as `attention`; positions are counted in each sequence.
        return_lse: whether to return the log-sum-exp of the scores too.

    Returns:
        (total queries, H, Dv) in q's dtype; with `return_lse` also (H, total queries) in fp32.
        Both are differentiable. A query that sees no key has output 0, lse -inf, and gradients 0.

    Raises:
        NotImplementedError: a head dim above 512 where kernels run.
        TypeError: a dtype that does not fit.
        ValueError: shapes that do not fit, a value out of range.

    Numerics: as `attention`. Without a GPU the reference reads the lengths on the host.

    Source: Dao, "FlashAttention-2", 2023.

    Example:
        >>> q, k, v = torch.randn(3, 100, 8, 64).unbind()
        >>> starts = torch.tensor([0, 30, 30, 100], dtype=torch.int32)
        >>> varlen_attention(q, k, v, starts, starts, causal=True).shape
        torch.Size([100, 8, 64])
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k)
    require_probability(_NAME, "dropout_p", dropout_p)
    same = cu_seqlens_q is cu_seqlens_k
    if causal is True and not same:
        raise ValueError(
            f"{_NAME}: causal must say where the diagonal lies when cu_seqlens_q is not "
            'cu_seqlens_k, "top_left" or "bottom_right", got True'
        )
    alignment, left, right = score_window(_NAME, "top_left" if causal is True else causal, window)
    cap = known_softcap(_NAME, softcap)
    for arg, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        require(longest is None or longest >= 0, _NAME, arg, "not be negative", longest)
    B = cu_seqlens_q.shape[0] - 1
    _check_terms(q, B, bias, sinks)
    slopes = slopes_by_head(_NAME, q, alibi_slopes, B, q.shape[1])
    if bias is not None:
        rows, cols = bias.shape[2:]
        rows = (max_seqlen_q or q.shape[0]) if rows == 1 else rows
        cols = (max_seqlen_k or k.shape[0]) if cols == 1 else cols
        bias = bias.expand(-1, -1, rows, cols)
    scale = 1 / math.sqrt(max(1, q.shape[2])) if scale is None else scale
    modifier, products = known_score_mod(_NAME, score_mod), known_precision(_NAME, precision)
    rest = (scale, cap, dropout_p, alignment, left, right, modifier, products)
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k, bias, slopes, sinks)
    seed = None
    provider = VARLEN_ATTENTION.choose(*tensors, None, *rest)
    if provider is not None:
        require_head_dim(_NAME, q, v)
        seed = draw_seed(q) if dropout_p > 0 else None
    out, lse = VARLEN_ATTENTION.run(provider, *tensors, seed, *rest)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    require_axes(_NAME, "total", "heads", "dim", q=q, k=k, v=v)
    require_indices(_NAME, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    require_same_device(_NAME, q, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    require_one_dtype(_NAME, q=q, k=k, v=v)
    (_, H, D), (S, Hkv) = q.shape, k.shape[:2]
    require_shape(_NAME, "k", k, (S, Hkv, D))
    require_shape(_NAME, "v", v, (S, Hkv, v.shape[2]))
    require_groups(_NAME, H, Hkv)
    for arg, starts, total in (("cu_seqlens_q", cu_q, q.shape[0]), ("cu_seqlens_k", cu_k, S)):
        fits = starts.ndim == 1 and starts.shape[0] > 0 and starts.shape == cu_q.shape
        require(fits, _NAME, arg, "be (B + 1,), as long as cu_seqlens_q", tuple(starts.shape))
        values = host_lengths(starts)
        if values is not None:
            rising = values[0] == 0 and values == sorted(values) and values[-1] <= total
            require(rising, _NAME, arg, f"rise from 0 to at most the {total} rows", values)


def _check_terms(q: Tensor, B: int, bias: Tensor | None, sinks: Tensor | None) -> None:
    H = q.shape[1]
    require_bias_dtype(_NAME, bias)
    require_floating_if_given(_NAME, sinks=sinks)
    require_same_device(_NAME, q, bias=bias, sinks=sinks)
    require_shape(_NAME, "sinks", sinks, (H,))
    if bias is not None:
        fits = bias.ndim == 4 and bias.shape[0] in (1, B) and bias.shape[1] in (1, H)
        rule = f"be ({B} or 1, {H} or 1, longest queries, longest keys)"
        require(fits, _NAME, "bias", rule, tuple(bias.shape))
