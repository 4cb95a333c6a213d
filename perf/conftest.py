"""The benchmarks time what users run: real kernels on a GPU, the reference path on a CPU."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        help="write one JSON file for each family of benchmarks as soon as its last one is done",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("perf: unset TRITON_INTERPRET; Triton's interpreter is not timed")
    # Threads that wait for each other turn times of small calls on a busy machine into noise.
    torch.set_num_threads(1)
    if config.option.results is not None:
        config.pluginmanager.register(ResultsByFamily(config))


class ResultsByFamily:
    """Nothing that was measured is lost when a later family fails or the machine is taken away."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.folder: Path = config.option.results
        self.measured: list[Any] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
        benchmark = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is not None and benchmark.stats is not None and not benchmark.has_error:
            self.measured.append(benchmark.stats)
        if self.measured and (nextitem is None or nextitem.path != item.path):
            self._write(item.path.stem.removeprefix("bench_"))
            self.measured = []

    def _write(self, family: str) -> None:
        hook = self.config.hook
        results = hook.pytest_benchmark_generate_json(
            config=self.config,
            benchmarks=self.measured,
            include_data=True,
            machine_info=hook.pytest_benchmark_generate_machine_info(config=self.config),
            commit_info=hook.pytest_benchmark_generate_commit_info(config=self.config),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{family}.json.part"
        unfinished.write_text(json.dumps(results, indent=1, default=str))
        unfinished.replace(self.folder / f"{family}.json")
