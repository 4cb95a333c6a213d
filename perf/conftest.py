"""The benchmarks time what users run: real kernels on a GPU, the reference path on a CPU."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Generator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.resume import PASSED_BEFORE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        help="keep one JSON file for each family of benchmarks, written anew after each of them",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("perf: unset TRITON_INTERPRET; Triton's interpreter is not timed")
    # Threads that wait for each other turn times of small calls on a busy machine into noise.
    torch.set_num_threads(1)
    if config.option.results is not None:
        _require_writable(config.option.results)
        config.pluginmanager.register(ResultsByFamily(config))


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"--results {folder} cannot be written: {error.strerror}"
        raise pytest.UsageError(reason) from error


class ResultsByFamily:
    """Nothing that was measured is lost when a later case fails or the machine is taken away."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.folder: Path = config.option.results
        self.measured: defaultdict[str, list[Any]] = defaultdict(list)
        self.before: dict[str, list[Any]] = {}

    @cached_property
    def facts(self) -> dict[str, Any]:
        hook = self.config.hook
        return {
            "machine_info": hook.pytest_benchmark_generate_machine_info(config=self.config),
            "commit_info": hook.pytest_benchmark_generate_commit_info(config=self.config),
        }

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Torn down whether or not the results can be kept, so that the next case is run."""
        try:
            return (yield)
        finally:
            self._keep(item)

    def _keep(self, item: pytest.Item) -> None:
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is not None and benchmark.stats is not None and not benchmark.has_error:
            family = item.path.stem.removeprefix("bench_")
            self.measured[family].append(benchmark.stats)
            self._write(family)

    def _write(self, family: str) -> None:
        results = self.config.hook.pytest_benchmark_generate_json(
            config=self.config,
            benchmarks=self.measured[family],
            include_data=True,
            **self.facts,
        )
        if family not in self.before:
            self.before[family] = self._measured_before(family)
        results["benchmarks"] = self.before[family] + results["benchmarks"]
        unfinished = self.folder / f"{family}.json.part"
        unfinished.write_text(json.dumps(results, indent=1, default=str))
        unfinished.replace(self.folder / f"{family}.json")

    def _measured_before(self, family: str) -> list[Any]:
        """Rows of an unfinished run, where this one goes on from it."""
        file = self.folder / f"{family}.json"
        passed = self.config.stash.get(PASSED_BEFORE, frozenset())
        rows = json.loads(file.read_text())["benchmarks"] if passed and file.exists() else []
        return [row for row in rows if row["fullname"] in passed]
