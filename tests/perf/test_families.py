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
SPOILT = """
from pathlib import Path
RESULTS = Path(__file__).parent / "results"
def test_spoil():
    RESULTS.rename(RESULTS.with_name("kept"))
def test_b(benchmark):
    benchmark.pedantic(lambda: None, rounds=3)
def test_mend():
    RESULTS.with_name("kept").rename(RESULTS)
"""
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
        return done.returncode, kept, done.stdout + done.stderr

    return run


def test_what_was_measured_is_kept_whatever_comes_after_it(run):
    a, b = (MEASURED.format(family=family) for family in "ab")
    code, kept, _ = run(norms=a + b, softmax=WRONG + a, rotary=a + KILLED)
    assert code == 9
    assert kept == {
        "norms.json": ["test_a", "test_b"],
        "softmax.json": ["test_a"],
        "rotary.json": ["test_a"],
    }


def test_several_workers_measure_nothing(run):
    code, kept, _ = run("-n", "2", norms=MEASURED.format(family="a"))
    assert code == 0
    assert not kept


def test_results_that_cannot_be_written_cost_no_case(run):
    a, c = (MEASURED.format(family=family) for family in "ac")
    code, kept, printed = run(norms=a + SPOILT + c)
    assert code == 1 and "5 passed, 1 error" in printed, printed
    assert kept == {"norms.json": ["test_a", "test_b", "test_c"]}


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nope"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_runs(run, tmp_path, place):
    (tmp_path / "file").touch()
    code, _, printed = run("--results", str(tmp_path / place), norms=MEASURED.format(family="a"))
    assert code == pytest.ExitCode.USAGE_ERROR
    assert f"--results {tmp_path / place} cannot be written: " in printed
    assert "Traceback" not in printed
