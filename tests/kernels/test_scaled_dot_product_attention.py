"""scaled_dot_product_attention is torch's, argument by argument."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from perf.meters.live import live_bytes
from tests.kernels.test_attention import qkv, randn
from tests.support.devices import DEVICE, dtype_name
from trilith.kernels.attention import attention, scaled_dot_product_attention

DROP_IN = {
    "two_dims": (((5, 16), (7, 16), (7, 8)), {}),
    "three_dims": (((3, 5, 16), (3, 7, 16), (3, 7, 8)), {"is_causal": True}),
    "four_dims": (((2, 3, 37, 16), (2, 3, 34, 16), (2, 3, 34, 16)), {"is_causal": True}),
    "five_dims": (((2, 2, 3, 5, 16), (2, 2, 3, 7, 16), (2, 2, 3, 7, 16)), {"mask": (3, 5, 7)}),
    "deep_mask": (
        ((2, 2, 3, 5, 16), (2, 2, 3, 7, 16), (2, 2, 3, 7, 16)),
        {"mask": (2, 1, 1, 5, 7)},
    ),
    "broadcast_batch": (((2, 1, 5, 16), (1, 3, 7, 16), (7, 16)), {}),
    "row_mask": (((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"mask": (5, 1)}),
    "key_mask": (((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"mask": (2, 1, 1, 7)}),
    "grouped": (((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16)), {"enable_gqa": True}),
    "grouped_three_dims": (((4, 5, 16), (1, 7, 16), (1, 7, 16)), {"enable_gqa": True}),
    "scale": (((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16)), {"scale": -0.7}),
}


@pytest.mark.parametrize("masks", ["boolean", "additive"])
@pytest.mark.parametrize("case", DROP_IN)
def test_drop_in_equals_torch(case, masks):
    shapes, given = DROP_IN[case]
    given = dict(given)
    tensors = [randn(*shape).requires_grad_() for shape in shapes]
    mask = None
    if "mask" in given:
        mask = randn(*given.pop("mask"))
        mask = mask > 0 if masks == "boolean" else mask.requires_grad_()
    inputs = [t for t in (*tensors, mask) if t is not None and t.requires_grad]
    expected = F.scaled_dot_product_attention(*(t.double() for t in tensors), wide(mask), **given)
    actual = scaled_dot_product_attention(*tensors, mask, **given)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    weight = randn(*actual.shape)
    pulled = torch.autograd.grad((actual * weight).sum(), inputs)
    for a, e in zip(pulled, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("T", "S"), [(32, 32), (20, 33)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_drop_in_takes_torchs_causal_biases(bias, T, S, compiled):
    q, k, v = (t.requires_grad_() for t in qkv(T, S))
    function = scaled_dot_product_attention
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    out = function(q, k, v, bias(T, S))
    assert type(out) is torch.Tensor
    expected = F.scaled_dot_product_attention(
        *(t.double() for t in (q, k, v)), bias(T, S)._materialize(q.device)
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    weight = randn(*out.shape)
    pulled = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, e in zip(pulled, wanted, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="causal"):
        scaled_dot_product_attention(q, k, v, bias(T, S), is_causal=True)


def wide(mask):
    return mask if mask is None or mask.dtype == torch.bool else mask.double()


DEVIATIONS = {
    "dtypes": lambda q, k, v: ((q, k.double(), v), {}),
    "one_dim": lambda q, k, v: ((q[0, 0, 0], k, v), {}),
    "mask_dtype": lambda q, k, v: ((q, k, v, torch.ones(5, 7, dtype=torch.int32)), {}),
    "mask_shape": lambda q, k, v: ((q, k, v, torch.ones(3, 3)), {}),
    "probability": lambda q, k, v: ((q, k, v, None, 1.5), {}),
    "heads": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {"enable_gqa": True}),
    "head_dims": lambda q, k, v: ((q, k[..., :3], v), {}),
    "no_tensor": lambda q, k, v: ((q, 3, v), {}),
    "integers": lambda q, k, v: ((q.int(), k.int(), v.int()), {}),
}


@pytest.mark.parametrize("deviation", DEVIATIONS)
def test_drop_in_raises_what_torch_raises(deviation):
    q, k, v = qkv(5, 7, H=3)
    args, given = DEVIATIONS[deviation](q, k, v)
    theirs, ours = (  # of torch on a CPU: on a GPU it takes any probability
        tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
        for device in ("cpu", DEVICE)
    )
    with pytest.raises((RuntimeError, TypeError, IndexError)) as torchs:
        F.scaled_dot_product_attention(*theirs, **given)
    with pytest.raises(torchs.type):
        scaled_dot_product_attention(*ours, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_drop_in_never_reads_past_the_values(dtype):
    q, k, v = qkv(5, 7, dtype=dtype)
    with pytest.raises(RuntimeError, match="must have one length, got 7 and 3"):
        scaled_dot_product_attention(q, k, v[:, :, :3])


@pytest.mark.parametrize("mask", [False, True], ids=["plain", "mask"])
def test_grouped_keys_are_not_copied(mask):
    q, k, v = qkv(16, 64, B=1, H=8, Hkv=1)
    bias = randn(1, 1, 16, 64) if mask else None
    with torch.no_grad(), live_bytes() as live:
        out = scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
    rows = out.numel() // out.shape[-1]
    assert live.made <= out.nbytes + 2 * 4 * rows  # lse, in base 2 too


def of_the_gradient(loss, q):
    leaf = q.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.func.grad(loss)(leaf).sum(), leaf)
    return slope


BEYOND_THE_GRADIENT = {
    "forward_mode": lambda loss, q: torch.func.jvp(loss, (q,), (q,))[1],
    "hessian": lambda loss, q: torch.func.hessian(loss)(q),
    "reverse_twice": lambda loss, q: torch.func.jacrev(torch.func.grad(loss))(q),
    "of_a_gradient_by_autograd": of_the_gradient,
    "of_samples": lambda loss, q: torch.vmap(torch.func.hessian(loss))(torch.stack([q, 2 * q])),
}


unbatched = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet")


@pytest.mark.parametrize("function", [attention, scaled_dot_product_attention])
@pytest.mark.parametrize("how", BEYOND_THE_GRADIENT)
def test_transforms_go_beyond_the_gradient(how, function):
    """Of which torch's fused functions have nothing."""
    q, k, v = qkv(5, 7)
    bias = randn(5, 7)

    def loss(q):
        bound = {"bias" if function is attention else "attn_mask": bias.to(q.dtype)}
        return function(q, k.to(q.dtype), v.to(q.dtype), **bound).square().sum()

    def by_hand(q):
        scores = q @ k.double().mT / q.shape[-1] ** 0.5 + bias.double()
        return (scores.softmax(-1) @ v.double()).square().sum()

    take = BEYOND_THE_GRADIENT[how]
    expected = take(by_hand, q.double())
    torch.testing.assert_close(take(loss, q).double(), expected, rtol=1e-4, atol=1e-4)


@unbatched
def test_a_gradient_by_transforms_is_of_torchs_fused_function():
    """In memory that the scores would not fit into."""
    q, k, v = qkv(5, 7)
    with torch.profiler.profile() as profile:
        torch.vmap(torch.func.grad(lambda q: attention(q, k, v).sum()))(torch.stack([q, q]))
    names = {event.key for event in profile.key_averages()}
    assert any(name.startswith("aten::_scaled_dot_product_") for name in names), names
