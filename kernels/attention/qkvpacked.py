"""Attention of one projection's output: qkv (B, T, H + 2 Hkv, D), the heads of q, then k, then v.

The kernels are those of `attention`, which read q, k and v where they lie; backward writes their
gradients into one tensor, where autograd would have to join three.

Letters, formulas, numerics and source as in forward.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trilith.kernels._runtime.plan import as_one, planned
from trilith.kernels._runtime.random import draw_seed
from trilith.kernels._runtime.sharding import Strategy, split
from trilith.kernels.attention.arguments import as_qkv, options_of, require_head_dim
from trilith.kernels.attention.functions import attention
from trilith.kernels.attention.launchers import AttentionCall, attention_gradients
from trilith.kernels.attention.op import ATTENTION, attention_cost
from trilith.kernels.attention.reference import attention_reference
from trilith.kernels.attention.sharding import unless_one
from trilith.plugins import BackwardContext, Cost, Op, OpSpec, Sample

_NAME = "attention_qkvpacked"


@as_one
def _parts(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D), k and v (B, Hkv, T, D), views."""
    key_heads = (qkv.shape[2] - n_heads) // 2
    q, k, v = qkv.transpose(1, 2).split((n_heads, key_heads, key_heads), dim=1)
    return q, k, v


def _out(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, T, H, D), lse, and the lse in base 2 that backward reads."""
    B, T, _, D = qkv.shape
    lse, lse2 = (qkv.new_empty((B, n_heads, T), dtype=torch.float32) for _ in range(2))
    return qkv.new_empty((B, T, n_heads, D)), lse, lse2


@planned
def _forward(
    qkv: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    n_heads: int,
    scale: float,
    softcap: float,
    p: float,
    alignment: str,
    left: int,
    right: int,
    score_mod: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (scale, softcap, p, alignment, left, right, score_mod, precision)
    out, lse, lse2 = _out(qkv, n_heads)
    q, k, v = _parts(qkv, n_heads)
    call = AttentionCall(q, k, v, bias, key_mask, slopes, seed, *rest)
    call.forward(sinks, out.transpose(1, 2), lse, lse2)
    return out, lse, lse2


@planned
def _backward(
    ctx: BackwardContext, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    qkv, *terms, n_heads = ctx.inputs[:7]
    (out,), (lse2,), needs = ctx.outputs, ctx.aux, ctx.needs_input_grad
    dqkv = qkv.new_empty(qkv.shape) if needs[0] else None
    _, _, _, *gradients = attention_gradients(
        _parts(qkv, n_heads),
        (*terms, *ctx.inputs[7:]),
        (out.transpose(1, 2), lse2),
        None if dout is None else dout.transpose(1, 2),
        dlse,
        (*needs[:1] * 3, *needs[1:5]),
        into=None if dqkv is None else _parts(dqkv, n_heads),
    )
    return dqkv, *gradients


def _reference(
    qkv: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    n_heads: int,
    scale: float,
    softcap: float,
    p: float,
    alignment: str,
    left: int,
    right: int,
    score_mod: str = "",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """`trilith::attention` of the parts; out is (B, T, H, D)."""
    q, k, v = _parts(qkv, n_heads)
    rest = (scale, softcap, p, alignment, left, right, score_mod, precision)
    out, lse = attention_reference(q, k, v, bias, key_mask, slopes, sinks, seed, *rest)
    return out.transpose(1, 2), lse


def _samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    """With capped scores: q and k grow together, and of scores near 1e8 nothing is left in fp32."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def sample(B: int, T: int, H: int, Hkv: int, D: int, **given: Any) -> Sample:
        defaults: dict[str, Any] = dict.fromkeys(
            ("bias", "key_mask", "slopes", "sinks", "seed"), None
        )
        defaults |= {"n_heads": H, "scale": 0.3, "softcap": 3.0, "p": 0.0}
        defaults |= {"alignment": "top_left", "left": -1, "right": -1}
        return Sample(randn(B, T, H + 2 * Hkv, D), **(defaults | given))

    seed = torch.tensor([2**40 + 7], device=device)
    kept = torch.arange(5, device=device) < torch.tensor([[5], [3]], device=device)
    yield sample(1, 35, 2, 2, 16, right=0)
    yield sample(2, 18, 4, 2, 8, slopes=randn(2, 4).abs(), left=7, right=3)
    terms = {"bias": randn(2, 1, 5, 5), "key_mask": kept, "sinks": randn(4)}
    yield sample(2, 5, 4, 1, 12, **terms, seed=seed, p=0.3, scale=-0.2)


def _cost(qkv: Tensor, bias: Tensor | None, n_heads: int, right: int) -> Cost:
    q, k, v = _parts(qkv, n_heads)
    return attention_cost(q, k, v, bias, right)


def _sharding(
    qkv: Tensor, bias: Tensor | None, slopes: Tensor | None, p: float, score_mod: str
) -> list[Strategy]:
    """Batches alone: the heads of q, k and v lie in one dimension. Otherwise as `attention`."""
    if p > 0 or score_mod:
        return []
    return [split([0, 0], [0, unless_one(bias, 0), 0, unless_one(slopes, 0)])]


ATTENTION_QKVPACKED = Op(
    OpSpec(
        name="trilith::attention_qkvpacked",
        forward=_forward,
        backward=_backward,
        reference=_reference,
        samples=_samples,
        outputs=2,
        fake=_out,
        materialize_grads=False,
        save_outputs=(0,),
        cost=_cost,
        sharding=_sharding,
        autocast="low",
        parts=(ATTENTION.spec.name,),
    )
)


def attention_qkvpacked(
    qkv: Tensor,
    n_heads: int | None = None,
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
    """`attention` of q, k and v that one projection made, and that lie in one tensor.

    Args:
        qkv: (B, T, H + 2 Hkv, D), the heads of q, then of k, then of v, or (B, T, 3, H, D); any
            strides. D from 1 to 512.
        n_heads: H; None where q, k and v have equally many.
        causal and what follows: as in `attention`.

    Returns:
        (B, T, H, D) in qkv's dtype, contiguous; with `return_lse` also (B, H, T) in fp32.

    Raises:
        ValueError: heads that are no H + 2 Hkv with Hkv a divisor of H; and as `attention`.
        NotImplementedError, TypeError: as `attention`.

    Numerics and source: as `attention`. The gradient of qkv is one tensor, made without a copy.

    Example:
        >>> qkv = torch.randn(2, 128, 8 + 2 * 2, 64)
        >>> attention_qkvpacked(qkv, 8, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    qkv, heads = as_qkv(_NAME, qkv, n_heads)
    B, T, _, D = qkv.shape
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "bias": bias,
        "alibi_slopes": alibi_slopes,
        "softcap": softcap,
        "sinks": sinks,
        "key_padding_mask": key_padding_mask,
        "dropout_p": dropout_p,
        "scale": scale,
        "score_mod": score_mod,
        "precision": precision,
    }
    terms, scalars = options_of(_NAME, qkv, (B, heads, T, T, D), **options)
    provider = ATTENTION_QKVPACKED.choose(qkv, *terms, None, heads, *scalars)
    if provider is not None:
        require_head_dim(_NAME, qkv, qkv)
        seed = draw_seed(qkv) if dropout_p > 0 else None
        out, lse = ATTENTION_QKVPACKED.run(provider, qkv, *terms, seed, heads, *scalars)
        return (out, lse) if return_lse else out
    made = attention(*_parts(qkv, heads), **options, return_lse=return_lse)
    if isinstance(made, Tensor):
        return made.transpose(1, 2)
    return made[0].transpose(1, 2), made[1]
