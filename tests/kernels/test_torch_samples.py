"""torch's own sample inputs and error inputs, run through the functions of the same names."""

import sys
import types
from unittest import TestCase

import pytest
import torch

from tests.support.compare import assert_one_rounding
from tests.support.devices import DEVICE
from trilith import kernels

NAMES = {
    "nn.functional.batch_norm": "batch_norm",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
    "nn.functional.binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "nn.functional.mse_loss": "mse_loss",
}
LOSSES = ("nn.functional.binary_cross_entropy_with_logits", "nn.functional.mse_loss")


@pytest.fixture(scope="module")
def op_infos():
    if "expecttest" not in sys.modules:  # torch's test cases derive from it; none is run here
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = TestCase
        sys.modules["expecttest"] = stand_in
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:
        pytest.skip(f"torch's samples need {error.name}")
    return [info for info in op_db if info.name in NAMES]


def floating(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def loss_in_float64(op, sample):
    """The loss of a sample, and that of its terms' magnitudes: rounding errs in these."""

    def wide(value):
        return value.detach().cpu().double() if isinstance(value, torch.Tensor) else value

    given = [wide(value) for value in (sample.input, *sample.args)]
    options = {name: wide(value) for name, value in sample.kwargs.items()}
    terms = op(*given, **options | {"reduction": "none"})
    reduce = torch.sum if options.get("reduction") == "sum" else torch.mean
    return op(*given, **options), reduce(terms.abs())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_samples(op_infos, name):
    count = 0
    for info in (i for i in op_infos if i.name == name):
        function = getattr(kernels, NAMES[name])
        for sample in info.sample_inputs(DEVICE, torch.float32, requires_grad=True):
            call = (sample.input, *sample.args)
            results = []
            for run in (function, info.op):
                torch.manual_seed(0)
                copies = [
                    a.detach().clone().requires_grad_(a.requires_grad)
                    if isinstance(a, torch.Tensor)
                    else a
                    for a in call
                ]
                out = run(*copies, **sample.kwargs)
                upstream = torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out)
                wanted = floating(copies)
                results.append((out, *torch.autograd.grad(out, wanted, upstream)))
            ours, theirs = results
            if out.dim() == 0 and name in LOSSES:
                total, size = loss_in_float64(info.op, sample)
                assert_one_rounding(ours[0].detach(), total, scale=size)
                ours, theirs = ours[1:], theirs[1:]
            for a, e in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, e, equal_nan=True, msg=f"{name} {sample}")
            count += 1
    assert count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_error_inputs(op_infos, name):
    for info in (i for i in op_infos if i.name == name and i.error_inputs_func):
        for bad in info.error_inputs(DEVICE):
            sample = bad.sample_input
            with pytest.raises(bad.error_type):
                getattr(kernels, NAMES[name])(sample.input, *sample.args, **sample.kwargs)
