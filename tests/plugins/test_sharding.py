"""Ops on DTensors: what they take is what one process computes, and what they don't is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.plugins.sharded_calls import BY_DIMENSIONS, CALLS
from trilith.kernels import rms_norm
from trilith.kernels.norms import RMS_NORM
from trilith.plugins import sharding

ROOT = Path(__file__).parents[2]
RUNS = {"kernels": ((2,), "1"), "reference": ((2, 2), "0")}


@pytest.fixture(scope="module", params=RUNS)
def ranks(request, tmp_path_factory):
    """What every rank says of every call, and the mesh's number of dimensions."""
    sizes, interpreted = RUNS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    run = subprocess.run(
        [sys.executable, "-m", "tests.plugins.sharded_calls", *map(str, sizes), str(folder)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    world = torch.Size(sizes).numel()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    return found, len(sizes)


@pytest.mark.parametrize("call", [*CALLS, *BY_DIMENSIONS[1], *BY_DIMENSIONS[2]])
def test_every_rank_agrees_with_one_process(ranks, call):
    found, dimensions = ranks
    if call not in CALLS | BY_DIMENSIONS[dimensions]:
        pytest.skip(f"not for a mesh of {dimensions} dimensions")
    wrong = [f"rank {rank}: {said[call]}" for rank, said in enumerate(found) if said[call]]
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
