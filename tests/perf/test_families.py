"""Results by family: each file has all that its family has measured, whatever happens next."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.environments import clean

MEASURED = """
def test_{family}(benchmark):
    benchmark.pedantic(lambda: None, rounds=3)
"""
KILLED = "import os\ndef test_killed():\n    os._exit(9)\n"
WRONG = "def test_wrong(benchmark):\n    benchmark.pedantic(lambda: 1 / 0, rounds=3)\n"


@pytest.fixture
def run(tmp_path):
    """pytest over files of these sources, in this order, beside the benchmarks' conftest."""
    (tmp_path / "conftest.py").write_text(Path("perf/conftest.py").read_text())

    def run(*options, **sources):
        files = [tmp_path / f"bench_{name}.py" for name in sources]
        for file, source in zip(files, sources.values(), strict=True):
            file.write_text(source)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-o", "python_files=bench_*.py", "--rootdir", str(tmp_path)]
        command += ["--results", str(tmp_path / "results"), *options]
        alone = {k: v for k, v in clean().items() if not k.startswith("PYTEST_XDIST")}
        done = subprocess.run(
            [*command, *map(str, files)], env=alone, capture_output=True, text=True, timeout=300
        )
        kept = {
            file.name: [row["name"] for row in json.loads(file.read_text())["benchmarks"]]
            for file in (tmp_path / "results").glob("*")
        }
        return done.returncode, kept

    return run


def test_what_was_measured_is_kept_whatever_comes_after_it(run):
    a, b = (MEASURED.format(family=family) for family in "ab")
    code, kept = run(norms=a + b, softmax=WRONG + a, rotary=a + KILLED)
    assert code == 9
    assert kept == {
        "norms.json": ["test_a", "test_b"],
        "softmax.json": ["test_a"],
        "rotary.json": ["test_a"],
    }


def test_several_workers_measure_nothing(run):
    code, kept = run("-n", "2", norms=MEASURED.format(family="a"))
    assert code == 0
    assert not kept
