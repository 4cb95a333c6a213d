"""The op `trilith::attention`, from which every public attention function is made.

Parameters, with q (B, H, T, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), Hkv a divisor of H:
    bias: added to the scores, or boolean, True where a key takes part; 4-D, sizes 1 broadcast
    key_mask: (B, S) boolean, True where a key takes part
    slopes: (B or 1, H), each score loses slope * |distance from the diagonal|
    sinks: (H,), one more score per head, without a value
    seed: of the dropout mask; p: dropout's probability
    scale: of q k^T; softcap: scores become softcap * tanh(score / softcap); 0 for none
    score_mod: the name of what changes the scaled scores first; precision: of float32's products
    alignment: the diagonal starts at key 0 ("top_left") or ends at the last key ("bottom_right")
    left, right: how far before and after the diagonal keys are seen; negative for any distance
Outputs: out (B, H, T, Dv), and lse (B, H, T) in natural logarithm, fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trilith.kernels.attention import sharding
from trilith.kernels.attention.launchers import attention_bwd, attention_fwd, attention_out
from trilith.kernels.attention.reference import attention_reference
from trilith.plugins import Cost, Op, OpSpec, Sample


def attention_cost(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, right: int) -> Cost:
    (B, H, T, D), (S, Dv) = q.shape, v.shape[2:]
    pairs = B * H * T * S // (2 if right >= 0 else 1)
    out_bytes, lse_bytes = B * H * T * Dv * q.element_size(), B * H * T * 4
    inputs = sum(t.numel() * t.element_size() for t in (q, k, v))
    mask_bytes = 0 if bias is None else bias.numel() * bias.element_size()
    return Cost(
        forward_bytes=inputs + mask_bytes + out_bytes + lse_bytes,
        backward_bytes=2 * inputs + mask_bytes + 2 * out_bytes + lse_bytes,
        forward_flops=2 * pairs * (D + Dv),
        backward_flops=2 * pairs * (3 * D + 2 * Dv),
    )


def _samples(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def qkv(
        B: int, H: int, Hkv: int, T: int, S: int, D: int, Dv: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return randn(B, H, T, D), randn(B, Hkv, S, D), randn(B, Hkv, S, Dv)

    def sample(*tensors: Tensor, **given: Any) -> Sample:
        defaults: dict[str, Any] = dict.fromkeys(
            ("bias", "key_mask", "slopes", "sinks", "seed"), None
        )
        defaults |= {"scale": 0.3, "softcap": 0.0, "p": 0.0}
        defaults |= {"alignment": "top_left", "left": -1, "right": -1}
        return Sample(*tensors, **(defaults | given))

    seed = torch.tensor([2**40 + 7], device=device)
    kept = torch.arange(18, device=device) < torch.tensor([[18], [9]], device=device)
    packed = randn(1, 35, 3, 2, 16).permute(2, 0, 3, 1, 4)
    terms = {"bias": randn(2, 1, 3, 18), "slopes": randn(1, 2).abs(), "sinks": randn(2)}
    drops = {"key_mask": kept, "p": 0.3, "seed": seed}
    yield sample(*packed, right=0)
    yield sample(*qkv(2, 2, 1, 3, 18, 16, 16), **terms, **drops, scale=-0.2)
    yield sample(*qkv(2, 2, 2, 33, 37, 16, 16))
    yield sample(
        *qkv(1, 4, 2, 5, 34, 8, 12), alignment="bottom_right", right=0, bias=randn(1, 4, 1, 34)
    )
    yield sample(*qkv(1, 2, 2, 34, 33, 5, 3), bias=randn(1, 1, 34, 33) > 0, softcap=2.0)
    yield sample(
        *qkv(2, 2, 1, 34, 9, 16, 16), slopes=randn(1, 2).abs(), sinks=randn(2), left=3, right=2
    )


ATTENTION = Op(
    OpSpec(
        name="trilith::attention",
        forward=attention_fwd,
        backward=attention_bwd,
        reference=attention_reference,
        samples=_samples,
        outputs=2,
        fake=attention_out,
        materialize_grads=False,
        save_outputs=(0,),
        cost=attention_cost,
        sharding=sharding.dense,
        autocast="low",
    )
)
