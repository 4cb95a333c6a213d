"""Score mods by name: a plugin's change of attention's scores, against its reference in float64."""

import pytest
import torch

from tests.kernels.test_attention import call, differentiable, qkv, randn
from tests.kernels.test_varlen_attention import KEYS, QUERIES, packed, starts
from tests.kernels.test_varlen_attention import call as varlen_call
from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE, dtype_name
from trilith.kernels import attention, varlen_attention
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels.attention.op import ATTENTION
from trilith.kernels.attention.varlen import VARLEN_ATTENTION
from trilith.plugins import ScoreMod, hookimpl, manager, registry
from trilith.plugins.report import check_score_mod, named_score_mods


@triton.jit
def relative(score, b, h, q, k):
    return score - 0.1 * (h + 2 * b + 1).to(tl.float32) * tl.abs(q - k).to(tl.float32)


@triton.jit
def relative_grad(score, b, h, q, k):
    return 1.0


def relative_reference(score, b, h, q, k):
    return score - 0.1 * (h + 2 * b + 1) * (q - k).abs()


@triton.jit
def bent(score, b, h, q, k):
    """Not linear, and of the position: (1 + k / 64) score + score^2 / 8 where q is odd."""
    slope = 1.0 + k.to(tl.float32) / 64
    return slope * score + tl.where(q % 2 == 1, score * score / 8, 0.0)


@triton.jit
def bent_grad(score, b, h, q, k):
    return 1.0 + k.to(tl.float32) / 64 + tl.where(q % 2 == 1, score / 4, 0.0)


def bent_reference(score, b, h, q, k):
    return (1 + k / 64) * score + torch.where(q % 2 == 1, score * score / 8, 0)


RELATIVE = ScoreMod("tests.relative", relative, relative_grad, relative_reference)
BENT = ScoreMod("tests.bent", bent, bent_grad, bent_reference)


@pytest.fixture(autouse=True)
def plugin():
    class Plugin:
        @hookimpl
        def trilith_register_score_mods(self):
            return [RELATIVE, BENT]

    if RELATIVE.name not in registry.score_mod_names():
        assert manager.add("score-mods", Plugin)


def judged(op, args):
    chosen = differentiable(args)
    q, v = args[0], args[2]
    lse_shape = q.shape[:3] if q.ndim == 4 else (q.shape[1], q.shape[0])
    dout, dlse = randn(*q.shape[:-1], v.shape[-1]), randn(*lse_shape)

    def run(function, kind):
        leaves = [
            a.detach().to(kind).requires_grad_() if i in chosen else a for i, a in enumerate(args)
        ]
        out, lse = function(*leaves)
        wanted = [leaves[i] for i in chosen]
        above = [dout.to(out.dtype), dlse.to(lse.dtype)]
        return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], wanted, above)]

    reference = op.spec.reference
    found = zip(
        run(op, torch.float32),
        run(reference, torch.float64),
        run(reference, torch.float32),
        strict=True,
    )
    for actual, expected, yardstick in found:
        assert_like_eager(actual, expected, yardstick)


def seeded(p=0.3):
    return {"p": p, "seed": torch.tensor([2**35 + 3], device=DEVICE)}


CASES = {
    "alone": ({}, {}),
    "causal": ({}, {"right": 0}),
    "window": ({}, {"alignment": "bottom_right", "left": 9, "right": 4}),
    "grouped": ({"H": 4, "Hkv": 2}, {"right": 0}),
    "dropout": ({}, seeded),
    "softcap": ({}, {"softcap": 1.5, "scale": -0.4}),
    "wide": ({"D": 130, "B": 1, "H": 1}, {"right": 0}),
    "terms": (
        {},
        lambda: {
            "bias": randn(1, 2, 35, 43),
            "key_mask": torch.rand(2, 43, device=DEVICE) > 0.3,
            "slopes": randn(1, 2).abs() / 8,
            "sinks": randn(2),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_with_other_features(case):
    shape, given = CASES[case]
    given = given() if callable(given) else given
    judged(ATTENTION, [*call(*qkv(35, 43, **shape), **given), BENT.name, "ieee"])


def test_packed_sequences_count_from_their_own_start():
    judged(VARLEN_ATTENTION, [*varlen_call(*packed(), right=0, **seeded()), BENT.name, "ieee"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_a_relative_bias_is_the_bias_that_it_says(dtype):
    q, k, v = qkv(35, 43, dtype=dtype)
    rows, cols = (torch.arange(n, device=DEVICE) for n in (35, 43))
    share = torch.tensor([[1, 2], [3, 4]], device=DEVICE)[..., None, None]
    bias = -0.1 * share * (rows[:, None] - cols).abs()
    dout = torch.randn_like(q)

    def results(dtype, **given):
        own = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*own, causal="top_left", **given)
        return [out, *torch.autograd.grad(out, own, dout.to(dtype))]

    found, biased = results(dtype, score_mod=RELATIVE.name), results(dtype, bias=bias)
    exact = results(torch.float64, bias=bias.double())
    for actual, expected, other in zip(found, exact, biased, strict=True):
        assert_like_eager(actual, expected, other)


def test_double_backward_and_double_precision_take_the_reference():
    args = [t.double().requires_grad_() for t in qkv(3, 4, D=2, B=1)]
    function = lambda *t: attention(*t, score_mod="tests.bent")  # noqa: E731
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


def test_compiles_without_a_break():
    q, k, v = (t.requires_grad_() for t in qkv(33, 33))
    function = lambda *t: attention(*t, score_mod="tests.bent", causal=True)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), function(q, k, v))


def test_a_wrong_name_is_told_what_is_registered():
    q, k, v = qkv(3, 4)
    with pytest.raises(ValueError, match=r"score_mod.*tests\.bent.*got 'tests\.bend'"):
        attention(q, k, v, score_mod="tests.bend")
    packed_q = packed()
    with pytest.raises(ValueError, match=r"varlen_attention: score_mod.*tests\.relative"):
        varlen_attention(*packed_q, starts(QUERIES), starts(KEYS), score_mod="relative")


@pytest.mark.parametrize("name", ["relative", "", "a..b"])
def test_a_name_has_a_vendor(name):
    with pytest.raises(ValueError, match="must be 'vendor.name'"):
        ScoreMod(name, relative, relative_grad, relative_reference)


def test_the_checks_find_a_wrong_derivative():
    wrong = ScoreMod("tests.wrong", bent, relative_grad, bent_reference)

    class Plugin:
        @hookimpl
        def trilith_register_score_mods(self):
            return [wrong]

    if wrong.name not in registry.score_mod_names():
        assert manager.add("wrong-mod", Plugin)
    rows = check_score_mod(wrong)
    assert not next(rows).reason
    assert next(rows).reason
    assert named_score_mods(manager, "wrong-mod") == [wrong]
