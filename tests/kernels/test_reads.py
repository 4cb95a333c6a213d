"""No kernel reads outside of its tensors, also where what it reads is of no consequence.

A mask that is too wide for a load gives values that nobody stores, and on a GPU, some day, an
illegal memory access. Seen where Triton's interpreter runs the kernels.
"""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from trilith.plugins import TRITON_DEVICES, registry
from trilith.plugins.conformance.launches import forward_and_backward
from trilith.plugins.conformance.support import bound, provider_of, samples_of

pytestmark = pytest.mark.skipif(
    "cpu" not in TRITON_DEVICES, reason="only Triton's interpreter shows each address"
)


def extents(arguments):
    """Starts and ends of the memory that tensors span, ascending and apart."""
    spans = []
    for tensor in (a for a in arguments if isinstance(a, Tensor) and a.numel()):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        start = tensor.data_ptr()
        spans.append((start, start + (last + 1) * tensor.element_size()))
    apart = []
    for start, end in sorted(spans):
        if apart and start <= apart[-1][1]:
            apart[-1][1] = max(end, apart[-1][1])
        else:
            apart.append([start, end])
    return np.array(apart, dtype=np.int64).reshape(-1, 2).T


@pytest.fixture
def strays():
    """The kernels that read outside of the tensors they were started with, once for each load."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    start, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    found, running = [], []

    def call(executor, *args, **options):
        running[:] = executor.fn.__name__, *extents((*args, *options.values()))
        return start(executor, *args, **options)

    def masked_load(builder, pointers, mask, *rest):
        name, starts, ends = running
        addresses = np.asarray(pointers.data, dtype=np.int64)
        read = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        at = np.searchsorted(starts, read, side="right") - 1
        if read.size and not ((at >= 0) & (read < ends[at])).all():
            found.append(name)
        return load(builder, pointers, mask, *rest)

    with (
        patch.object(GridExecutor, "__call__", call),
        patch.object(InterpreterBuilder, "create_masked_load", masked_load),
    ):
        yield found


@pytest.mark.parametrize("name", registry.op_names("trilith:trilith"))
def test_kernels_read_within_their_tensors(name, strays):
    op = registry.op(name)
    samples = samples_of(op, torch.device("cpu"), torch.float32)
    calls = [args for args in (bound(op, s) for s in samples) if provider_of(op, args) is not None]
    assert calls
    for args in calls:
        forward_and_backward(op, args)
    assert not strays, set(strays)
