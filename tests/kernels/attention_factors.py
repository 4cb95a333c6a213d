"""The features of attention as factors of a covering array, and what a row of choices means.

The choices that take least time come first: they fill up what no pair asks for.
"""

import torch

from tests.support.devices import DEVICE

B = 2
DTYPES = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
}
DIMS = {"16": (16, 16), "1": (1, 1), "3-17": (3, 17), "64": (64, 64), "80": (80, 80)}
DIMS |= {"128-40": (128, 40), "160-8": (160, 8), "256": (256, 256), "300-130": (300, 130)}
HEADS = {"equal": (2, 2), "grouped": (4, 2), "one": (2, 1)}
BANDS = {
    "all": {},
    "top_left": {"right": 0},
    "bottom_right": {"alignment": "bottom_right", "right": 0},
    "window": {"left": 9, "right": 4},
    "causal_window": {"alignment": "bottom_right", "left": 6, "right": 0},
}
SHARED = {
    "band": BANDS,
    "dtype": DTYPES,
    "heads": HEADS,
    "slopes": ("none", "by_head", "by_batch"),
    "lse": ("out", "both"),
    "softcap": ("none", "capped"),
    "sinks": ("none", "sinks"),
    "dropout": ("none", "dropped"),
    "scale": ("default", "negative"),
}

# A tile has 32 queries and 32 keys, 16 where it is masked, where kernels are interpreted.
DENSE_LENGTHS = {"18-33": (18, 33), "1-37": (1, 37), "17-1": (17, 1), "5-0": (5, 0)}
DENSE_LENGTHS["35-18"] = (35, 18)
DENSE_BIASES = {
    "none": None,
    "boolean": lambda H, T, S: randn(B, 1, T, S) > -0.5,
    "shared": lambda H, T, S: randn(1, 1, T, S),
    "of_heads": lambda H, T, S: randn(1, H, T, S),
    "of_keys": lambda H, T, S: randn(B, 1, 1, S),
    "of_queries": lambda H, T, S: randn(1, H, T, 1),
    "infinite": lambda H, T, S: half_infinite(B, H, T, S),
}
KEY_MASKS = {
    "none": None,
    "some": lambda S: torch.rand(B, S, device=DEVICE) > 0.3,
    "padded": lambda S: padded(S),
    "no_key": lambda S: torch.tensor([[True], [False]], device=DEVICE).expand(B, S),
}
DENSE_LAYOUTS = {
    "dense": lambda t: t,
    "heads_inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "features_apart": lambda t: t.mT.contiguous().mT,
    "stride_0": lambda t: t[:1, :1].expand(t.shape),
}
DENSE = {
    "dims": DIMS,
    "bias": DENSE_BIASES,
    "lengths": DENSE_LENGTHS,
    "layout": DENSE_LAYOUTS,
    "key_mask": KEY_MASKS,
} | SHARED

# Queries, keys of each sequence.
PACKED_LENGTHS = {
    "empty_ones": ((0, 5, 3, 0), (7, 0, 4, 0)),
    "of_one": ((1, 17, 1), (20, 1, 1)),
    "alone": ((35,), (18,)),
    "over_a_tile": ((34, 3), (4, 33)),
    "no_queries": ((0, 0), (3, 2)),
    "no_keys": ((3, 2), (0, 0)),
}
PACKED_BIASES = {
    "none": None,
    "boolean": lambda N, H, T, S: randn(N, 1, T, S) > -0.5,
    "shared": lambda N, H, T, S: randn(1, 1, T + 2, S + 3),
    "of_heads": lambda N, H, T, S: randn(1, H, T, S),
    "of_keys": lambda N, H, T, S: randn(N, 1, 1, S).expand(N, 1, T, S),
    "infinite": lambda N, H, T, S: torch.where(
        randn(N, H, T, S) > 0, randn(N, H, T, S), -torch.inf
    ),
}
PACKED_LAYOUTS = {
    "dense": lambda t: t,
    "heads_outside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "features_apart": lambda t: t.mT.contiguous().mT,
    "stride_0": lambda t: t[:, :1].expand(t.shape),
}
PACKED = {
    "dims": DIMS,
    "lengths": PACKED_LENGTHS,
    "bias": PACKED_BIASES,
    "layout": PACKED_LAYOUTS,
    "starts": {"int32": torch.int32, "int64": torch.int64},
    "past_rows": ("none", "some"),
} | SHARED


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def padded(S):
    """Keys after the first third, and before the last one, take no part."""
    keys = torch.arange(S, device=DEVICE)
    return torch.stack([keys < S // 3, keys >= S - 1])


def half_infinite(*shape):
    return torch.where(randn(*shape) > 0, randn(*shape), -torch.inf)


def dense_arguments(row):
    """The dense op's arguments, in order, without score mod and precision."""
    dtype, (D, Dv), (H, Hkv) = DTYPES[row["dtype"]][0], DIMS[row["dims"]], HEADS[row["heads"]]
    T, S = DENSE_LENGTHS[row["lengths"]]
    shapes = ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
    qkv = (DENSE_LAYOUTS[row["layout"]](randn(*shape, dtype=dtype)) for shape in shapes)
    bias, mask = DENSE_BIASES[row["bias"]], KEY_MASKS[row["key_mask"]]
    bias = None if bias is None else _cast(bias(H, T, S), dtype)
    return [*qkv, bias, None if mask is None else mask(S), *_shared(row, B, H, D, dtype)]


def packed_arguments(row):
    """The packed op's."""
    dtype, (D, Dv), (H, Hkv) = DTYPES[row["dtype"]][0], DIMS[row["dims"]], HEADS[row["heads"]]
    lengths = PACKED_LENGTHS[row["lengths"]]
    N, past = len(lengths[0]), 0 if row["past_rows"] == "none" else 4
    rows, cols = (sum(n) + past for n in lengths)
    shapes = ((rows, H, D), (cols, Hkv, D), (cols, Hkv, Dv))
    qkv = (PACKED_LAYOUTS[row["layout"]](randn(*shape, dtype=dtype)) for shape in shapes)
    starts = (torch.tensor([0, *n], device=DEVICE).cumsum(0) for n in lengths)
    starts = (n.to(PACKED["starts"][row["starts"]]) for n in starts)
    bias = PACKED_BIASES[row["bias"]]
    bias = None if bias is None else _cast(bias(N, H, *map(max, lengths)), dtype)
    return [*qkv, *starts, bias, *_shared(row, N, H, D, dtype)]


def _cast(bias, dtype):
    return bias if bias.dtype == torch.bool else bias.to(dtype)


def _shared(row, batch, H, D, dtype):
    """What follows the bias and key mask: slopes, sinks, seed and the scalars."""
    slopes = sinks = seed = None
    if row["slopes"] != "none":
        slopes = randn(1 if row["slopes"] == "by_head" else batch, H).abs() / 8
    if row["sinks"] != "none":
        sinks = randn(H, dtype=dtype)
    p = 0.3 if row["dropout"] == "dropped" else 0.0
    if p:
        seed = torch.tensor([2**35 + 3], device=DEVICE)
    scale = D**-0.5 * (-0.7 if row["scale"] == "negative" else 1.0)
    softcap = 1.5 if row["softcap"] == "capped" else 0.0
    band = {"alignment": "top_left", "left": -1, "right": -1} | BANDS[row["band"]]
    return [slopes, sinks, seed, scale, softcap, p, *band.values()]
