"""How many binaries a kernel is compiled to as sizes change: each costs a user seconds."""

import pytest
import torch

from perf.meters.specialisations import specialisations
from tests.support.devices import INTERPRETING
from trilith.kernels._runtime.language import tl, triton
from trilith.kernels._runtime.launch import launch

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


@triton.jit
def _fill_kernel(x_ptr, strides, n, value, BLOCK: tl.constexpr):
    """One program owns n elements."""
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at * strides[1], value, mask=at < n)


def filled(x=None, strides=(16, 1), n=2, value=0.5, block=4, **options):
    x = torch.empty(16) if x is None else x
    launch(_fill_kernel, (1,), x, strides, n, value, BLOCK=block, **options)


def binaries(*calls):
    with specialisations() as keys:
        for options in calls:
            filled(**options)
    assert set(keys) == {"_fill_kernel"}
    return len(keys["_fill_kernel"])


def test_what_triton_compiles_once_is_one_binary():
    same = ({"n": 3}, {"n": 5}, {"value": 2.5}, {"strides": (32, 1)}, {"x": torch.zeros(16)})
    assert binaries({}, *same) == 1
    assert binaries({"n": 16}, {"n": 32}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"n": 1},
        {"n": 16},
        {"value": 2},
        {"strides": (1, 1)},
        {"strides": (17, 1)},
        {"block": 8},
        {"num_warps": 8},
        {"x": torch.empty(16, dtype=torch.float16)},
        {"x": torch.empty(17)[1:]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_triton_compiles_anew_is_a_binary_more(other):
    assert binaries({}, other) == 2
