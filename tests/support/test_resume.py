"""Runs that go on where an unfinished one stopped."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.plugins.environments import clean

pytest_plugins = ["pytester"]

TESTS = """
from pathlib import Path

import pytest

HERE = Path(__file__).parent

def ran(name):
    with (HERE / "ran").open("a") as file:
        file.write(f"{name} ")

@pytest.mark.parametrize("n", range(3))
@pytest.mark.xdist_group("one")
def test_it(n):
    ran(n)

def test_later():
    ran("later")
    assert (HERE / "mended").exists()

@pytest.mark.skip(reason="never")
def test_skipped(): ...
"""
LATER = "test_some.py::test_later\ntest_some.py::test_skipped\n"
ALL = ["0", "1", "2", "later"]


@pytest.fixture
def run(pytester):
    """A run over TESTS: exit code, what it printed, and the names of those that ran."""
    pytester.makepyfile(test_some=TESTS)
    ran = pytester.path / "ran"

    def run(until=1e4):
        ran.write_text("")
        options = ("-p", "tests.support.resume", "--passed", "passed", "-p", "no:cacheprovider")
        done = pytester.runpytest_inprocess(*options, "--until", str(time.time() + until))
        return done.ret, done.stdout.str(), sorted(ran.read_text().split())

    return run


def test_what_passed_is_not_repeated_until_all_has(run, pytester):
    code, _, ran = run()
    assert (code, ran) == (1, ALL)
    code, _, ran = run()
    assert (code, ran) == (1, ["later"])
    (pytester.path / "mended").touch()
    code, printed, ran = run()
    assert (code, ran) == (0, ["later"])
    assert "left" not in printed
    code, _, ran = run()
    assert (code, ran) == (0, [])
    (pytester.path / "passed").unlink()
    code, _, ran = run()
    assert (code, ran) == (0, ALL)


def test_what_there_is_no_time_for_is_left_and_told(run, pytester):
    (pytester.path / "mended").touch()
    code, printed, ran = run(until=-1.0)
    assert (code, ran) == (1, [])
    assert "4 left: no time left; run it again" in printed
    code, _, ran = run()
    assert (code, ran) == (0, ALL)


def test_other_sources_or_another_machine_start_anew(run, pytester):
    run()
    passed = pytester.path / "passed"
    head, *names = passed.read_text().splitlines()
    assert "sources" in head and "GPU" in head and "torch" in head and len(names) == 3
    passed.write_text("\n".join([head.replace("GPU", "another GPU"), *names]))
    _, _, ran = run()
    assert ran == ALL


def pytest_in_another_process(folder, *options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.support.resume", "--passed", str(folder / "passed")]
    command += ["--rootdir", str(folder), *map(str, options)]
    alone = {k: v for k, v in clean().items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


def test_several_workers_go_on_too(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    workers = ("-n", "2", "--dist", "loadgroup", tmp_path)
    code, printed = pytest_in_another_process(tmp_path, *workers, "--until", "0")
    assert code == 1 and "4 left" in printed
    for tests, status in ((ALL, 1), (["later"], 1), ([], 0)):
        if not tests:
            (tmp_path / "passed").write_text((tmp_path / "passed").read_text() + LATER)
        (tmp_path / "ran").write_text("")
        code, printed = pytest_in_another_process(tmp_path, *workers)
        assert code == status, printed
        assert sorted((tmp_path / "ran").read_text().split()) == tests


def test_results_of_an_unfinished_run_stay_beside_those_of_the_next(tmp_path):
    (tmp_path / "conftest.py").write_text(Path("perf/conftest.py").read_text())
    case = "def test_{}(benchmark):\n    benchmark.pedantic(lambda: {}, rounds=3)\n"
    file = tmp_path / "bench_some.py"

    def measured(**cases):
        file.write_text("".join(case.format(*item) for item in cases.items()))
        pytest_in_another_process(
            tmp_path, "--results", tmp_path, "-o", "python_files=bench_*.py", file
        )
        rows = json.loads((tmp_path / "some.json").read_text())["benchmarks"]
        return {row["name"]: row["stats"]["min"] for row in rows}

    before = measured(a=None, b="1 / 0", c=None)
    assert set(before) == {"test_a", "test_c"}
    after = measured(a=None, b=None, c=None)
    assert after == before | {"test_b": after["test_b"]}
    (tmp_path / "passed").unlink()
    anew = measured(a=None, b=None, c=None)
    assert set(anew) == set(after) and anew != after
