"""Every two choices of attention's features in one call, against the reference in float64."""

import zlib

import pytest
import torch

from tests.kernels.test_attention import OP, call, differentiable, eager, randn, run
from tests.support.compare import assert_fair
from tests.support.covering import pairwise
from tests.support.devices import DEVICE

B = 2
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIMS = {"1": (1, 1), "16": (16, 16), "3-17": (3, 17), "64": (64, 64), "80": (80, 80)}
DIMS |= {"128-40": (128, 40), "160-8": (160, 8), "256": (256, 256), "512-320": (512, 320)}
LENGTHS = {"33-40": (33, 40), "35-18": (35, 18), "1-37": (1, 37), "17-1": (17, 1), "5-0": (5, 0)}
HEADS = {"equal": (2, 2), "grouped": (4, 2), "one": (3, 1)}
BANDS = {
    "all": {},
    "top_left": {"right": 0},
    "bottom_right": {"alignment": "bottom_right", "right": 0},
    "window": {"left": 9, "right": 4},
    "causal_window": {"alignment": "bottom_right", "left": 6, "right": 0},
}
BIASES = {
    "none": None,
    "boolean": lambda H, T, S: randn(B, 1, T, S) > -0.5,
    "shared": lambda H, T, S: randn(1, 1, T, S),
    "of_heads": lambda H, T, S: randn(1, H, T, S),
    "of_keys": lambda H, T, S: randn(B, 1, 1, S),
    "of_queries": lambda H, T, S: randn(1, H, T, 1),
    "infinite": lambda H, T, S: torch.where(randn(B, H, T, S) > 0, randn(B, H, T, S), -torch.inf),
}
KEY_MASKS = {
    "none": None,
    "some": lambda S: torch.rand(B, S, device=DEVICE) > 0.3,
    "no_key": lambda S: torch.tensor([[True], [False]], device=DEVICE).expand(B, S),
}
LAYOUTS = {
    "dense": lambda t: t,
    "heads_inside": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "features_apart": lambda t: t.mT.contiguous().mT,
    "stride_0": lambda t: t[:1, :1].expand(t.shape),
}
FACTORS = {
    "dims": DIMS,
    "bias": BIASES,
    "lengths": LENGTHS,
    "band": BANDS,
    "layout": LAYOUTS,
    "dtype": DTYPES,
    "heads": HEADS,
    "key_mask": KEY_MASKS,
    "slopes": ("none", "of_heads", "of_batch"),
    "lse": ("out", "both"),
    "softcap": ("none", "capped"),
    "sinks": ("none", "sinks"),
    "dropout": ("none", "dropped"),
    "scale": ("default", "negative"),
}
ROWS = pairwise({name: tuple(choices) for name, choices in FACTORS.items()})


def arguments(row):
    dtype, (D, Dv), (H, Hkv) = DTYPES[row["dtype"]], DIMS[row["dims"]], HEADS[row["heads"]]
    T, S = LENGTHS[row["lengths"]]
    if D > 256:  # slow where kernels are interpreted
        T, S = min(T, 9), min(S, 12)
    shapes = ((B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv))
    q, k, v = (LAYOUTS[row["layout"]](randn(*shape, dtype=dtype)) for shape in shapes)
    given = dict(BANDS[row["band"]])
    if row["bias"] != "none":
        bias = BIASES[row["bias"]](H, T, S)
        given["bias"] = bias if bias.dtype == torch.bool else bias.to(dtype)
    if row["key_mask"] != "none":
        given["key_mask"] = KEY_MASKS[row["key_mask"]](S)
    if row["slopes"] != "none":
        given["slopes"] = randn(1 if row["slopes"] == "of_heads" else B, H).abs() / 8
    if row["sinks"] == "sinks":
        given["sinks"] = randn(H, dtype=dtype)
    if row["dropout"] == "dropped":
        given |= {"p": 0.3, "seed": torch.tensor([2**35 + 3], device=DEVICE)}
    given["scale"] = D**-0.5 * (-0.7 if row["scale"] == "negative" else 1.0)
    given["softcap"] = 1.5 if row["softcap"] == "capped" else 0.0
    return call(q, k, v, **given)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_pairs_of_features(row):
    torch.manual_seed(zlib.crc32("".join(row.values()).encode()))
    args = arguments(row)
    q, k, v = args[:3]
    dout, dlse = randn(*q.shape[:3], v.shape[3]).to(q.dtype), randn(*q.shape[:3])
    dlse *= row["lse"] == "both"
    chosen = differentiable(args)
    double = [a.double() if i in chosen else a for i, a in enumerate(args)]
    actual = run(OP, args, dout, dlse)
    expected = run(OP.spec.reference, double, dout.double(), dlse.double())
    fair = eager(args, dout, dlse) if k.shape[2] else expected
    for a, e, f in zip(actual, expected, fair, strict=True):
        if e is None or e.numel() == 0:
            assert a is None or a.shape == e.shape
            continue
        assert_fair(a, e, f.to(a.dtype), rows=q.shape[:3].numel())
