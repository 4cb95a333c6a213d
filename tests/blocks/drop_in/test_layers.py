"""Norms, dropout, activations and the loss as torch.nn has them."""

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.support.compare import assert_like_eager
from tests.support.devices import DEVICE, INTERPRETING
from trilith import kernels
from trilith.blocks import drop_in
from trilith.kernels._runtime.launch import observers

CASES = {
    "LayerNorm": [{"normalized_shape": 12}, {"normalized_shape": (3, 12), "eps": 0.1}]
    + [{"normalized_shape": 12, "elementwise_affine": False}]
    + [{"normalized_shape": 12, "bias": False}],
    "RMSNorm": [{"normalized_shape": 12}, {"normalized_shape": 12, "eps": 0.1}]
    + [{"normalized_shape": (3, 12), "elementwise_affine": False}],
    "ReLU": [{}, {"inplace": True}],
    "LeakyReLU": [{}, {"negative_slope": 0.3}],
    "ELU": [{}, {"alpha": 0.5}],
    "GELU": [{}, {"approximate": "tanh"}],
    "SiLU": [{}, {"inplace": True}],
    "Sigmoid": [{}],
    "Tanh": [{}],
    "Dropout": [{"p": 0.0}, {"p": 1.0}],
}
TORCHS_OWN = ({"inplace": True}, {"negative_slope": 0.3}, {"alpha": 0.5})
NAMES = list(drop_in.__all__)
cases = pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n, given in CASES.items() for o in given], ids=str
)


@pytest.fixture
def launches():
    seen = []
    observers.append(lambda kernel, *_: seen.append(kernel))
    yield seen
    observers.pop()


def pair(name, options, **moved):
    theirs = getattr(nn, name)(**options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(0.5, 2.0)
    ours = getattr(drop_in, name)(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours.to(DEVICE, **moved), theirs.to(DEVICE, **moved)


def results(module, x, dy):
    x = x.clone().requires_grad_()
    y = module(x * 1.0)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.parametrize("name", NAMES)
def test_constructor_and_forward_are_torchs(name):
    ours, theirs = getattr(drop_in, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "forward"):
        own, other = (inspect.signature(getattr(c, method)).parameters for c in (ours, theirs))
        assert list(own) == list(other)
        assert [p.default for p in own.values()] == [p.default for p in other.values()]


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_and_gradients_are_torchs(name, options, dtype, launches):
    ours, theirs = pair(name, options, dtype=dtype)
    x, dy = torch.randn(2, 5, 3, 12, device=DEVICE, dtype=dtype).unbind()
    wide = copy.deepcopy(theirs).double()
    actual = results(ours, x, dy)
    assert bool(launches) == (options not in (*TORCHS_OWN, {"p": 0.0}))
    expected, eager = results(wide, x.double(), dy.double()), results(theirs, x, dy)
    for a, e, t in zip(actual, expected, eager, strict=True):
        assert_like_eager(a, e, t)


@cases
def test_modules_copy_pickle_and_start_on_meta(name, options):
    ours, _ = pair(name, options)
    x = torch.randn(5, 3, 12, device=DEVICE)
    expected = ours(x.clone())
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(x.clone()), expected)
    with torch.device("meta"):
        empty = type(ours)(**options)
    empty.to_empty(device=DEVICE).load_state_dict(ours.state_dict())
    assert torch.equal(empty(x.clone()), expected)
    assert repr(ours) == repr(getattr(nn, name)(**options))


@cases
def test_default_dtype(name, options):
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = pair(name, options)
        x = torch.randn(5, 3, 12, device=DEVICE)
        torch.testing.assert_close(ours(x.clone()), theirs(x.clone()))
        assert ours(x.clone()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@cases
def test_compiles_to_one_graph_and_exports(name, options):
    ours, _ = pair(name, options)
    x = torch.randn(5, 3, 12, device=DEVICE)
    expected = ours(x.clone())
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.clone()), expected)
    exported = torch.export.export(ours, (x.clone(),)).module()
    torch.testing.assert_close(exported(x.clone()), expected)


ELSEWHERE = CASES | {
    "Dropout": [{"p": 0.5}],
    "BatchNorm1d": [{"num_features": 3}],
    "Softmax": [{"dim": 1}],
    "LogSoftmax": [{"dim": 1}],
    "CrossEntropyLoss": [{}],
    "BCEWithLogitsLoss": [{}],
    "MSELoss": [{}],
    "MultiheadAttention": [{"embed_dim": 12, "num_heads": 2, "batch_first": True}],
    "TransformerEncoderLayer": [{"d_model": 12, "nhead": 2, "dim_feedforward": 8}],
    "TransformerDecoderLayer": [{"d_model": 12, "nhead": 2, "dim_feedforward": 8}],
}


