"""torch's flash attention ops on our kernels: values, gradients, and coming and going."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
)

import trilith
from tests.kernels.test_attention import qkv, randn
from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE
from trilith.kernels.attention import attention, torch_flash

OP = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def active():
    handle = torch_flash.Active("CUDA" if DEVICE == "cuda" else "CPU")
    yield
    handle.remove()


@pytest.mark.parametrize("Hkv", [2, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_op_is_attention(active, dtype, is_causal, Hkv):
    T, S = (33, 33) if is_causal else (33, 20)
    q = randn(2, T, 2, 16, dtype=dtype).transpose(1, 2).requires_grad_()
    k, v = (randn(2, Hkv, S, 16, dtype=dtype).requires_grad_() for _ in "kv")
    out, lse, *_ = OP(q, k, v, 0.0, is_causal, False, scale=0.3)
    weight = randn(*out.shape, dtype=dtype)
    found = torch.autograd.grad(out, (q, k, v), weight)
    ours, our_lse = attention(q, k, v, causal=is_causal, scale=0.3, return_lse=True)
    yardstick = torch.autograd.grad(ours, (q, k, v), weight)
    assert torch.equal(out, ours) and torch.equal(lse, our_lse)
    assert out.stride() == q.stride()
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out64 = attention(*wide, causal=is_causal, scale=0.3)
    expected = torch.autograd.grad(out64, wide, weight.double())
    for a, e, y in zip(found, expected, yardstick, strict=True):
        assert_like_eager(a, e, y)  # the lse comes back as a natural logarithm, rounded as one


def test_dropout_of_backward_is_that_of_forward(active):
    given = qkv(17, 20, dtype=torch.float16)
    results = []
    for function, dtype in (
        (lambda *t: OP(*t, 0.4)[0], torch.float16),
        (lambda *t: attention(*t, dropout_p=0.4), torch.float64),
        (lambda *t: attention(*t, dropout_p=0.4), torch.float16),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        torch.manual_seed(3)
        out = function(*leaves)
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        results.append((out.detach(), *gradients))
    for a, e, y in zip(*results, strict=True):
        assert_like_eager(a, e, y)


def test_shapes_are_those_that_torch_expects(active):
    given = [t.requires_grad_() for t in qkv(17, 20, dtype=torch.float16)]
    real, fake = OP(*given), OP(*(t.to("meta") for t in given))
    for r, f in zip(real, fake, strict=True):
        if isinstance(f, torch.Tensor) and f.numel():
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def as_heads_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("lay_out", [torch.clone, as_heads_first], ids=["BHTD", "BTHD"])
def test_gradients_lie_as_torch_expects(active, lay_out):
    given = [lay_out(t).requires_grad_() for t in qkv(17, 20, dtype=torch.float16)]
    strides = []
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode:
            out = OP(*given)[0]
            found = torch.autograd.grad(out, given, torch.ones_like(out))
        strides.append([t.stride() for t in found])
    assert strides[0] == strides[1]


def test_it_comes_by_name_and_goes():
    trilith.register_flash_attention()
    trilith.register_flash_attention()
    assert "trilith" in list_flash_attention_impls()
    activate_flash_attention_impl("trilith")
    assert current_flash_attention_impl() == "trilith"
    restore_flash_attention_impl()
    assert current_flash_attention_impl() is None
    handle = torch_flash.Active("CPU")
    handle.remove()
    handle.remove()
    with pytest.raises(NotImplementedError):
        OP(*(t.cpu() for t in qkv(3, 3, dtype=torch.float16)))
