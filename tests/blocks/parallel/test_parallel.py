"""Many processes compute what one does: the checks of `checks.py`, each rank's word on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.blocks.parallel import checks

ROOT = Path(__file__).parents[3]
RUNS = {"2": (2, "0"), "4": (4, "0"), "2-kernels": (2, "1")}
CASES = [
    (run, name)
    for run, (world, interpreted) in RUNS.items()
    for name in checks.names(world, interpreted == "1")
]


@pytest.fixture(scope="module")
def said(request, tmp_path_factory):
    """What every rank says of every check of a run."""
    run = request.param
    world, interpreted = RUNS[run]
    folder = tmp_path_factory.mktemp(run)
    process = subprocess.run(
        [sys.executable, "-m", "tests.blocks.parallel.ranks", str(world), str(folder)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(("said", "name"), CASES, indirect=["said"])
def test_every_rank_agrees_with_one_process(said, name):
    wrong = [f"rank {rank}: {found[name]}" for rank, found in enumerate(said) if found[name]]
    assert not wrong, "\n".join(wrong)
