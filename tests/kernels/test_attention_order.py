"""In which order tiles come: a few heads at a time, and under causality the longest tiles first, so
that short ones fill the end of a launch.
"""

import collections

import pytest
import torch
import torch.nn.functional as F

from tests.support.devices import INTERPRETING
from trilith.kernels._runtime.launch import observers
from trilith.kernels.attention import attention, config, varlen_attention

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts in Triton's interpreter")

LENGTH = 160
KERNELS = {"attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"}


@pytest.fixture
def products(monkeypatch):
    """Of each kernel, by the order in which its programs start: how many products they make."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts, original = collections.defaultdict(collections.Counter), InterpreterBuilder.create_dot
    running = []

    def counted(builder, *args):
        counts[running[-1]][builder.grid_idx[0]] += 1
        return original(builder, *args)

    def observe(kernel, *_):
        running.append(kernel.__name__)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    observers.append(observe)
    yield counts
    observers.remove(observe)


def by_start(counts):
    return [count for _, count in sorted(counts.items())]


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_fill_the_cache_take_turns(together, causal, monkeypatch):
    heads, length, dim = 5, 70 + together, 16
    head_bytes = 2 * length * dim * 4
    monkeypatch.setattr(config, "_CACHE_BYTES", together * head_bytes)
    q, k, v = (torch.randn(1, heads, length, dim, requires_grad=True) for _ in range(3))
    assert config.heads_together(k, v) == together
    wide = [t.double() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=causal)
    out = attention(q, k, v, causal=causal)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, (q, k, v), dout.double())
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), dout), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_of_equal_lengths(products):
    q, k, v = (torch.randn(1, 2, LENGTH, 16, requires_grad=True) for _ in range(3))
    attention(q, k, v, causal=True).sum().backward()
    assert products.keys() == KERNELS
    for kernel in KERNELS:
        found = by_start(products[kernel])
        assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1], kernel


def test_of_each_packed_sequence(products):
    q, k, v = (torch.randn(2 * LENGTH, 1, 16, requires_grad=True) for _ in range(3))
    starts = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
    varlen_attention(q, k, v, starts, starts, causal=True).sum().backward()
    assert products.keys() == KERNELS
    for kernel in KERNELS:
        found = by_start(products[kernel])
        half = len(found) // 2
        assert found[:half] == found[half:] == sorted(found[:half], reverse=True), kernel
        assert found[0] > 2 * found[half - 1], kernel
