"""transformers' attention by name: `attn_implementation="trilith"`.

Shapes: B batch, H heads, T queries, S keys, D head dim, W how many keys back a query sees.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from trilith.kernels import attention, decode_attention, varlen_attention
from trilith.plugins.dynamo import assume_constant_result

NAME = "trilith"
_CAUSAL, _WINDOWED = torch.uint8, torch.int8  # dtypes of masks by rule
_SPARSE = 'attention to keys that the model chooses is not supported; use "eager"'
_NOT_THERE = {
    "cache": "continuous batching is not supported; use generate()",
    "indices": _SPARSE,
    "block_indices": _SPARSE,
    "sinks": 'sinks of each query are not supported; use "eager"',
}


def register_transformers() -> None:
    """Make `attn_implementation="trilith"` known to transformers, once for the process.

    Models then take the name in `from_pretrained`, `from_config` and `set_attn_implementation`, and
    run `trilith.kernels.attention`: causal or not, sliding windows, grouped heads, soft cap, sinks,
    position bias, dropout, masks, and every cache but the paged one. What a mask only says by rule
    (causal, a window, padding) never becomes a (T, S) tensor. Attention weights are not returned.

    Raises:
        ImportError: transformers is not installed, older than 5, or does not import here.

    Example:
        >>> trilith.register_transformers()
        >>> AutoModelForCausalLM.from_pretrained(path, attn_implementation="trilith")
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_transformers: transformers must be of version 5 or newer and import, got "
            f"{error!r}; pip install 'trilith[transformers]' brings one"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """What a model calls: query (B, H, T, D), key and value with a divisor of H heads.

    The mask is 4-D, boolean or added; or `attention_mask`'s of 8 bits; or None, for which causal
    modules count from the first key, as with scaled_dot_product_attention. A window comes with the
    mask alone: not every model names its window here. Documents that lie one behind the other may
    come as flash-attention has them, by `cu_seq_lens_q` and `cu_seq_lens_k`: none sees another,
    whatever the mask says.

    Returns:
        (B, T, H, D), and None for the weights.

    Raises:
        NotImplementedError: the model asks for what changes the result and is not there.
    """
    for name, what in _NOT_THERE.items():
        if given.get(name) is not None:
            raise NotImplementedError(f'attn_implementation="{NAME}": {what}')
    T, S = query.shape[2], key.shape[2]
    if query.shape[0] != key.shape[0]:
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(batch, *t.shape[1:]) for t in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or None, "sinks": s_aux}
    plain = attention_mask is None and position_bias is None
    if T == 1 and S > 0 and plain and not (dropout or torch.is_grad_enabled()):
        lengths = torch.full((len(key),), S, dtype=torch.int32, device=key.device)
        out = cast(Tensor, decode_attention(query, key, value, lengths, **options))
        return out.transpose(1, 2).contiguous(), None
    is_causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if attention_mask is None and T > 1 and not (is_causal or softcap or s_aux is not None):
        _require_known_causality(type(module).__module__)
    options |= {"dropout_p": dropout} | _masking(module, T, S, attention_mask, is_causal)
    untold = attention_mask is None or attention_mask.dtype == _WINDOWED
    starts = _starts(given)
    if starts is not None and untold and position_bias is None:
        return _of_packed(query, key, value, *starts, options), None
    if position_bias is not None:
        options["bias"] = _with_mask(position_bias, options["bias"])
    if starts is not None:
        apart = _same_document(*starts, len(query), T, S)
        options["bias"] = _with_mask(options["bias"], apart)
    out = cast(Tensor, attention(query, key, value, **options))
    return out.transpose(1, 2).contiguous(), None


