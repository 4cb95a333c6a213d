"""Every registered op in copies, in other processes, and where neither Triton nor a GPU is."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.devices import DEVICE
from trilith.plugins import manager, registry
from trilith.plugins.conformance import processes

ROOT = Path(__file__).parents[2]
manager.load()
NAMES = registry.op_names()


class Calls(nn.Module):
    """A module that holds an op and the arguments of a call."""

    def __init__(self, op, args):
        super().__init__()
        self.op, self.args = op, args

    def forward(self):
        result = self.op(*self.args)
        return result if isinstance(result, torch.Tensor) else result[0]


def module(name, device=DEVICE):
    torch.manual_seed(0)
    op = registry.op(name)
    sample = next(iter(op.spec.samples(torch.device(device), torch.float32)))
    return Calls(op, op.parameters.bind(sample.args, sample.kwargs))


def results(names):
    """Of each op the first output of its first sample; runs in a child process too."""
    torch.set_num_threads(1)
    return {name: module(name)().numpy() for name in names}


@pytest.fixture
def one_thread():
    """As many as the children have: sums are split over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one, other):
    return torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_that_holds_an_op_is_copied_and_pickled(name):
    made = module(name)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin.op is made.op
        assert same(twin().cpu(), made().cpu())


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's context does not survive a fork")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_compute_the_same(method, one_thread):
    expected = results(NAMES)
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.apply(results, (NAMES,))
    assert [name for name in NAMES if not same(found[name], expected[name])] == []


DRAWN = """
import os
import random

from tests.plugins.negative import SOUND, Bringing, Tensor, forward, replace

FACTOR = 1 + random.random()

def drawn(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    os.write(1, b"a compiler's words\\n")  # below Python
    return (forward(x, weight)[0] * FACTOR,)

plugin = Bringing(
    replace(
        SOUND,
        name="negative::drawn",
        forward=drawn,
        backward=lambda ctx, dy: tuple(FACTOR * g for g in SOUND.backward(ctx, dy)),
        reference=lambda x, weight: (SOUND.reference(x, weight) * FACTOR).to(x.dtype),
    )
)
"""
CHECKED = """
from trilith.plugins import manager, registry
from trilith.plugins.conformance import CHECKS
from trilith.plugins.report import run_check
import torch

manager.load()
op, provider = registry.op("negative::drawn"), "negative"
cpu, dtype = torch.device("cpu"), torch.float32
for check in CHECKS:
    if check.__name__ in ("processes_agree", "runs_are_bit_equal", "forward_matches_reference"):
        try:
            print(check.__name__, run_check(op, provider, check, cpu, dtype))
        except AssertionError as error:
            print(error)
"""


def test_what_an_op_drew_at_import_is_seen_in_another_process(tmp_path):
    """Fails in no check that stays in one process."""
    (tmp_path / "drawn.py").write_text(DRAWN)
    installed = tmp_path / "drawn-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: drawn\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[trilith]\ndrawn = drawn:plugin\n")
    done = subprocess.run(
        [sys.executable, "-c", CHECKED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stdout.splitlines() if line != "a compiler's words"]
    numbers, runs, processes = told
    assert numbers.split()[0] == "forward_matches_reference"
    assert runs.split()[0] == "runs_are_bit_equal"
    assert ": processes_agree: in another process output 0: element" in processes


def test_a_process_that_an_op_ended_is_followed_by_another():
    question = {"op": "trilith::rms_norm", "provider": "reference", "device": "cpu"}
    question |= {"dtype": "float32", "sample": 0, "threads": 1}
    processes._child().kill()
    processes._child().wait()
    assert "results" in processes._ask(question)


WITHOUT = """
import sys, torch
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, path=None, target=None: (
    None if name.partition(".")[0] == "triton" else find(name, path, target))
assert not torch.cuda.is_available()

from trilith.plugins import manager, registry

manager.load()
for name in registry.op_names():
    op = registry.op(name)
    for sample in op.spec.samples(torch.device("cpu"), torch.float32):
        args = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
                else a for a in op.parameters.bind(sample.args, sample.kwargs)]
        out = op(*args)
        out = out if isinstance(out, torch.Tensor) else out[0]
        out.sum().backward()
        assert any(a.grad is not None for a in args if isinstance(a, torch.Tensor)), name
    print(name)
assert "triton" not in sys.modules
"""


@pytest.mark.parametrize("triton", [False, True], ids=["without-triton", "with-triton"])
def test_every_op_runs_without_a_gpu(triton):
    code = (
        WITHOUT if not triton else WITHOUT.replace('== "triton"', '== ""').rpartition("assert")[0]
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == NAMES
