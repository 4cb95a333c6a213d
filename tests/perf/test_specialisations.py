"""How many binaries a kernel is compiled to as sizes change: each costs a user seconds."""

import pytest
import torch

from perf.meters.specialisations import specialisations
from tests.support.devices import INTERPRETING

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts in Triton's interpreter")

# name -> the most that one kernel has in 20 sizes: tiles are powers of two, and Triton tells sizes
# that 16 divides from others.
MOST = {
    "layer_norm": 2,
    "rms_norm": 2,
    "bias_act": 4,
    "gated_act": 3,
    "dropout": 3,
    "bias_dropout_add": 4,
    "cross_entropy": 2,
    "rotary": 8,
    "attention": 3,
}


@pytest.mark.parametrize("name", MOST)
def test_sizes_share_binaries(name):
    from perf.counting import COMPILED, SIZES
    from perf.oracle import gradient_for, leaves, seeded_arguments

    with specialisations() as keys:
        for size in SIZES:
            workload = COMPILED[name](size)
            args = seeded_arguments(workload, torch.device("cpu"), torch.float32)
            out = workload.trilith(*args)
            torch.autograd.grad(out, leaves(args), gradient_for(out))
    assert max(map(len, keys.values())) <= MOST[name]


def test_every_function_that_is_compiled_is_held():
    from perf.counting import COMPILED

    assert set(COMPILED) == set(MOST)