def _starts(given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Where documents start among the queries and among the keys of all rows."""
    of_queries, of_keys = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    if of_queries is None:
        return None
    return of_queries, of_queries if of_keys is None else of_keys


def _same_document(starts_q: Tensor, starts_k: Tensor, B: int, T: int, S: int) -> Tensor:
    """(B, 1, T, S): whether a query and a key are of one document."""
    of_queries, of_keys = (
        torch.bucketize(torch.arange(n, device=starts.device), starts.long(), right=True)
        for n, starts in ((B * T, starts_q), (B * S, starts_k))
    )
    return of_queries.view(B, 1, T, 1) == of_keys.view(B, 1, 1, S)


def _of_packed(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, options: dict[str, Any]
) -> Tensor:
    B, _, T, _ = q.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = varlen_attention(
        q,
        k,
        v,
        starts_q,
        starts_k,
        causal="bottom_right" if options["causal"] else False,
        window=options.get("window"),
        softcap=options["softcap"],
        sinks=options["sinks"],
        dropout_p=options["dropout_p"],
        scale=options["scale"],
    )
    return cast(Tensor, out).unflatten(0, (B, T))


def _require_known_causality(name: str) -> None:
    """That a file's models say without a mask what is causal, as torch's attention needs it."""
    if not _says_what_is_causal(name):
        raise NotImplementedError(
            f'attn_implementation="{NAME}": models of {name} do not say, without a mask, what is '
            'causal; use "eager"'
        )


@assume_constant_result
def _says_what_is_causal(name: str) -> bool:
    return _has_models_for_torchs_attention(name)


@cache
def _has_models_for_torchs_attention(name: str) -> bool:
    """Whether transformers lets torch's attention run in a file's models, which it does not for
    soft caps and sinks either."""
    from transformers import PreTrainedModel

    own = [c for c in vars(sys.modules[name]).values() if isinstance(c, type)]
    models = [c for c in own if issubclass(c, PreTrainedModel) and c.__module__ == name]
    return not models or any(model._supports_sdpa for model in models)


def _masking(
    module: nn.Module, T: int, S: int, mask: Tensor | None, is_causal: bool | None
) -> dict[str, Any]:
    if mask is not None and mask.dtype in (_CAUSAL, _WINDOWED):
        W, is_windowed = mask.shape[3], mask.dtype == _WINDOWED
        if mask.shape[2] != S or not (W < S if is_windowed else W == S):
            raise NotImplementedError(
                f'attn_implementation="{NAME}": {type(module).__name__} changes the mask for keys '
                'of its own; use "eager"'
            )
        padding = mask[:, 0, :, 0].view(torch.bool)
        window = (W - 1, 0) if is_windowed else None
        return {"causal": "bottom_right", "window": window} | {
            "key_padding_mask": padding,
            "bias": None,
        }
    causal = True if is_causal is None else is_causal
    alone = mask is None and T > 1
    return {"causal": "top_left" if causal and alone else False, "bias": mask}


def _with_mask(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Both as one; what a mask forbids is -inf in an added bias."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if bias.dtype == torch.bool:
        return bias & mask
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **rest: Any,
) -> Tensor | None:
    """The mask of a model's layers, as small as it can be; called by transformers.

    Returns:
        None where nothing is masked, or nothing but what comes after each query.
        (B, 1, S, W) int8, or uint8 where W = S, so that a model that changes it is noticed, with
        no memory behind its last dimension: the queries are the last of S keys
        and causal; key s takes part where [:, 0, s], for the W queries from its own on.
        (B, 1, 1, S) boolean: keys that take part, for all queries.
        (B, 1, T, S) boolean, as for scaled_dot_product_attention, where no rule is known.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    padding = _padding(attention_mask, kv_length, kv_offset)
    if mask_function is bidirectional_mask_function and allow_is_bidirectional_skip:
        return None if padding is None else padding[:, None, None, :]
    chunked = local_size is not None and getattr(config, "attention_chunk_size", None) is not None
    # a static cache's offset is a tensor: its queries are not the last of the keys
    last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if not (allow_is_causal_skip and last) or chunked:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]  # a static cache gives a tensor
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **rest,
        )
    window = kv_length if local_size is None else min(local_size, kv_length)
    if padding is None and window == kv_length and q_length in (1, kv_length):
        return None
    if padding is None:
        padding = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
    kind = _WINDOWED if window < kv_length else _CAUSAL
    return padding.view(kind)[:, None, :, None].expand(-1, -1, -1, window)


def _padding(mask: Tensor | None, length: int, offset: int) -> Tensor | None:
    """The (B, S) of a (B, any) mask; None where every key takes part, as far as one may look."""
    if mask is None:
        return None
    missing = offset + length - mask.shape[-1]
    mask = torch.nn.functional.pad(mask, (0, max(0, missing)))[:, offset : offset + length]
    looking = not torch.compiler.is_compiling()
    return None if looking and bool(mask.all()) else mask