ARGUMENTS = {
    "CrossEntropyLoss": 2,
    "BCEWithLogitsLoss": 2,
    "MSELoss": 2,
    "MultiheadAttention": 3,
    "TransformerDecoderLayer": 2,
}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CASES])
def test_default_dtype_of_the_others(name):
    torch.set_default_dtype(torch.float64)
    try:
        for options in ELSEWHERE[name]:
            options = options | ({"dropout": 0.0} if name.startswith("Transformer") else {})
            results = []
            args = [torch.rand(5, 3, 12, device=DEVICE) for _ in range(ARGUMENTS.get(name, 1))]
            for module in pair(name, options):
                x = args[0].clone().requires_grad_()
                y = module(x, *args[1:])
                y = y[0] if isinstance(y, tuple) else y
                results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
                state = module.state_dict().values()
                floating = [t for t in (*results[-1], *state) if t.is_floating_point()]
                assert {t.dtype for t in floating} == {torch.float64}
            torch.testing.assert_close(*results)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CASES])
def test_the_others_launch_kernels(name, launches):
    args = [torch.rand(5, 3, 12, device=DEVICE) for _ in range(ARGUMENTS.get(name, 1))]
    weights = {"need_weights": False} if name == "MultiheadAttention" else {}
    for module in pair(name, ELSEWHERE[name][0]):
        module(*args, **weights)
        assert bool(launches) == isinstance(module, getattr(drop_in, name))
        launches.clear()


@pytest.mark.skipif(not INTERPRETING, reason="a CPU's tensors stand for a GPU's")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpus_tensors_take_kernels_also_where_ops_are_their_reference_on_cpus(
    name, launches, monkeypatch
):
    ours, _ = pair(name, ELSEWHERE[name][0])
    args = [torch.rand(5, 3, 12) for _ in range(ARGUMENTS.get(name, 1))]
    weights = {"need_weights": False} if name == "MultiheadAttention" else {}

    def launched():
        launches.clear()
        for training in (True, False):
            ours.train(training)(*args, **weights)
        return list(launches)

    expected = launched()
    for op in kernels.OPS:
        monkeypatch.setattr(op, "is_reference_on_cpu", True)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert launched() == expected


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's functions take their place on CPUs alone")
@pytest.mark.parametrize("name", NAMES)
def test_a_drop_in_is_torchs_own_where_ops_are_their_reference(name, launches, monkeypatch):
    for op in kernels.OPS:
        monkeypatch.setattr(op, "is_reference_on_cpu", True)
    for options in ELSEWHERE[name]:
        ours, theirs = pair(name, options)
        for training in (True, False):
            results = []
            for module in (ours.train(training), theirs.train(training)):
                torch.manual_seed(3)
                args = [torch.rand(5, 3, 12) for _ in range(ARGUMENTS.get(name, 1))]
                with torch.set_grad_enabled(training):
                    results.append((module(*args), module.state_dict()))
            torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not launches


@pytest.mark.parametrize("name", ["ReLU", "GELU", "Dropout"])
def test_channels_stay_last(name, launches):
    x = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    y = getattr(drop_in, name)()(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert launches


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GELU"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_keep_their_parts(name, layout, launches):
    parts = [torch.randn(n, 12, device=DEVICE) for n in (3, 5)]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    ours, theirs = pair(name, CASES[name][0])
    y = ours(nested)
    assert y.layout == layout
    for of_part, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(of_part, theirs(part))
    assert launches


@pytest.mark.parametrize(
    ("name", "layout"),
    [("Softmax", torch.strided), ("Softmax", torch.jagged), ("LogSoftmax", torch.jagged)],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_softmax_of_nested_tensors_is_torchs(name, layout):
    parts = [torch.randn(n, 12, device=DEVICE) for n in (3, 5)]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    for y, part in zip(getattr(drop_in, name)(-1)(nested).unbind(), parts, strict=True):
        torch.testing.assert_close(y, getattr(nn, name)(-1)(part))


@pytest.mark.parametrize(
    "after", [nn.ReLU(inplace=True), lambda y: y.mul_(2), lambda y: y.clamp_(0)]
)
@pytest.mark.parametrize("name", ["BatchNorm1d", "LayerNorm", "RMSNorm"])
def test_a_norms_output_may_be_changed_in_place(name, after):
    x = torch.randn(6, 12, device=DEVICE, requires_grad=True)
    norms = getattr(drop_in, name)(12).to(DEVICE), getattr(nn, name)(12).to(DEVICE)
    dx, expected = (torch.autograd.grad(after(norm(x)).square().sum(), x)[0] for norm in norms)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
def test_mse_loss_takes_integer_targets(dtype):
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    target = torch.randint(2, (3, 4), device=DEVICE).to(dtype)
    ours, theirs = drop_in.MSELoss()(x, target), nn.MSELoss()(x, target.to(x.dtype))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs)))


