"""Two results files of the benchmarks, paired by name: what got slower, and is it sure?

    python -m perf.compare BEFORE.json AFTER.json

Each may be a folder of results. A benchmark is a regression only if a bootstrap confidence interval
of the ratio of medians excludes no change and the effect is above 5 %. Exits with 1 if there is
one, with 2 if the results cannot be compared: another GPU or processor, another version of PyTorch
or Triton.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perf.gate import markdown
from perf.results import Benchmark, load

SMALLEST_EFFECT = 0.05
CONFIDENCE = 0.99
_RESAMPLES = 4000
_SEED = 0
_MUST_MATCH = ("device", "gpu", "processor", "torch", "triton")


class Incomparable(Exception):
    """Why two results say nothing about each other."""


@dataclass(frozen=True)
class Comparison:
    """Time after over time before, with its confidence interval."""

    name: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1 and self.ratio > 1 + SMALLEST_EFFECT:
            return "SLOWER"
        if self.high < 1 and self.ratio < 1 - SMALLEST_EFFECT:
            return "faster"
        return "same"


def compared(name: str, before: Sequence[float], after: Sequence[float]) -> Comparison:
    """The ratio of medians, and its bootstrap interval; the same for the same samples."""
    generator = np.random.default_rng(_SEED)
    ratios = _medians(after, generator) / _medians(before, generator)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Comparison(name, float(np.median(after) / np.median(before)), float(low), float(high))


def _medians(samples: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    drawn = generator.integers(len(values), size=(_RESAMPLES, len(values)))
    return np.median(values[drawn], axis=1)


def compare(
    before: dict[str, Benchmark], after: dict[str, Benchmark]
) -> tuple[list[Comparison], list[str]]:
    """Comparisons of the benchmarks in both, slowest first, and a line for each in one only.

    Raises:
        Incomparable: the two ran on different hardware or software, or share no benchmark.
    """
    _require_alike(before, after)
    both = before.keys() & after.keys()
    if not both:
        raise Incomparable("cannot compare: no benchmark is in both results")
    found = [compared(name, before[name].samples, after[name].samples) for name in sorted(both)]
    alone = [f"missing after: {name}" for name in sorted(before.keys() - both)]
    alone += [f"new: {name}" for name in sorted(after.keys() - both)]
    return sorted(found, key=lambda c: -c.ratio), alone


def _require_alike(before: dict[str, Benchmark], after: dict[str, Benchmark]) -> None:
    for fact in _MUST_MATCH:
        values = [
            sorted({b.environment.get(fact, "unknown") for b in results.values()})
            for results in (before, after)
        ]
        if values[0] != values[1]:
            old, new = (" and ".join(v) or "nothing" for v in values)
            raise Incomparable(f"cannot compare: {fact} was {old} before, is {new} after")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    try:
        found, alone = compare(load([options.before]), load([options.after]))
    except Incomparable as why:
        print(why)
        return 2
    head = ["benchmark", "after / before", f"{CONFIDENCE:.0%} interval", "verdict"]
    rows = [[c.name, f"{c.ratio:.3f}", f"{c.low:.3f} .. {c.high:.3f}", c.verdict] for c in found]
    print(markdown(head, rows))
    print("\n".join(alone))
    slower = [c for c in found if c.verdict == "SLOWER"]
    print(f"{len(found)} compared, {len(slower)} slower, {len(alone)} in one only")
    if slower:
        print("a regression on a machine that others use may be noise: run it again to be sure")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
