"""Where no GPU is, the suite runs the kernels in Triton's interpreter, on CPU tensors."""

import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before TRITON_INTERPRET could be set")
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

if "TRILITH_MUTANT" in os.environ:
    from tests.support import mutants

    mutants.install(os.environ["TRILITH_MUTANT"])

from trilith.plugins import interpreter

interpreter.apply()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Slow tests come first where several workers share them: none waits for another at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """`torch.empty` and its kin give NaN (integers: their maximum) in this test."""
    from trilith.plugins.conformance.compare import poisoned

    with poisoned():
        yield