def test_relu_of_integers_is_torchs():
    x = torch.tensor([-2, 3], device=DEVICE)
    assert torch.equal(drop_in.ReLU()(x), nn.ReLU()(x))


@pytest.mark.parametrize("interpreting", ["0", "1"])
def test_the_first_call_in_a_process_may_be_a_trace(interpreting):
    code = (
        "import torch; from trilith.blocks import drop_in\n"
        "for module in drop_in.LayerNorm(4), drop_in.Softmax(-1), drop_in.GELU():\n"
        "    torch.jit.trace(module, torch.randn(2, 4))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": interpreting}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)


@pytest.mark.parametrize("name", ["MSELoss", "BatchNorm1d", "TransformerEncoderLayer"])
def test_the_first_call_in_a_process_may_be_checkpointed(name):
    """The second, which recomputes it, is the same function: gradients are those of a third."""
    made, run = {
        "MSELoss": ("()", "m(x.exp(), x)"),
        "BatchNorm1d": ("(8)", "m(x)"),
        "TransformerEncoderLayer": ("(8, 2, 16, dropout=0.5)", "m(x)"),
    }[name]
    code = f"""
import torch
from torch.utils.checkpoint import checkpoint
from trilith.blocks import drop_in

torch.manual_seed(0)
x, m = torch.randn(6, 8, requires_grad=True), drop_in.{name}{made}

def gradient(call):
    torch.manual_seed(1)
    y = call(lambda x: {run}, x)
    return torch.autograd.grad((y * torch.arange(1.0, 1 + y.numel()).view_as(y)).sum(), x)[0]

first = gradient(lambda f, x: checkpoint(f, x, use_reentrant=False))
assert torch.equal(first, gradient(lambda f, x: f(x)))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)


def test_dropout_drops_in_training_only():
    x = torch.randn(64, 64, device=DEVICE)
    module = drop_in.Dropout(0.5)
    dropped = module(x)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * x[kept])
    assert module.eval()(x) is x


def test_dropout_in_place():
    x = torch.ones(64, 64, device=DEVICE)
    assert drop_in.Dropout(0.5, inplace=True)(x) is x
    assert set(x.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_loss(reduction, probabilities):
    options = {"reduction": reduction, "label_smoothing": 0.1}
    weight = torch.rand(7, device=DEVICE)
    ours = drop_in.CrossEntropyLoss(weight, **options)
    theirs = nn.CrossEntropyLoss(weight, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    x = torch.randn(4, 7, 5, device=DEVICE)
    target = torch.randint(7, (4, 5), device=DEVICE)
    target[0, 0] = -100
    if probabilities:
        target = torch.randn(4, 7, 5, device=DEVICE).softmax(1)
    torch.testing.assert_close(ours(x, target), theirs(x, target))


@pytest.mark.parametrize(
    ("name", "options", "x"),
    [
        ("LayerNorm", {"normalized_shape": 12}, torch.zeros(3, 11)),
        ("RMSNorm", {"normalized_shape": 12}, torch.zeros(3, 11)),
        ("Dropout", {"p": 2.0}, torch.zeros(3)),
        ("Dropout", {}, torch.zeros(3, dtype=torch.long)),
        ("GELU", {"approximate": "none"}, torch.zeros(3, dtype=torch.long)),
        ("GELU", {"approximate": "cubic"}, torch.zeros(3)),
    ],
    ids=["layer_norm", "rms_norm", "p", "dropped_integers", "integers", "approximate"],
)
def test_errors_are_of_torchs_kind(name, options, x):
    kinds = []
    for source in (nn, drop_in):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            getattr(source, name)(**options)(x)
        assert str(caught.value)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
