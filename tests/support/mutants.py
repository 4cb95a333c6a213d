"""Faults put into the library on purpose, each of which the tests must notice.

    python -m tests.support.mutants            # all of them
    python -m tests.support.mutants NAME ...   # some
    python -m tests.support.mutants --list

A mutant replaces a piece of source text while its module is imported; no file is changed. It runs
in a fork with the tests that should notice it, and is killed if one of them fails. A mutant whose
text is not in the source exactly once, or whose module or tests do not run or do not end, is an
error, not a success. Without Triton no kernel runs, and there is nothing to judge.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import linecache
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from tests.support.forks import Finished, run_all

VARIABLE = "TRILITH_MUTANT"
ROOT = Path(__file__).resolve().parents[2]
TESTS_PASSED, TESTS_FAILED = 0, 1
_WARM = ("torch._dynamo", "triton.runtime.interpreter", "numpy", "hypothesis.strategies", "pytest")
# What a mutant that is no longer valid Python or Triton fails with: no test noticed anything.
_BROKEN = re.compile(r"^E +\S*(SyntaxError|NameError|CompilationError|(Stale|Unknown)Mutant)", re.M)


beside_the_table: list[Mutant] = []  # of this process, and of its forks


class StaleMutant(Exception):
    """The text that a mutant replaces is not in the source exactly once."""


class UnknownMutant(Exception):
    """A process that is no fork of this one has the table alone to find a mutant in."""


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
    mutant = _by_name().get(name)
    if mutant is None:
        raise UnknownMutant(f"{name} is not in the table, and this process was started anew")
    if mutant.module in sys.modules:
        raise RuntimeError(f"mutant {name}: {mutant.module} is imported already")
    sys.meta_path.insert(0, _Finder(mutant))


def _by_name() -> dict[str, Mutant]:
    from tests.support.mutant_table import MUTANTS

    return {mutant.name: mutant for mutant in (*MUTANTS, *beside_the_table)}


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


def warm() -> None:
    """Import what every test needs and no mutant is of, for the forks to have.

    In Triton's interpreter on every machine: one verdict, and nothing to compile.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    for name in _WARM:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("this process has threads, and a fork would not")
    gc.freeze()


def _pytest(arguments: Sequence[str], mutant: str | None) -> int:
    import pytest

    os.chdir(ROOT)
    if mutant is not None:
        os.environ[VARIABLE] = mutant
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", *arguments]))


def _failed(output: str) -> list[str]:
    return re.findall(r"^FAILED (.+?)(?: - .*)?$", output, re.M)


def verdict(mutant: Mutant, done: Finished) -> tuple[str, str]:
    """killed, SURVIVED or ERROR, and the test that noticed or what went wrong."""
    if done.status == TESTS_PASSED:
        return "SURVIVED", mutant.tests
    if done.status is None:
        return "ERROR", f"stopped after {done.seconds:.0f} s\n{done.output[-2000:]}"
    noticed = _failed(done.output)
    if done.status != TESTS_FAILED or not noticed or _BROKEN.search(done.output):
        return "ERROR", done.output[-4000:]
    return "killed", noticed[0]


def run(chosen: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, str, str, float]]:
    """Each mutant with its verdict, what there is to tell, and seconds, as they come."""
    tasks = [partial(_pytest, ["-x", *shlex.split(m.tests)], m.name) for m in chosen]
    for done in run_all(tasks, jobs):
        mutant = chosen[done.task]
        yield mutant, *verdict(mutant, done), done.seconds


def failing_anyway(tests: Sequence[str], jobs: int) -> set[str]:
    """Those of the tests that fail without any mutant, and so notice nothing."""
    names = sorted(set(tests))
    size = max(1, math.ceil(len(names) / jobs))
    parts = [names[i : i + size] for i in range(0, len(names), size)]
    failing: set[str] = set()
    for done in run_all([partial(_pytest, part, None) for part in parts], jobs, limit=1200):
        if done.status not in (TESTS_PASSED, TESTS_FAILED):
            raise RuntimeError(done.output[-4000:])
        failing.update(_failed(done.output))
    return failing


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
    warm()
    noticed: dict[str, str] = {}
    for mutant, found, told, seconds in run(chosen, options.jobs):
        if found == "killed":
            noticed[mutant.name] = told
        print(f"{mutant.name:52} {seconds:5.1f} s  {found}: {told}", flush=True)
    failing = failing_anyway(list(noticed.values()), options.jobs)
    for name, test in noticed.items():
        if test in failing:
            print(f"{name}: ERROR: without the mutant {test} fails too")
    killed = sum(test not in failing for test in noticed.values())
    print(f"{len(chosen)} mutants, {killed} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
