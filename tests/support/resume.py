"""A run that ends in time: what it does not get to is left for the next, which repeats nothing.

    pytest -p tests.support.resume --until EPOCH --passed FILE

A test that would start after --until, in seconds as `date +%s` tells them, is left; the run then
fails, and says how many were. FILE gets the name of each test that passed, at once, below what it
passed with; a run that finds it there with the same sources, GPU, torch and triton takes the rest,
which may be nothing. Who wants to start anew removes FILE.
"""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("trilith", "plugins", "kernels", "blocks", "examples", "perf", "tests")
LEFT = "no time left; run it again"
PASSED_BEFORE = pytest.StashKey[frozenset[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, help="start no test after this time, in epoch seconds")
    parser.addoption("--passed", type=Path, help="the file that says what need not run again")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.stash[PASSED_BEFORE] = frozenset(config.workerinput["passed_before"])
        return
    file = config.option.passed
    lines = file.read_text().splitlines() if file is not None and file.exists() else []
    known = lines[1:] if lines[:1] == [passed_with()] else []
    config.stash[PASSED_BEFORE] = frozenset(known)
    config.pluginmanager.register(_Record(file, known))


def passed_with() -> str:
    """What a test's outcome depends on, but for the weather."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = f"torch {torch.__version__}, triton {version('triton')}"
    return f"# sources {digest.hexdigest()[:16]}, GPU {gpu}, {versions}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = config.stash[PASSED_BEFORE]
    done = [item for item in items if _plain(item.nodeid) in before]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if _plain(item.nodeid) not in before]


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.option.until
    if until is not None and time.time() > until:
        pytest.skip(LEFT)


def _plain(name: str) -> str:
    """Without the group by which xdist shares tests out."""
    return name.partition("@")[0]


class _Record:
    """Of the process that the others report to: what passed, and what was left."""

    def __init__(self, file: Path | None, known: list[str]) -> None:
        self.file, self.known = file, known
        self.called: set[str] = set()
        self.left = 0
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join([passed_with(), *known, ""]))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["passed_before"] = self.known

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.left += report.skipped and LEFT in str(report.longrepr)
        if report.when == "call" and report.passed:
            self.called.add(report.nodeid)
        elif report.when == "teardown" and report.passed and report.nodeid in self.called:
            self._note(_plain(report.nodeid))

    def _note(self, name: str) -> None:
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(f"{name}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif self.known and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.left:
            terminalreporter.write_line(f"{self.left} left: {LEFT}", yellow=True)
