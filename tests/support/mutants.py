"""Faults put into the library on purpose, each of which the tests must notice.

    python -m tests.support.mutants            # all of them
    python -m tests.support.mutants NAME ...   # some
    python -m tests.support.mutants --list

A mutant replaces a piece of source text while its module is imported; no file is changed. It runs
in a process of its own with the tests that should notice it, and is killed if one of them fails.
A mutant whose text is not in the source exactly once, or whose module or tests do not run, is an
error, not a success. Without Triton no kernel runs, and there is nothing to judge.
"""

from __future__ import annotations

import argparse
import importlib.util
import linecache
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

VARIABLE = "TRILITH_MUTANT"
ROOT = Path(__file__).resolve().parents[2]
TESTS_PASSED, TESTS_FAILED = 0, 1
# What a mutant that is no longer valid Python or Triton fails with: no test noticed anything.
_BROKEN = re.compile(r"^E +\S*(SyntaxError|NameError|CompilationError|StaleMutant)", re.M)


class StaleMutant(Exception):
    """The text that a mutant replaces is not in the source exactly once."""


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `module`; `tests` are the pytest arguments that must notice."""

    name: str
    module: str
    old: str
    new: str
    tests: str

    def applied_to(self, source: str) -> str:
        found = source.count(self.old)
        if found != 1:
            raise StaleMutant(f"{self.name}: its text is {found} times in {self.module}")
        return source.replace(self.old, self.new)


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_source(fullname)
        assert source is not None
        source = self.mutant.applied_to(source)
        # Triton reads a kernel's source through linecache, which looks up files that exist again.
        filename = f"<mutant {self.mutant.name}> {self.path}"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        return compile(source, filename, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant
        self.searching = False

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.mutant.module or self.searching:
            return None
        self.searching = True
        try:
            found = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_file_location(
            fullname, found.origin, loader=_Loader(fullname, found.origin, self.mutant)
        )


def install(name: str) -> None:
    """Mutate this process: call before the module is imported."""
    mutant = _by_name()[name]
    if mutant.module in sys.modules:
        raise RuntimeError(f"mutant {name}: {mutant.module} is imported already")
    sys.meta_path.insert(0, _Finder(mutant))


def _by_name() -> dict[str, Mutant]:
    from tests.support.mutant_table import MUTANTS

    return {mutant.name: mutant for mutant in MUTANTS}


def stale(mutant: Mutant) -> str | None:
    """What is wrong where the mutant's text must be found anew."""
    found = importlib.util.find_spec(mutant.module)
    assert found is not None
    assert found.origin is not None
    try:
        mutant.applied_to(Path(found.origin).read_text())
    except StaleMutant as error:
        return str(error)
    return None


def _pytest(arguments: Sequence[str], mutant: str | None) -> subprocess.CompletedProcess[str]:
    # In Triton's interpreter on every machine: one verdict, and nothing to compile.
    variables = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    variables |= {} if mutant is None else {VARIABLE: mutant}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def _failed(output: str) -> list[str]:
    return re.findall(r"^FAILED (.+?)(?: - .*)?$", output, re.M)


def run(mutant: Mutant) -> tuple[str, str]:
    """The verdict (killed, SURVIVED or ERROR), and the test that noticed or what went wrong."""
    wrong = stale(mutant)
    if wrong is not None:
        return "ERROR", wrong
    done = _pytest(["-x", *shlex.split(mutant.tests)], mutant.name)
    if done.returncode == TESTS_PASSED:
        return "SURVIVED", mutant.tests
    noticed = _failed(done.stdout)
    if done.returncode != TESTS_FAILED or not noticed or _BROKEN.search(done.stdout):
        return "ERROR", done.stdout[-2000:] + done.stderr[-2000:]
    return "killed", noticed[0]


def failing_anyway(tests: Sequence[str]) -> set[str]:
    """Those of the tests that fail without any mutant, and so notice nothing."""
    if not tests:
        return set()
    done = _pytest(list(dict.fromkeys(tests)), None)
    if done.returncode not in (TESTS_PASSED, TESTS_FAILED):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return set(_failed(done.stdout))


def _timed(mutant: Mutant) -> tuple[str, str, float]:
    start = time.perf_counter()
    verdict, told = run(mutant)
    return verdict, told, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants to run; none for all")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    known = _by_name()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no mutant {', '.join(unknown)}; --list shows them")
    chosen = [known[name] for name in options.names] or list(known.values())
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:52} {mutant.module}")
        return 0
    if importlib.util.find_spec("triton") is None:
        print("no mutants: Triton is not installed")
        return 0
    noticed: dict[str, str] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, (verdict, told, seconds) in zip(chosen, pool.map(_timed, chosen), strict=True):
            if verdict == "killed":
                noticed[mutant.name] = told
            print(f"{mutant.name:52} {seconds:5.1f} s  {verdict}: {told}", flush=True)
    failing = failing_anyway(list(noticed.values()))
    for name, test in noticed.items():
        if test in failing:
            print(f"{name}: ERROR: without the mutant {test} fails too")
    killed = sum(test not in failing for test in noticed.values())
    print(f"{len(chosen)} mutants, {killed} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
