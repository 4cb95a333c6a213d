"""Ops on DTensors: what they take is what one process computes, and what they don't is refused."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.plugins.sharded_calls import BY_DIMENSIONS, CALLS
from trilith.kernels import rms_norm
from trilith.kernels.norms import RMS_NORM
from trilith.plugins import sharding

ROOT = Path(__file__).parents[2]
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
RUNS = {"kernels": ((2,), "1"), "reference": ((2, 2), "0")}


CASES = [
    pytest.param(run, call, marks=pytest.mark.xdist_group(f"sharding {run}"))
    for run, (sizes, _) in RUNS.items()
    for call in CALLS | BY_DIMENSIONS[len(sizes)]
]


@pytest.fixture(scope="module")
def said(request):
    """A function that gives what every rank says of the calls whose tests are chosen."""
    items = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params for item in items if hasattr(item, "callspec")]

    @functools.cache
    def said(run):
        sizes, interpreted = RUNS[run]
        calls = [params["call"] for params in chosen if params["run"] == run]
        with tempfile.TemporaryDirectory() as folder:
            options = [*map(str, sizes), folder, *calls]
            process = subprocess.run(
                [sys.executable, "-m", "tests.plugins.sharded_calls", *options],
                cwd=ROOT,
                env=os.environ | ON_CPU | {"TRITON_INTERPRET": interpreted},
                capture_output=True,
                text=True,
                timeout=500,
            )
            assert process.returncode == 0, process.stderr
            ranks = range(torch.Size(sizes).numel())
            return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in ranks]

    return said


@pytest.mark.parametrize(("run", "call"), CASES)
def test_every_rank_agrees_with_one_process(said, run, call):
    wrong = [f"rank {rank}: {found[call]}" for rank, found in enumerate(said(run)) if found[call]]
    if any("only 0-dimensional arrays can be converted" in text for text in wrong):
        pytest.skip("the interpreter of this Triton does not run with this NumPy")
    assert not wrong, "\n".join(wrong)


def test_plain_tensors_never_come_here(monkeypatch):
    monkeypatch.setattr(sharding, "is_dtensor", pytest.fail)
    x, weight = torch.randn(3, 8), torch.nn.Parameter(torch.ones(8))
    RMS_NORM(x, weight, 1e-6)
    RMS_NORM(x, None, 1e-6)


def test_other_subclasses_are_no_dtensors():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 8)
    torch.testing.assert_close(
        rms_norm(x.as_subclass(Tagged), (8,)).as_subclass(torch.Tensor), rms_norm(x, (8,))
    )
