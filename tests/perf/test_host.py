"""What plans save the host, without a GPU: a plan is quicker than its launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trilith.kernels._runtime.language import triton

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(triton, "__version__"), reason="needs Triton's compiler")
def test_a_plan_is_quicker_than_the_launcher_that_it_follows():
    run = subprocess.run(
        [sys.executable, "-m", "perf.host"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in run.stdout.splitlines()[2:]]
    assert len(rows) == 8
    assert all(float(ratio) < 0.9 for *_, ratio in rows), run.stdout
