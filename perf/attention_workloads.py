"""Attention's workloads: of equal lengths, packed, biased, merged, and decoding with its cache."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.workloads import Draw, Function, Workload, declared_cost
from trilith import kernels
from trilith.kernels.attention.cache import CACHE_APPEND
from trilith.plugins import Cost


def attention(b: int, h: int, t: int, d: int, causal: bool = True) -> Workload:
    constants = (None, None, None, None, None, 1 / math.sqrt(d), 0.0, 0.0, "top_left", -1)

    def flash() -> Function:
        from flash_attn import flash_attn_func

        def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return flash_attn_func(q, k, v, causal=causal).transpose(1, 2)

        return function

    def flex() -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(_sees_no_later_key, None, None, t, t) if causal else None
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Workload(
        name=f"attention-{'causal-' if causal else ''}B{b}-H{h}-T{t}-D{d}",
        arguments=lambda draw: (draw(b, h, t, d), draw(b, h, t, d), draw(b, h, t, d)),
        cost=declared_cost("attention", *constants, 0 if causal else -1),
        trilith=lambda q, k, v: kernels.attention(q, k, v, causal=causal),
        eager=sdpa,
        peers={
            "sdpa-flash": lambda: _with_backend("FLASH_ATTENTION", sdpa),
            "sdpa-cudnn": lambda: _with_backend("CUDNN_ATTENTION", sdpa),
            "flex": flex,
            "flash-attn": flash,
        },
        part=lambda x: x[:1, :1],
        compiled=False,
    )


def attention_qkvpacked(b: int, h: int, hkv: int, t: int, d: int) -> Workload:
    """Causal; q, k and v in one tensor, whose gradient is one too."""
    rest = (None, None, None, None, None, h, 1 / math.sqrt(d), 0.0, 0.0, "top_left", -1, 0)

    def sdpa(qkv: Tensor) -> Tensor:
        q, k, v = qkv.transpose(1, 2).split((h, hkv, hkv), dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != hkv)
        return mixed.transpose(1, 2)

    return Workload(
        name=f"attention_qkvpacked-B{b}-H{h}-Hkv{hkv}-T{t}-D{d}",
        arguments=lambda draw: (draw(b, t, h + 2 * hkv, d),),
        cost=declared_cost("attention_qkvpacked", *rest),
        trilith=lambda qkv: kernels.attention_qkvpacked(qkv, h, causal=True),
        eager=sdpa,
        peers={"sdpa-flash": lambda: _with_backend("FLASH_ATTENTION", sdpa)},
        part=lambda x: x[:1],
        compiled=False,
    )


def _sees_no_later_key(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def biased_attention(b: int, h: int, t: int, d: int) -> Workload:
    """A bias of each head, which wants a gradient, and padding before the first key."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        heads = (draw(b, h, t, d) for _ in range(3))
        kept = torch.arange(t, device=draw.device) > 0
        return *heads, draw(1, h, t, t), kept.expand(b, t).contiguous()

    def cost(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Cost:
        rest = (None, None, None, 1 / math.sqrt(d), 0.0, 0.0, "top_left", -1, -1)
        return declared_cost("attention", *rest)(q, k, v, bias, kept)

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
        masked = bias.masked_fill(~kept[:, None, None, :], -math.inf)
        return F.scaled_dot_product_attention(q, k, v, masked)

    return Workload(
        name=f"attention-biased-B{b}-H{h}-T{t}-D{d}",
        arguments=arguments,
        cost=cost,
        trilith=lambda q, k, v, bias, kept: kernels.attention(
            q, k, v, bias=bias, key_padding_mask=kept
        ),
        eager=eager,
        compiled=False,
    )


def varlen_attention(lengths: tuple[int, ...], h: int, d: int) -> Workload:
    """Causal self-attention of packed sequences; eager pads nothing either, one after the other."""
    bounds = [0, *itertools.accumulate(lengths)]
    constants = (None, None, None, None, 1 / math.sqrt(d), 0.0, 0.0, "top_left", -1, 0)

    def arguments(draw: Draw) -> tuple[Any, ...]:
        starts = torch.tensor(bounds, dtype=torch.int32, device=draw.device)
        return *(draw(bounds[-1], h, d) for _ in range(3)), starts

    def eager(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        parts = []
        for begin, end in itertools.pairwise(bounds):
            q_, k_, v_ = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(q_, k_, v_, is_causal=True))
        return torch.cat(parts, 1).transpose(0, 1)

    def flash() -> Function:
        from flash_attn import flash_attn_varlen_func

        longest = max(lengths)
        return lambda q, k, v, starts: flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, causal=True
        )

    return Workload(
        name=f"varlen_attention-L{'+'.join(map(str, lengths))}-H{h}-D{d}",
        arguments=arguments,
        cost=lambda q, k, v, starts: declared_cost("varlen_attention", *constants)(
            q, k, v, starts, starts
        ),
        trilith=lambda q, k, v, starts: kernels.varlen_attention(
            q, k, v, starts, starts, causal=True
        ),
        eager=eager,
        peers={"flash-attn": flash},
        compiled=False,
    )


