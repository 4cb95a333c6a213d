"""Head dims above 256, biases, tf32 and a score mod: attention's rarer tiles, for the survey."""

import torch

from tests.kernels.shapes_attention import ATTENTION, additive, boolean, sample, seed
from tests.kernels.shapes_varlen_attention import VARLEN_ATTENTION
from tests.kernels.shapes_varlen_attention import sample as packed
from trilith.kernels._runtime.language import tl, triton
from trilith.plugins import ScoreMod, registry


@triton.jit
def by_distance(score, b, h, q, k):
    return score - 0.1 * (h + 1).to(tl.float32) * tl.abs(q - k).to(tl.float32)


@triton.jit
def by_distance_grad(score, b, h, q, k):
    return 1.0


def by_distance_reference(score, b, h, q, k):
    return score - 0.1 * (h + 1) * (q - k).abs()


MOD = ScoreMod("tests.by_distance", by_distance, by_distance_grad, by_distance_reference)


def cases():
    name = ATTENTION.spec.name
    if MOD.name not in registry.score_mod_names():
        registry.add_score_mod(MOD)
    for dtype in (torch.bfloat16, torch.float32):
        yield name, sample(dtype, 512, right=0)
        yield name, sample(dtype, 512, bias=boolean(), p=0.1, seed=seed(), right=0)
        yield name, sample(dtype, 512, bias=additive(dtype), left=512, right=0, softcap=30.0)
        for d in (64, 256):
            yield name, sample(dtype, d, bias=additive(dtype))
    for d in (64, 128, 256, 512):
        rounded = {"bias": additive(torch.float32), "precision": "tf32"}
        yield name, sample(torch.float32, d, right=0, **rounded)
    yield name, sample(torch.bfloat16, 128, right=0, score_mod=MOD.name)
    yield VARLEN_ATTENTION.spec.name, packed(torch.bfloat16, 320, right=0)
