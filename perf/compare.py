"""Two runs of the benchmarks, paired by name: what got slower, and is it sure?

    python -m perf.compare BEFORE.json AFTER.json    # results, or folders of them
    python -m perf.compare ../before . --select perf/bench_norms.py    # checkouts

Two checkouts, each with the environment that `make env` makes there, are run in turns: before,
after, after, before, and so on. Each pair of runs is compared within itself, so that a machine that
gets warmer or busier meanwhile counts on both sides.

A benchmark is a regression only if a bootstrap confidence interval of the ratio of medians excludes
no change and the effect is above 5 %, and if both hold again when it is run again: of checkouts in
both, of results in this checkout, which should be what AFTER.json was taken from.

Exits with 1 if there is a regression, with 2 if the results cannot be compared or not confirmed
here: another GPU or processor, another version of PyTorch or Triton. --no-rerun judges by the
results alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from perf.gate import markdown
from perf.results import Benchmark, load

SMALLEST_EFFECT = 0.05
CONFIDENCE = 0.99
_RESAMPLES = 4000
_SEED = 0
_MUST_MATCH = ("device", "gpu", "processor", "torch", "triton")
_ROOT = Path(__file__).parents[1]

Samples = Sequence[float]
Results = dict[str, Benchmark]
Rounds = Sequence[tuple[Results, Results]]
# (checkout, tests) -> results; no tests are all.
Runner = Callable[[Path, Sequence[str]], Results]


class Incomparable(Exception):
    """Why two results say nothing about each other."""


@dataclass(frozen=True)
class Comparison:
    """Time after over time before, with its confidence interval; of both runs if there are two."""

    name: str
    ratio: float
    low: float
    high: float
    again: Comparison | None = None

    @property
    def verdict(self) -> str:
        if self.low > 1 and self.ratio > 1 + SMALLEST_EFFECT:
            if self.again is not None and self.again.verdict != "SLOWER":
                return "same: slower once, not again"
            return "SLOWER"
        if self.high < 1 and self.ratio < 1 - SMALLEST_EFFECT:
            return "faster"
        return "same"


def compared(name: str, rounds: Sequence[tuple[Samples, Samples]]) -> Comparison:
    """The ratio of medians and its bootstrap interval; the same for the same samples.

    Each round is one pair of runs; of several, the median ratio, resampled by round and sample.
    """
    generator = np.random.default_rng(_SEED)
    ratios = [np.median(after) / np.median(before) for before, after in rounds]
    resampled = np.stack(
        [_medians(after, generator) / _medians(before, generator) for before, after in rounds]
    )
    drawn = generator.integers(len(rounds), size=(len(rounds), _RESAMPLES))
    spread = np.median(np.take_along_axis(resampled, drawn, 0), axis=0)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(spread, [tail, 100 - tail])
    return Comparison(name, float(np.median(ratios)), float(low), float(high))


def _medians(samples: Samples, generator: np.random.Generator) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    drawn = generator.integers(len(values), size=(_RESAMPLES, len(values)))
    return np.median(values[drawn], axis=1)


def compare(rounds: Rounds) -> tuple[list[Comparison], list[str]]:
    """Comparisons of the benchmarks in every run, slowest first, and a line for each of the others.

    Raises:
        Incomparable: the runs were on different hardware or software, or share no benchmark.
    """
    for before, after in rounds:
        _require_alike(before, after)
    befores, afters = (set.intersection(*(set(r[i]) for r in rounds)) for i in (0, 1))
    both = befores & afters
    if not both:
        raise Incomparable("cannot compare: no benchmark is in both results")
    found = [
        compared(name, [(b[name].samples, a[name].samples) for b, a in rounds])
        for name in sorted(both)
    ]
    alone = [f"missing after: {name}" for name in sorted(befores - both)]
    alone += [f"new: {name}" for name in sorted(afters - both)]
    return sorted(found, key=lambda c: -c.ratio), alone


def _require_alike(before: Results, after: Results) -> None:
    for fact in _MUST_MATCH:
        values = [
            sorted({b.environment.get(fact, "unknown") for b in results.values()})
            for results in (before, after)
        ]
        if values[0] != values[1]:
            old, new = (" and ".join(v) or "nothing" for v in values)
            raise Incomparable(f"cannot compare: {fact} was {old} before, is {new} after")


def confirmed(
    found: list[Comparison], known: Results, rerun: Callable[[Sequence[str]], Rounds]
) -> list[Comparison]:
    """The comparisons, those that say slower with another one of fresh samples.

    Raises:
        Incomparable: what runs again does so on other hardware or software.
    """
    slower = [c.name for c in found if c.verdict == "SLOWER"]
    if not slower:
        return found
    again, _ = compare(rerun([known[name].test for name in slower]))
    fresh = {c.name: c for c in again}
    lost = [name for name in slower if name not in fresh]
    if lost:
        raise Incomparable(f"cannot confirm: {', '.join(lost)} did not run again")
    return [replace(c, again=fresh.get(c.name)) for c in found]


def pairs(before: Path, after: Path, tests: Sequence[str], count: int, run: Runner) -> Rounds:
    """`count` pairs of runs; which of the two goes first alternates."""
    rounds: list[tuple[Results, Results]] = []
    for i in range(count):
        order = (before, after) if i % 2 == 0 else (after, before)
        results = {checkout: run(checkout, tests) for checkout in order}
        rounds.append((results[before], results[after]))
    return rounds


def run_benchmarks(checkout: Path, tests: Sequence[str]) -> Results:
    """Run them with the checkout's own environment, which imports the checkout's own code."""
    python = checkout.resolve() / ".venv" / "bin" / "python"
    if not python.exists():
        raise Incomparable(f"cannot run {checkout}: it has no environment; run make env there")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [str(python), "-m", "pytest", *(tests or ["perf"]), "-q"]
        answer = subprocess.run(
            [*command, f"--benchmark-json={file}"], cwd=checkout, capture_output=True, text=True
        )
        if answer.returncode not in (0, 1) or not file.exists() or not file.stat().st_size:
            last = (answer.stdout + answer.stderr)[-2000:]
            raise Incomparable(f"cannot run the benchmarks of {checkout}:\n{last}")
        return load([file])


def _is_checkout(path: Path) -> bool:
    return (path / "pyproject.toml").exists()


def judge(options: argparse.Namespace, run: Runner) -> tuple[list[Comparison], list[str]]:
    """All comparisons, confirmed where they must be, and what is in one only.

    Raises:
        Incomparable: they cannot be compared or confirmed, with the reason.
    """
    before, after = options.before, options.after
    if _is_checkout(before) != _is_checkout(after):
        raise Incomparable("cannot compare: give two checkouts or two results")
    rerun: Callable[[Sequence[str]], Rounds]
    if _is_checkout(before):
        rounds = pairs(before, after, options.select, options.rounds, run)

        def rerun(tests: Sequence[str]) -> Rounds:
            return pairs(before, after, tests, options.rounds, run)

    else:
        rounds = [(_loaded(before), _loaded(after))]

        def rerun(tests: Sequence[str]) -> Rounds:
            return [(rounds[0][0], run(_ROOT, tests))]

    found, alone = compare(rounds)
    if options.rerun:
        try:
            found = confirmed(found, rounds[0][1], lambda tests: _only_shared(rerun(tests)))
        except Incomparable as why:
            raise Incomparable(f"{why}\n--no-rerun judges by these results alone") from why
    return found, alone


def _loaded(path: Path) -> Results:
    try:
        results = load([path])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Incomparable(f"cannot read results from {path}: {error!r}") from error
    if not results:
        raise Incomparable(f"cannot compare: no results in {path}")
    return results


def _only_shared(rounds: Rounds) -> Rounds:
    """Without the benchmarks that did not run again."""
    return [({name: b[name] for name in b.keys() & a.keys()}, a) for b, a in rounds]


def main(arguments: Sequence[str] | None = None, run: Runner = run_benchmarks) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--no-rerun", dest="rerun", action="store_false")
    parser.add_argument("--rounds", type=int, default=4, help="pairs of runs of two checkouts")
    parser.add_argument("--select", nargs="+", default=[], help="pytest arguments, for checkouts")
    options = parser.parse_args(arguments)
    try:
        found, alone = judge(options, run)
    except Incomparable as why:
        print(why)
        return 2
    head = ["benchmark", "after / before", f"{CONFIDENCE:.0%} interval", "again", "verdict"]
    rows = [[c.name, f"{c.ratio:.3f}", _interval(c), _again(c), c.verdict] for c in found]
    print(markdown(head, rows))
    print("\n".join(alone))
    slower = [c for c in found if c.verdict == "SLOWER"]
    print(f"{len(found)} compared, {len(slower)} slower, {len(alone)} in one only")
    return 1 if slower else 0


def _interval(c: Comparison) -> str:
    return f"{c.low:.3f} .. {c.high:.3f}"


def _again(c: Comparison) -> str:
    return "" if c.again is None else f"{c.again.ratio:.3f}, {_interval(c.again)}"


if __name__ == "__main__":
    sys.exit(main())
