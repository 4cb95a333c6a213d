"""Faults put into the library on purpose, each of which the tests must notice.

    python -m tests.support.mutants            # all of them
    python -m tests.support.mutants NAME ...   # some
    python -m tests.support.mutants --list

A mutant replaces a piece of source text while its module is imported; no file is changed. It runs
in a process of its own with the tests that should notice it, and is killed if one of them fails.
A mutant whose text is no longer in the source is an error, not a success.
"""

from __future__ import annotations

import argparse
import importlib.util
import linecache
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

VARIABLE = "TRILITH_MUTANT"
ROOT = Path(__file__).resolve().parents[2]
TESTS_FAILED = 1


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `module`; `tests` are the pytest arguments that must notice."""

    name: str
    module: str
    old: str
    new: str
    tests: str


class _Loader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_source(fullname)
        assert source is not None
        if self.mutant.old not in source:
            raise RuntimeError(
                f"mutant {self.mutant.name}: its text is not in {self.mutant.module}"
            )
        source = source.replace(self.mutant.old, self.mutant.new)
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


def _run(mutant: Mutant) -> tuple[Mutant, str, float]:
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        + mutant.tests.split(),
        cwd=ROOT,
        env={**os.environ, VARIABLE: mutant.name, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - start
    if run.returncode == TESTS_FAILED and "its text is not in" not in run.stdout:
        return mutant, "killed", seconds
    if run.returncode == 0:
        return mutant, "SURVIVED", seconds
    return mutant, "ERROR\n" + run.stdout[-2000:] + run.stderr[-2000:], seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants to run; none for all")
    parser.add_argument("--list", action="store_true", help="only list them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    known = _by_name()
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no mutant {', '.join(unknown)}; --list shows them")
    chosen = [known[name] for name in options.names] or list(known.values())
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:40} {mutant.module}")
        return 0
    killed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, verdict, seconds in pool.map(_run, chosen):
            killed += verdict == "killed"
            print(f"{mutant.name:40} {seconds:6.1f} s  {verdict}", flush=True)
    print(f"{len(chosen)} mutants, {killed} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
