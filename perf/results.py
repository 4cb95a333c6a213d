"""Results of the benchmarks, as pytest-benchmark writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Unreadable(Exception):
    """Why a path has no results, in one line."""


@dataclass(frozen=True)
class Benchmark:
    """One row: its samples in seconds, what the suite noted about it, and how pytest calls it."""

    name: str
    samples: list[float]
    median: float
    info: dict[str, Any]
    test: str

    @property
    def environment(self) -> dict[str, str]:
        return self.info.get("environment", {})

    @property
    def is_timed(self) -> bool:
        """Whether it is about its time; a counted row's is how long the counting took."""
        return "figures" not in self.info

    @property
    def has_samples(self) -> bool:
        return bool(self.samples) and all(math.isfinite(s) and s > 0 for s in self.samples)

    @property
    def provider(self) -> str:
        return self.info["provider"]

    @property
    def subject(self) -> tuple[str, str, str]:
        """What all providers of one row of a table share."""
        return self.info["workload"], self.info["dtype"], self.info["direction"]


def load(paths: Iterable[Path]) -> dict[str, Benchmark]:
    """Benchmarks by name, of files or of all JSON files in folders.

    Raises:
        Unreadable: there are none, or a file is not one of pytest-benchmark's.
    """
    found: dict[str, Benchmark] = {}
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        own = {benchmark.name: benchmark for file in files for benchmark in _read(file)}
        if not own:
            raise Unreadable(f"cannot read {path}: it has no results")
        found |= own
    return found


def _read(file: Path) -> list[Benchmark]:
    try:
        return [_benchmark(entry) for entry in json.loads(file.read_text())["benchmarks"]]
    except OSError as error:
        raise Unreadable(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"cannot read {file}: not of pytest-benchmark, {error!r}") from error


def _benchmark(entry: dict[str, Any]) -> Benchmark:
    name, stats, info = str(entry["name"]), entry["stats"], dict(entry["extra_info"])
    median = float(stats["median"])
    if not (math.isfinite(median) and median > 0):
        raise ValueError(f"{name} took {median} s")
    if "environment" in info:
        info["environment"] = {fact: str(value) for fact, value in info["environment"].items()}
    samples = [float(sample) for sample in stats.get("data") or []]
    return Benchmark(name, samples, median, info, str(entry.get("fullname", name)))
