"""Dropout's random bits at positions that no test's tensor reaches."""

import pytest
import torch

from tests.support.devices import DEVICE, INTERPRETING
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.random import keep_mask, reference_keep_mask

LOW = 2**32 - 1


@triton.jit
def _mask_kernel(seed_ptr, first_ptr, kept_ptr, p, QUADS: tl.constexpr):
    quads = tl.load(first_ptr) + tl.arange(0, QUADS)
    kept = keep_mask(seed_ptr, quads, p)
    tl.store(kept_ptr + tl.arange(0, 4 * QUADS), kept.to(tl.int8))


def signed(bits):
    return bits - 2**32 if bits >= 2**31 else bits


def philox(counter, key):
    """Philox-4x32-7 of a 128-bit counter and a 64-bit key, by its paper, in Python's integers."""
    words = [counter >> shift & LOW for shift in (0, 32, 64, 96)]
    keys = [key & LOW, key >> 32 & LOW]
    for _ in range(7):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (second >> 32) ^ words[1] ^ keys[0], second & LOW,
            (first >> 32) ^ words[3] ^ keys[1], first & LOW,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & LOW, (keys[1] + 0xBB67AE85) & LOW]
    return words


@pytest.mark.skipif(not (INTERPRETING or DEVICE == "cuda"), reason="needs Triton")
@pytest.mark.parametrize("first", [0, 2**31 - 8, 2**32 - 8, 2**40 + 3])
@pytest.mark.parametrize("p", [0.3, 0.5, 1e-11, 1 - 2**-24, 1.0])
def test_the_mask_is_philoxs_beyond_32_bits(first, p):
    seed = torch.tensor([2**40 + 7], device=DEVICE)
    kept = torch.empty(64, dtype=torch.int8, device=DEVICE)
    _mask_kernel[(1,)](seed, torch.tensor([first], device=DEVICE), kept, p, QUADS=16)
    numbers = [signed(bits) for quad in range(16) for bits in philox(first + quad, 2**40 + 7)]
    as_single = torch.tensor(p, dtype=torch.float32).item()
    expected = [(number + 2**31) / 2**32 >= as_single for number in numbers]
    assert kept.bool().tolist() == expected


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_share_of_p_is_dropped(p):
    """Within five standard deviations; all of them, and none, at the ends."""
    n = 200_000
    kept = reference_keep_mask(torch.tensor([7]), (10, n // 10), p).sum().item()
    assert abs(kept - (1 - p) * n) <= 5 * (n * p * (1 - p)) ** 0.5
