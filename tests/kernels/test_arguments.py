"""What every public function asks of its arguments: each tensor that must be there, by name."""

import inspect

import pytest
import torch

from tests.support.devices import DEVICE
from trilith import kernels

NO_FUNCTIONS_OF_TENSORS = {"launch", "planned"}


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


def integers(*values):
    return torch.tensor(values, device=DEVICE)


HEADS = {name: randn(1, 2, 4, 16) for name in "qkv"}
CALLS = {
    "add_layer_norm": {"x": randn(2, 4), "residual": randn(2, 4)},
    "add_rms_norm": {"x": randn(2, 4), "residual": randn(2, 4)},
    "attention": HEADS,
    "attention_qkvpacked": {"qkv": randn(1, 4, 6, 16)},
    "batch_norm": {
        "input": randn(3, 4),
        "running_mean": None,
        "running_var": None,
        "training": True,
    },
    "bias_act": {"x": randn(2, 4)},
    "bias_act_linear": {"x": randn(2, 4), "bias": None, "weight": randn(3, 4)},
    "bias_dropout_add": {"x": randn(2, 4), "residual": randn(2, 4)},
    "binary_cross_entropy_with_logits": {"input": randn(2, 4), "target": randn(2, 4).sigmoid()},
    "cross_entropy": {"input": randn(2, 4), "target": integers(1, 3)},
    "decode_attention": {
        "q": randn(1, 2, 1, 16),
        "k_cache": randn(1, 2, 2, 16),  # heads and places, or places of a block and heads
        "v_cache": randn(1, 2, 2, 16),
        "cache_lengths": integers(2),
    },
    "dropout": {"input": randn(2, 4)},
    "gated_act": {"gate": randn(2, 4), "up": randn(2, 4)},
    "gated_act_linear": {"gate": randn(2, 4), "up": randn(2, 4), "weight": randn(3, 4)},
    "layer_norm": {"input": randn(2, 4), "normalized_shape": (4,)},
    "layer_norm_linear": {
        "x": randn(2, 4),
        "norm_weight": None,
        "norm_bias": None,
        "weight": randn(3, 4),
    },
    "linear_cross_entropy": {
        "input": randn(2, 4),
        "linear_weight": randn(3, 4),
        "target": integers(1, 2),
    },
    "log_softmax": {"input": randn(2, 4)},
    "merge_attention": {"outputs": randn(2, 3, 4), "lses": randn(2, 3)},
    "mse_loss": {"input": randn(2, 4), "target": randn(2, 4)},
    "rms_norm": {"input": randn(2, 4), "normalized_shape": (4,)},
    "rms_norm_linear": {"x": randn(2, 4), "norm_weight": None, "weight": randn(3, 4)},
    "rotary": {"x": randn(1, 2, 4, 16), "cos": randn(4, 8), "sin": randn(4, 8)},
    "rotary_qkvpacked": {"qkv": randn(1, 4, 6, 16), "cos": randn(4, 8), "sin": randn(4, 8)},
    "scaled_dot_product_attention": {
        "query": randn(2, 4, 16),
        "key": randn(2, 4, 16),
        "value": randn(2, 4, 16),
    },
    "softmax": {"input": randn(2, 4)},
    "varlen_attention": {
        **{name: randn(4, 2, 16) for name in "qkv"},
        "cu_seqlens_q": integers(0, 4),
        "cu_seqlens_k": integers(0, 4),
    },
}


def test_every_public_function_is_here():
    functions = {n for n in kernels.__all__ if inspect.isfunction(getattr(kernels, n))}
    assert functions - NO_FUNCTIONS_OF_TENSORS == set(CALLS)


