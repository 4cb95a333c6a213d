"""What a slower function turns red: the figures that the gate holds, on small shapes."""

from dataclasses import replace

import pytest

from perf import gate
from tests.support.devices import INTERPRETING
from trilith import kernels

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts loads and stores by interpreting")


@pytest.fixture(scope="module")
def counting():
    from perf import counting

    return counting


def as_copied(x):
    return kernels.softmax(x.contiguous())


def with_more_saved(x):
    return kernels.softmax(x) * x.detach().exp().mean()


def twice(x):
    kernels.softmax(x)
    return kernels.softmax(x)


@pytest.mark.parametrize(
    ("slower", "figure"),
    [
        (as_copied, "forward launches, strided"),
        (with_more_saved, "saved / minimal"),
        (twice, "forward requests / minimal"),
        (twice, "forward launches"),
    ],
)
def test_a_slower_function_is_seen(counting, slower, figure):
    workload = counting.softmax(16, 256)
    before = counting.count_op(workload)
    after = counting.count_op(replace(workload, trilith=slower))
    worse = [c for c in gate.changes({"op": before}, {"op": after}) if c.is_worse]
    assert figure in {change.figure for change in worse}


def test_names_choose_what_is_counted(counting):
    names = list(counting.subjects(["rotary", "gpt block"]))
    assert {"gpt block", "gpt block under torch.compile", "rotary under torch.compile"} <= {*names}
    assert not [name for name in names if "softmax" in name]
