"""The hardware-free meters, a row for each subject: bytes, launches, saved bytes, compile counts.

`extra_info` holds the figures and what they were in the baseline; the time of a row is how long the
counting took. It happens once, in a process of its own, for it needs Triton's interpreter, which
nothing that is timed may run in. The host's cost of an op is in bench_dispatch.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from perf import gate
from perf.suite import DEVICE
from perf.timing import CLOCK, environment

BASELINE = Path(__file__).parent / "baselines" / "counted.json"
BEFORE: dict[str, dict[str, float]] = gate.read(BASELINE)["figures"]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("counted") / "counted.json"
    answer = subprocess.run(
        [sys.executable, "-m", "perf.counted", "--json", str(file)],
        cwd=BASELINE.parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    return json.loads(file.read_text())


@pytest.mark.skipif(find_spec("triton") is None, reason="counts in Triton's interpreter")
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("subject", sorted(BEFORE))
def test_counted(benchmark: Any, counted: dict[str, Any], subject: str) -> None:
    figures, before = counted["figures"][subject], BEFORE[subject]
    seconds = counted["seconds"][subject]
    benchmark.group = "counted"
    benchmark.pedantic(lambda: CLOCK.advance(seconds), rounds=1)
    kind = subject.removesuffix(" block")
    peers = {who: counted["peers"].get(f"{kind} {who}") for who in ("eager", "compiled")}
    benchmark.extra_info.update(
        workload=subject,
        provider="trilith",
        direction="counted",
        dtype="bf16",
        environment=environment(DEVICE),
        figures=figures,
        baseline=before,
        peers={who: own for who, own in peers.items() if own},
    )
    found = gate.changes({subject: before}, {subject: figures})
    worse = [str(change) for change in found if change.is_worse]
    assert not worse, "\n".join(worse)