REQUIRED = [
    (name, argument)
    for name, given in CALLS.items()
    for argument, value in given.items()
    if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize("value", [None, [1.0, 2.0]], ids=["None", "list"])
@pytest.mark.parametrize(("name", "argument"), REQUIRED)
def test_what_is_no_tensor_is_named(name, argument, value):
    function, given = getattr(kernels, name), CALLS[name]
    function(**given)
    if name == "merge_attention" and value is not None:
        pytest.skip("takes a list of tensors")
    with pytest.raises(TypeError, match=rf"^{name}.*{argument}\b.* must be .*[tT]ensor"):
        function(**{**given, argument: value})


NUMBERS = {"momentum", "num_items"}  # which a tensor may hold
# The tensors that may be left out.
OPTIONAL = {
    "add_layer_norm": {"weight": randn(4), "bias": randn(4)},
    "add_rms_norm": {"weight": randn(4)},
    "attention": {
        "bias": randn(4, 4),
        "alibi_slopes": randn(2),
        "sinks": randn(2),
        "key_padding_mask": integers([1, 1, 1, 1]).bool(),
    },
    "attention_qkvpacked": {
        "bias": randn(4, 4),
        "alibi_slopes": randn(2),
        "sinks": randn(2),
        "key_padding_mask": integers([1, 1, 1, 1]).bool(),
    },
    "batch_norm": {name: randn(4) for name in ("running_mean", "running_var", "weight", "bias")},
    "bias_act": {"bias": randn(4)},
    "bias_act_linear": {"bias": randn(4), "out_bias": randn(3)},
    "bias_dropout_add": {"bias": randn(4)},
    "binary_cross_entropy_with_logits": {"weight": randn(4), "pos_weight": randn(4)},
    "cross_entropy": {"weight": randn(4)},
    "decode_attention": {
        "block_table": integers([0]).int(),
        "alibi_slopes": randn(2),
        "sinks": randn(2),
    },
    "gated_act_linear": {"bias": randn(3)},
    "layer_norm": {"weight": randn(4), "bias": randn(4)},
    "layer_norm_linear": {
        **{name: randn(4) for name in ("norm_weight", "norm_bias")},
        "bias": randn(3),
        "residual": randn(2, 4),
    },
    "linear_cross_entropy": {"linear_bias": randn(3), "weight": randn(3)},
    "mse_loss": {"weight": randn(2, 4)},
    "rms_norm": {"weight": randn(4)},
    "rms_norm_linear": {"norm_weight": randn(4), "bias": randn(3), "residual": randn(2, 4)},
    "scaled_dot_product_attention": {"attn_mask": randn(4, 4)},
    "varlen_attention": {"bias": randn(1, 1, 4, 4), "alibi_slopes": randn(2), "sinks": randn(2)},
}


def test_every_tensor_is_here():
    for name in CALLS:
        parameters = inspect.signature(getattr(kernels, name)).parameters.values()
        taken = {p.name for p in parameters if "Tensor" in p.annotation}
        assert taken - NUMBERS <= {*CALLS[name], *OPTIONAL.get(name, {})}


GIVEN = {name: {**CALLS[name], **OPTIONAL.get(name, {})} for name in CALLS}
BESIDE_OTHERS = [
    *((name, argument) for name, argument in REQUIRED if [n for n, _ in REQUIRED].count(name) > 1),
    *((name, argument) for name, given in OPTIONAL.items() for argument in given),
]


@pytest.mark.parametrize(("name", "argument"), BESIDE_OTHERS)
def test_tensors_of_two_devices_are_refused(name, argument):
    function, value = getattr(kernels, name), GIVEN[name][argument]
    function(**{**CALLS[name], argument: value})
    named = r"\w+" if argument in CALLS[name] else argument  # of two either may be meant
    with pytest.raises(ValueError, match=rf"^{name}: {named} must be on the .*device"):
        function(**{**CALLS[name], argument: value.to("meta")})


FLOATING = [
    (name, argument)
    for name, given in GIVEN.items()
    for argument, value in given.items()
    if isinstance(value, torch.Tensor) and value.is_floating_point()
    # as torch: whose errors attention's are, and whose mse_loss takes such targets
    if name != "scaled_dot_product_attention" and (name, argument) != ("mse_loss", "target")
]


@pytest.mark.parametrize(("name", "argument"), FLOATING)
def test_whole_numbers_are_refused(name, argument):
    value = GIVEN[name][argument].long()
    with pytest.raises(TypeError, match=rf"^{name}: {argument} must be a floating-point tensor"):
        getattr(kernels, name)(**{**CALLS[name], argument: value})


DROPPING = [
    n for n in CALLS if {"p", "training"} <= {*inspect.signature(getattr(kernels, n)).parameters}
]


@pytest.mark.parametrize("name", DROPPING)
def test_training_drops_and_nothing_else_does(name):
    function, given = getattr(kernels, name), CALLS[name]
    if "residual" in OPTIONAL.get(name, {}):
        given = {**given, "residual": OPTIONAL[name]["residual"]}
    whole = function(**given, p=0.0)
    torch.testing.assert_close(function(**given, p=0.9, training=False), whole, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(function(**given, p=0.9), whole)


def test_a_bias_needs_a_dimension():
    scalar = torch.tensor(1.0, device=DEVICE)
    for call in (
        lambda: kernels.bias_act(scalar, scalar),
        lambda: kernels.bias_dropout_add(scalar, scalar, scalar),
    ):
        with pytest.raises(ValueError, match="x must have a dimension where there is a bias"):
            call()


WIDE = torch.float64


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_float64_residual_is_added_in_float64(p):
    x, weight = randn(3, 4), randn(5, 4)
    residual = randn(3, 4).to(WIDE).requires_grad_()
    x.requires_grad_()
    for call in (
        lambda: kernels.bias_dropout_add(x, residual, p=p),
        lambda: kernels.add_layer_norm(x, residual, p=p)[1],
        lambda: kernels.add_rms_norm(x, residual, p=p)[1],
        lambda: kernels.rms_norm_linear(x, None, weight, residual=residual, p=p)[1],
    ):
        summed = call()
        assert summed.dtype == WIDE
        branch = summed - residual
        scale = x.to(WIDE) / (1 - p)
        assert (((branch - scale).abs() < 1e-14) | ((branch.abs() < 1e-14) & (p > 0))).all()
        dx, dresidual = torch.autograd.grad(summed.sum(), (x, residual))
        assert (dx.dtype, dresidual.dtype) == (x.dtype, WIDE)


def test_a_float64_branch_leaves_the_residual_its_dtype():
    x, residual = randn(3, 4).to(WIDE), randn(3, 4)
    expected = (residual + x).to(residual.dtype)
    torch.testing.assert_close(kernels.bias_dropout_add(x, residual), expected)
    torch.testing.assert_close(kernels.add_rms_norm(x, residual)[1], expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])  # "meta" has none
@pytest.mark.parametrize("name", CALLS)
def test_shapes_on_the_meta_device_are_those_of_real_results(name, autocast):
    def on_meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def results(given):
        found = getattr(kernels, name)(**given)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    with torch.autocast(DEVICE, enabled=autocast):
        empty = results({argument: on_meta(value) for argument, value in CALLS[name].items()})
    for e, r in zip(empty, results(CALLS[name]), strict=True):
        assert e.is_meta and (e.shape, e.dtype) == (r.shape, r.dtype)
