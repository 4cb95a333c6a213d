"""Results of the benchmarks, as pytest-benchmark writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    def provider(self) -> str:
        return self.info["provider"]

    @property
    def subject(self) -> tuple[str, str, str]:
        """What all providers of one row of a table share."""
        return self.info["workload"], self.info["dtype"], self.info["direction"]


def load(paths: Iterable[Path]) -> dict[str, Benchmark]:
    """Benchmarks by name, of files or of all JSON files in folders."""
    found: dict[str, Benchmark] = {}
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            for entry in json.loads(file.read_text()).get("benchmarks", []):
                stats = entry["stats"]
                name = entry["name"]
                found[name] = Benchmark(
                    name,
                    stats.get("data", []),
                    stats["median"],
                    entry["extra_info"],
                    entry.get("fullname", name),
                )
    return found
