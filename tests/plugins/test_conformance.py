"""Every registered op passes the conformance checks, and the checks catch ops that are wrong."""

import functools

import pytest
import torch

from tests.plugins.faulty_ops import FAULTS, SOUND
from tests.plugins.ops_of_8_bits import FAULTS_OF_8_BITS
from tests.plugins.unusual_ops import UNUSUAL
from tests.support.devices import DEVICE, DTYPES, INTERPRETING, dtype_name
from tests.support.launches import import_kernels
from trilith.plugins import registry
from trilith.plugins.conformance import (
    CHECKS,
    PER_TENSOR,
    covering,
    dtypes_of_check,
    samples_of,
)
from trilith.plugins.conformance.transforms import has_cpp_compiler

import_kernels()

DEVICE = torch.device(DEVICE)
BY_NAME = {check.__name__: check for check in CHECKS}
# How many of an op's samples a check takes: where the interpreter runs the kernels, and always.
AT_MOST_INTERPRETED = {
    "guard_bands": 4,
    "reads_stay_inside": 4,
    "writes_are_disjoint": 4,
    "regimes": 2,
    "runs_are_bit_equal": 2,
    "calls_are_apart": 2,
    "backward_twice": 3,
    "autocast": 2,
    "checkpointing": 2,
    "inference_mode": 2,
    "cost_is_sound": 2,
    "shards_agree": 2,
}
AT_MOST = {
    "opcheck": 1,
    "compiles": 2,
    "compiles_dynamic": 2,
    "compiles_with_inductor": 1,
    "regimes_in_16_bits": 1,
    "processes_agree": 1,
    **(AT_MOST_INTERPRETED if INTERPRETING else {}),
}


@pytest.fixture(autouse=True)
def compiler(request):
    inductor = "compiles_with_inductor" in request.node.name
    if inductor and DEVICE.type == "cpu" and not has_cpp_compiler():
        pytest.skip("Inductor needs a C++ compiler for CPU tensors, and none is on the PATH")


@functools.cache
def samples(name, dtype):
    return samples_of(registry.op(name), DEVICE, dtype)


def cases():
    for name in registry.op_names():
        if name.startswith("trilith::"):
            for check in CHECKS:
                for dtype in dtypes_of_check(check, DTYPES):
                    yield pytest.param(
                        name,
                        dtype,
                        check,
                        id=f"{name.removeprefix('trilith::')}-{dtype_name(dtype)}-{check.__name__}",
                    )


@pytest.mark.parametrize(("name", "dtype", "check"), list(cases()))
def test_op(name, dtype, check):
    op = registry.op(name)
    chosen = samples(name, dtype)[: AT_MOST.get(check.__name__)]
    if check in PER_TENSOR:
        chosen = covering(op, chosen)
    assert chosen
    for sample in chosen:
        check(op, sample, DEVICE, dtype)


@pytest.mark.parametrize("name", [n for n in registry.op_names() if n.startswith("trilith::")])
def test_samples_give_every_tensor(name):
    op = registry.op(name)
    given = [
        {i for i in op.parameters.tensors if bound[i] is not None}
        for bound in (
            op.parameters.bind(s.args, s.kwargs) for s in covering(op, samples(name, torch.float32))
        )
    ]
    assert set().union(*given) == set(op.parameters.tensors)
    assert all(own - set().union(*given[:i]) for i, own in enumerate(given))


def run(op, check, dtype):
    for sample in samples_of(op, DEVICE, dtype):
        check(op, sample, DEVICE, dtype)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sound_op_passes(make, check):
    for dtype in dtypes_of_check(check, DTYPES):
        run(make(SOUND), check, dtype)


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_op_passes(make, name):
    op = make(UNUSUAL[name])
    for check in CHECKS:
        if not check.__name__.startswith("compiles"):
            for dtype in dtypes_of_check(check, DTYPES):
                run(op, check, dtype)


@pytest.mark.parametrize(
    ("fault", "check"),
    [(fault, check) for fault, (_, checks) in FAULTS.items() for check in checks],
)
def test_fault_is_caught(make, fault, check):
    if check in ("writes_are_disjoint", "reads_stay_inside") and not INTERPRETING:
        pytest.skip("seen by Triton's interpreter alone")
    op = make(FAULTS[fault][0])
    with pytest.raises(AssertionError) as error:
        for dtype in dtypes_of_check(BY_NAME[check], DTYPES):
            run(op, BY_NAME[check], dtype)
    kind = str(dtype).removeprefix("torch.")
    assert str(error.value).startswith(f"{op.spec.name}({kind}[6x5], {kind}[")
    assert f": {check}: " in str(error.value)


@pytest.mark.parametrize("fault", FAULTS_OF_8_BITS)
def test_fault_in_floats_of_8_bits_is_caught(make, fault):
    spec, check = FAULTS_OF_8_BITS[fault]
    with pytest.raises(AssertionError, match=f": {check}: "):
        run(make(spec), BY_NAME[check], torch.float32)


def test_every_check_catches_something():
    caught = {check for _, checks in FAULTS.values() for check in checks}
    assert caught == set(BY_NAME) - {"processes_agree"}  # which needs a plugin: test_processes.py
