"""The products that attention makes are those of the keys that are there, not of the room."""

import pytest
import torch

from perf.meters.arithmetic import arithmetic
from tests.support.devices import INTERPRETING
from trilith.kernels import decode_attention, varlen_attention

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts products by interpreting")

ROOM = 512


def decoded(length, **options):
    q, k, v = (torch.randn(1, 2, n, 16) for n in (1, ROOM, ROOM))
    with arithmetic() as done:
        decode_attention(q, k, v, torch.tensor([length]), **options)
    return done.products


def test_decoding_makes_products_of_the_keys_that_are_stored():
    assert decoded(ROOM // 4) == decoded(ROOM) / 4 > 0


def test_decoding_in_a_window_makes_products_of_the_keys_in_it():
    assert decoded(ROOM, window=(ROOM // 4 - 1, 0)) <= decoded(ROOM) / 4


def test_packed_sequences_do_not_attend_to_each_other():
    def packed(*lengths):
        q, k, v, above = torch.randn(4, sum(lengths), 1, 16).unbind()
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        with arithmetic() as done:
            out = varlen_attention(*leaves, ends, ends)
            torch.autograd.grad(out, leaves, above)
        return done.products

    assert packed(64, 64, 64, 64) <= packed(256) / 4