def merge_attention(parts: int, b: int, h: int, t: int, d: int) -> Workload:
    def arguments(draw: Draw) -> tuple[Any, ...]:
        return draw(parts, b, h, t, d), torch.randn(parts, b, h, t, device=draw.device)

    return Workload(
        name=f"merge_attention-P{parts}-B{b}-H{h}-T{t}-D{d}",
        arguments=arguments,
        cost=declared_cost("merge_attention"),
        trilith=lambda outs, lses: kernels.merge_attention(outs, lses)[0],
        eager=lambda outs, lses: (outs.to(lses.dtype) * lses.softmax(0)[..., None]).sum(0).to(outs),
    )


def decode_attention(b: int, h: int, hkv: int, s: int, d: int) -> Workload:
    """One new token of each sequence over a full cache; there is no backward."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        caches = (draw.constant(b, hkv, s, d), draw.constant(b, hkv, s, d))
        return draw.constant(b, h, 1, d), *caches, torch.full((b,), s, device=draw.device)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def cost(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Cost:
        return declared_cost("decode_attention")(
            q, k.transpose(1, 2), v.transpose(1, 2), lengths, None
        )

    return Workload(
        name=f"decode_attention-B{b}-H{h}-Hkv{hkv}-S{s}-D{d}",
        arguments=arguments,
        cost=cost,
        trilith=kernels.decode_attention,
        eager=sdpa,
    )


def cache_append(b: int, hkv: int, t: int, s: int, d: int) -> Workload:
    """New tokens written into caches (b, s, hkv, d) behind the first s // 2; no backward."""

    def arguments(draw: Draw) -> tuple[Any, ...]:
        caches = (draw.constant(b, s, hkv, d) for _ in range(2))
        tokens = (draw.constant(b, hkv, t, d) for _ in range(2))
        return *caches, *tokens, torch.full((b,), s // 2, device=draw.device)

    def eager(*args: Tensor) -> Tensor:
        k_cache, v_cache, k, v, lengths = args
        rows = slice(int(lengths[0]), int(lengths[0]) + t)
        k_cache[:, rows], v_cache[:, rows] = k.transpose(1, 2), v.transpose(1, 2)
        return k_cache

    def trilith(*args: Tensor) -> Tensor:
        CACHE_APPEND(*args, None, None)
        return args[0]

    return Workload(
        name=f"cache_append-B{b}-Hkv{hkv}-T{t}-S{s}-D{d}",
        arguments=arguments,
        cost=lambda kc, vc, k, v, lengths: Cost(2 * (k.nbytes + v.nbytes) + lengths.nbytes, 0),
        trilith=trilith,
        eager=eager,
    )


def _with_backend(name: str, sdpa: Function) -> Function:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def function(*args: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return sdpa(*args)

    return function
