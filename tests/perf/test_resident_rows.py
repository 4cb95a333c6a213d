"""The longest rows that a program keeps on chip are read once: a lower threshold reads them twice.

The lengths are those that the kernels were measured to hold without spills, in bf16.
"""

import pytest
import torch

from perf.meters.traffic import traffic
from tests.support.devices import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts loads and stores by interpreting")

# name -> the workload of M rows of N, the longest such rows forward, and backward.
LONGEST = {
    "softmax": (lambda w, *size: w.softmax(*size), 16384, 8192),
    "log_softmax": (lambda w, *size: w.softmax(*size, log=True), 16384, 8192),
    "layer_norm": (lambda w, *size: w.layer_norm(*size), 16384, 8192),
    "rms_norm": (lambda w, *size: w.rms_norm(*size), 16384, 8192),
    "add_norm": (lambda w, *size: w.add_norm(*size), 16384, 8192),
    "add_norm, dropout": (lambda w, *size: w.add_norm(*size, p=0.1), 16384, 4096),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", LONGEST)
def test_a_row_is_read_once(name, direction):
    from perf import counting

    make, *longest = LONGEST[name]
    n = longest[direction == "backward"]
    short, long = (requests(make(counting, 1, size), direction) for size in (1024, n))
    assert long <= 1.01 * short
    assert (
        requests(make(counting, 1, 2 * n), direction) > 1.1 * short
    )  # else `n` is not the longest


def requests(workload, direction):
    """Bytes that one row's program asks for, over the least."""
    from perf.oracle import gradient_for, leaves, seeded_arguments

    args = seeded_arguments(workload, torch.device("cpu"), torch.bfloat16)
    with traffic() as forward:
        out = workload.trilith(*args)
    if direction == "forward":
        return forward.requested / workload.cost(*args).forward_bytes
    with traffic() as backward:
        torch.autograd.grad(out, leaves(args), gradient_for(out))
    return backward.requested / workload.cost(*args).backward_bytes
