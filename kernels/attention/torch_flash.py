"""Trilith's kernels behind `torch.nn.functional.scaled_dot_product_attention` itself.

torch keeps a list of flash attention implementations. An active one takes the place of two torch
ops on CUDA, those of its flash backend, in this process and until torch's own are restored:

    trilith.register_flash_attention()
    torch.nn.attention.activate_flash_attention_impl("trilith")
    torch.nn.attention.restore_flash_attention_impl()

torch still decides which calls go to its flash backend: 16 bits, no mask, head dims to 256. Packed
sequences (torch.nn.attention.varlen, nested tensors) stay torch's: `varlen_attention` has them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import Library

from trilith.kernels._runtime.random import draw_seed
from trilith.kernels.attention.launchers import attention_bwd, attention_fwd
from trilith.plugins import BackwardContext

NAME = "trilith"


def register_flash_attention() -> None:
    """Name "trilith" to torch.nn.attention as a flash attention that may be activated.

    `torch.nn.attention.activate_flash_attention_impl("trilith")` then makes the flash backend of
    torch's scaled_dot_product_attention run Trilith's kernels, forward and backward.

    Raises:
        NotImplementedError: this torch has no such list; torch 2.13 has it.

    Numerics: as `attention`. Dropout draws other masks than torch does from the same seed.

    Example:
        >>> trilith.register_flash_attention()
        >>> torch.nn.attention.activate_flash_attention_impl("trilith")
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        raise NotImplementedError(
            "register_flash_attention: torch.nn.attention must have a list of flash attention "
            f"implementations, got torch {torch.__version__}"
        )
    register(NAME, register_fn=Active)


class Active:
    """Holds torch's two ops while the implementation is active."""

    def __init__(self, dispatch_key: str = "CUDA") -> None:
        self._library: Library | None = Library("aten", "IMPL", dispatch_key)
        op = "_scaled_dot_product_flash_attention"
        self._library.impl(op, _forward, dispatch_key)
        self._library.impl(op + "_backward", _backward, dispatch_key)

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
        self._library = None


def _rest(q: Tensor, p: float, is_causal: bool, scale: float | None) -> tuple:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return scale, 0.0, p, "top_left", -1, 0 if is_causal else -1


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple:
    """torch's op: out like query, lse, no sequence starts, lengths, what backward needs."""
    seed = draw_seed(query) if dropout_p > 0 else None
    rest = _rest(query, dropout_p, is_causal, scale)
    out, lse, lse2 = attention_fwd(query, key, value, None, None, None, None, seed, *rest)
    out = _laid_out_like(query, out)
    if seed is None:
        seed = torch.zeros(1, dtype=torch.int64, device=query.device)
    # what torch keeps of its generator: (2,) and (), both uint64
    state = seed.repeat(2).view(torch.uint64)
    offset, nothing = state.new_empty(()), query.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], state, offset, nothing


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    seed = philox_seed.view(torch.int64)[:1] if dropout_p > 0 else None
    lse2 = torch.where(logsumexp == -torch.inf, torch.inf, logsumexp * math.log2(math.e))
    rest = _rest(query, dropout_p, is_causal, scale)
    ctx = BackwardContext(
        inputs=(query, key, value, None, None, None, None, seed, *rest),
        outputs=(out,),
        aux=(lse2,),
        needs_input_grad=(True, True, True, *[False] * 11),
    )
    dq, dk, dv = attention_bwd(ctx, grad_out, None)[:3]
    assert dq is not None and dk is not None and dv is not None
    return _laid_out_like(query, dq), _laid_out_like(key, dk), _laid_out_like(value, dv)


def _laid_out_like(given: Tensor, result: Tensor) -> Tensor:
    """`result` with the strides that torch promises to torch.compile: those of empty_like."""
    like = torch.empty_like(given)
    return result if result.stride() == like.stride() else like.copy_(result)
