"""Many processes compute what one does: the checks of `checks.py`, each rank's word on each."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.blocks.parallel import checks

ROOT = Path(__file__).parents[3]
RUNS = {"2": (2, "0"), "4": (4, "0"), "2-kernels": (2, "1")}
CASES = [
    pytest.param(run, name, marks=pytest.mark.xdist_group(f"parallel {run}"))
    for run, (world, interpreted) in RUNS.items()
    for name in checks.names(world, interpreted == "1")
]


@functools.cache  # a parametrized fixture of the module is made anew for each test by pytest 9.2
def said(run):
    """What every rank says of every check of a run."""
    world, interpreted = RUNS[run]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [sys.executable, "-m", "tests.blocks.parallel.ranks", str(world), folder],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert process.returncode == 0, process.stderr
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(("run", "name"), CASES)
def test_every_rank_agrees_with_one_process(run, name):
    wrong = [f"rank {rank}: {found[name]}" for rank, found in enumerate(said(run)) if found[name]]
    assert not wrong, "\n".join(wrong)
