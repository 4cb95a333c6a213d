"""Dropout's random bits at positions that no test's tensor reaches."""

import pytest
import torch

from tests.support.devices import DEVICE, INTERPRETING
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.random import _philox, _uniform, keep_mask


@triton.jit
def _mask_kernel(seed_ptr, first_ptr, kept_ptr, p, QUADS: tl.constexpr):
    quads = tl.load(first_ptr) + tl.arange(0, QUADS)
    kept = keep_mask(seed_ptr, quads, p)
    tl.store(kept_ptr + tl.arange(0, 4 * QUADS), kept.to(tl.int8))


@pytest.mark.skipif(not (INTERPRETING or DEVICE == "cuda"), reason="needs Triton")
@pytest.mark.parametrize("first", [0, 2**31 - 8, 2**32 - 8, 2**40 + 3])
def test_the_mask_is_the_references_beyond_32_bits(first):
    seed = torch.tensor([2**40 + 7], device=DEVICE)
    kept = torch.empty(64, dtype=torch.int8, device=DEVICE)
    _mask_kernel[(1,)](seed, torch.tensor([first], device=DEVICE), kept, 0.3, QUADS=16)
    quads = first + torch.arange(16, device=DEVICE)
    expected = _uniform(torch.stack(_philox(seed, quads), dim=-1)).flatten() >= 0.3
    assert torch.equal(kept.bool(), expected)
