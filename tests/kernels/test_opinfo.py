"""PyTorch's own sample inputs: the same results, and errors of the same kind.

float32 runs the kernels (in Triton's interpreter, or on the GPU), float64 the reference. What is
compared here is what arguments mean; how exact results are is each function's own tests' business.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.devices import DEVICE
from trilith import kernels
from trilith.blocks import drop_in

common = pytest.importorskip("torch.testing._internal.common_methods_invocations")

OPS = {op.name: op for op in common.op_db if not op.variant_test_name}
MOST_ELEMENTS = 1024


def module(name: str, *parameters: str) -> Callable[..., Any]:
    """The drop-in as a function: every option that torch's has, which its kernel may not."""

    def call(x, *args, **kwargs):
        options = dict(zip(parameters, args, strict=False)) | kwargs
        training = options.pop("training", True)
        return getattr(drop_in, name)(**options).train(training)(x)

    return call


FUNCTIONS = {
    "nn.functional.layer_norm": kernels.layer_norm,
    "nn.functional.rms_norm": kernels.rms_norm,
    "nn.functional.cross_entropy": kernels.cross_entropy,
    "nn.functional.scaled_dot_product_attention": kernels.scaled_dot_product_attention,
    "nn.functional.dropout": module("Dropout", "p", "training", "inplace"),
    "nn.functional.gelu": module("GELU"),
    "nn.functional.silu": module("SiLU", "inplace"),
    "nn.functional.relu": module("ReLU", "inplace"),
    "nn.functional.elu": module("ELU", "alpha", "inplace"),
    "nn.functional.leaky_relu": module("LeakyReLU", "negative_slope", "inplace"),
    "sigmoid": module("Sigmoid"),
    "tanh": module("Tanh"),
}
for torch_name, name in {
    "softmax": "softmax",
    "nn.functional.binary_cross_entropy_with_logits": "binary_cross_entropy_with_logits",
    "nn.functional.mse_loss": "mse_loss",
    "nn.functional.batch_norm": "batch_norm",
}.items():
    if name in kernels.__all__:
        FUNCTIONS[torch_name] = getattr(kernels, name)
functions = pytest.mark.parametrize("name", FUNCTIONS)


def is_random(name, sample):
    if name.endswith("dropout"):
        return sample.kwargs.get("training", True) and sample.kwargs.get("p", 0.5) not in (0, 1)
    return sample.kwargs.get("dropout_p", 0.0) > 0


def small(sample):
    """Large samples are thinned out of the interpreter's run."""
    tensors = [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]
    return all(t.numel() <= MOST_ELEMENTS for t in tensors)


def gradients(outcome, tensors):
    outputs = outcome if isinstance(outcome, (tuple, list)) else [outcome]
    outputs = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    wanted = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    if not outputs or not wanted:
        return []
    weights = [torch.full_like(o, 0.5) for o in outputs]
    return torch.autograd.grad(outputs, wanted, weights, allow_unused=True)


def fresh(sample):
    """The sample with tensors of its own, for functions that write to one (running statistics)."""

    def own(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    kwargs = {key: own(value) for key, value in sample.kwargs.items()}
    return own(sample.input), [own(a) for a in sample.args], kwargs


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_samples_give_torchs_results_and_gradients(name, dtype):
    random.seed(0)
    op, compared = OPS[name], 0
    for sample in op.sample_inputs(DEVICE, dtype, requires_grad=True):
        if is_random(name, sample) or (dtype == torch.float32 and not small(sample)):
            continue
        results = []
        for function in (FUNCTIONS[name], op.op):
            x, args, kwargs = fresh(sample)
            out = function(x, *args, **kwargs)
            results.append((out, gradients(out, [x, *args, *kwargs.values()])))
        compared += 1
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
        try:
            torch.testing.assert_close(*results, **close, equal_nan=True)
        except AssertionError as error:
            raise AssertionError(f"{sample}: {error}") from None
    assert compared


@functions
def test_random_samples_have_torchs_shape_and_dtype(name):
    op = OPS[name]
    for sample in op.sample_inputs(DEVICE, torch.float32):
        if not (is_random(name, sample) and small(sample)):
            continue
        x, args, kwargs = fresh(sample)
        ours = FUNCTIONS[name](x, *args, **kwargs)
        theirs = op.op(x, *args, **kwargs)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@functions
def test_errors_are_of_torchs_kind(name):
    op = OPS[name]
    if op.error_inputs_func is None:
        pytest.skip("torch has no error inputs for it")
    for error in op.error_inputs(DEVICE):
        kinds = []
        for function in (op.op, FUNCTIONS[name]):
            x, args, kwargs = fresh(error.sample_input)
            try:
                kinds.append((type(None), function(x, *args, **kwargs)))
            except Exception as caught:  # noqa: BLE001
                assert str(caught)
                kinds.append((type(caught), caught))
        assert issubclass(kinds[1][0], error.error_type) or kinds[1][0] is kinds[0][0], kinds
