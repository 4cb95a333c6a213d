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

LINEAR_CROSS_ENTROPY = "nn.functional.linear_cross_entropy"
OPS = {op.name: op for op in common.op_db if not op.variant_test_name}
OPS |= {
    f"{op.name}.{op.variant_test_name}": op
    for op in common.op_db
    if op.variant_test_name and op.name == LINEAR_CROSS_ENTROPY
}
MOST_ELEMENTS = 1024


def module(name: str, *parameters: str) -> Callable[..., Any]:
    """The drop-in as a function: every option that torch's has, which its kernel may not."""

    def call(x, *args, **kwargs):
        options = dict(zip(parameters, args, strict=False)) | kwargs
        training = options.pop("training", True)
        return getattr(drop_in, name)(**options).train(training)(x)

    return call


def without_options(*args, options=None, **kwargs):
    """Torch's options say how the loss is chunked, and change nothing that it gives."""
    return kernels.linear_cross_entropy(*args, **kwargs)


FUNCTIONS = {
    "nn.functional.layer_norm": kernels.layer_norm,
    "nn.functional.rms_norm": kernels.rms_norm,
    "nn.functional.cross_entropy": kernels.cross_entropy,
    "nn.functional.scaled_dot_product_attention": kernels.scaled_dot_product_attention,
    LINEAR_CROSS_ENTROPY: kernels.linear_cross_entropy,
    f"{LINEAR_CROSS_ENTROPY}.chunked": without_options,
    f"{LINEAR_CROSS_ENTROPY}.chunked_none": without_options,
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
NOT_HERE = pytest.mark.skip(f"torch {torch.__version__} has no such function")
functions = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OPS else NOT_HERE) for name in FUNCTIONS]
)

# Where ours says no otherwise, by torch's words: shapes are a ValueError, as in all our functions.
OTHER_ERRORS = {
    LINEAR_CROSS_ENTROPY: {
        "expected input with dimensionality 1 or 2": ValueError,  # ours: only that target's is off
        "expected linear_weight with dimensionality at least 2": ValueError,
        "expected equal input and linear_weight last dimensions": ValueError,
        "requires batched input": ValueError,
        "expected linear_bias shape": ValueError,
    }
}


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
@pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_dropout_itself_keeps_and_scales_torchs_samples(dtype):
    """Exactly torch's where nothing is drawn; else 1 - p of the elements, divided by 1 - p."""
    exact, seen = 0, {}
    torch.manual_seed(3)
    for sample in OPS["nn.functional.dropout"].sample_inputs(DEVICE, dtype, requires_grad=True):
        x, _, kwargs = fresh(sample)
        p = kwargs.get("p", 0.5)
        out = kernels.dropout(x, **kwargs)
        if is_random("dropout", sample):
            slope = gradients(out, [x])[0] * 2
            counted = x != 0
            kept = counted & (out != 0)
            torch.testing.assert_close(out, torch.where(kept, x / (1 - p), 0.0))
            torch.testing.assert_close(slope[counted], kept[counted] / (1 - p), check_dtype=False)
            number, of = seen.get(p, (0, 0))
            seen[p] = (number + int(kept.sum()), of + int(counted.sum()))
        else:
            exact += 1
            expected = torch.nn.functional.dropout(theirs := fresh(sample)[0], **kwargs)
            assert torch.equal(out, expected)
            assert torch.equal(gradients(out, [x])[0], gradients(expected, [theirs])[0])
    assert exact and seen
    for p, (kept, of) in seen.items():
        assert abs(kept - (1 - p) * of) <= 4 * (p * (1 - p) * of) ** 0.5, (p, kept, of)


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
        allowed = (error.error_type, kinds[0][0], *other_errors(name, str(kinds[0][1])))
        assert issubclass(kinds[1][0], allowed), kinds


def other_errors(name, message):
    known = OTHER_ERRORS.get(name.partition(".chunked")[0], {})
    return [kind for words, kind in known.items() if words in message]


def test_linear_cross_entropys_deviations_from_torch_are_those_it_names():
    """No `options`; more leading dimensions; probabilities told by dtype, with any ignore_index."""
    loss = kernels.linear_cross_entropy
    x, head = torch.randn(2, 3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    labels = torch.randint(5, (2, 3), device=DEVICE)
    with pytest.raises(TypeError, match="options"):
        loss(x[0], head, labels[0], options=None)
    torch.testing.assert_close(loss(x, head, labels), loss(x.view(6, 4), head, labels.view(6)))
    with pytest.raises(ValueError, match="input"):
        loss(x, head[:, None], labels[..., None])
    probabilities = torch.rand(2, 3, 5, device=DEVICE)
    expected = loss(x, head, probabilities)
    assert torch.equal(loss(x, head, probabilities, ignore_index=-1), expected)
    with pytest.raises(RuntimeError, match="int32"):
        loss(x, head, probabilities.int())
