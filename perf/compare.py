"""Two runs of the benchmarks, paired by name: what got slower, and is it sure?

    python -m perf.compare BEFORE.json AFTER.json    # results, or folders of them
    python -m perf.compare ../before . --select perf/bench_norms.py    # checkouts

Two checkouts, each with the environment that `make env` makes there, are run in turns: before,
after, after, before, and so on. Each pair of runs is compared within itself, so that a machine that
gets warmer or busier meanwhile counts on both sides.

A benchmark is a regression only if a bootstrap confidence interval of the ratio of medians excludes
no change and the effect is above 5 %, and if both hold again when it is run again: of checkouts in
both, of results in this checkout, which should be what AFTER.json was taken from.

Exits with 1 if there is a regression. Exits with 2 if that cannot be said: the results cannot be
compared or not confirmed here (another GPU or processor, another version of PyTorch or Triton),
have no samples or too few of them, or lack a benchmark after that was there before. --no-rerun
judges by the results alone, --allow-missing takes what is missing for removed. What is counted is
left to perf.counted.
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
from tqdm import tqdm

from perf.gate import markdown
from perf.results import Benchmark, Unreadable, load

SMALLEST_EFFECT = 0.05
CONFIDENCE = 0.99
FEWEST_SAMPLES = 5  # the interval of one has no width, that of a few hardly any
SLOWER, TOO_FEW = "SLOWER", "too few samples"
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
    samples: int  # of the side that has fewer
    again: Comparison | None = None

    @property
    def verdict(self) -> str:
        if self.samples < FEWEST_SAMPLES:
            return TOO_FEW
        if self.low > 1 and self.ratio > 1 + SMALLEST_EFFECT:
            again = SLOWER if self.again is None else self.again.verdict
            return again if again in (SLOWER, TOO_FEW) else "same: slower once, not again"
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
        [
            resampled_medians(after, generator) / resampled_medians(before, generator)
            for before, after in rounds
        ]
    )
    drawn = generator.integers(len(rounds), size=(len(rounds), _RESAMPLES))
    spread = np.median(np.take_along_axis(resampled, drawn, 0), axis=0)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(spread, [tail, 100 - tail])
    samples = min(sum(map(len, side)) for side in zip(*rounds, strict=True))
    return Comparison(name, float(np.median(ratios)), float(low), float(high), samples)


def resampled_medians(samples: Samples, generator: np.random.Generator) -> np.ndarray:
    """Medians of resamples. A resample is as many uniform draws of a rank, so that its middle one
    is beta-distributed, and of an even number the next one is the least of those above it."""
    values = np.sort(np.asarray(samples, dtype=np.float64))
    count, middle = len(values), (len(values) + 1) // 2
    low = generator.beta(middle, count - middle + 1, size=_RESAMPLES)
    high = low
    if count % 2 == 0:
        high = 1 - (1 - low) * generator.random(_RESAMPLES) ** (1 / middle)
    low, high = (values[(u * count).astype(int).clip(max=count - 1)] for u in (low, high))
    return (low + high) / 2


def compare(rounds: Rounds) -> tuple[list[Comparison], list[str], list[str]]:
    """Comparisons of the benchmarks timed in every run, slowest first; a line for each that is
    missing of those timed before; and one for each that is new.

    Raises:
        Incomparable: the runs were on different hardware or software, or share no benchmark.
    """
    rounds = [(_timed(before), _timed(after)) for before, after in rounds]
    for before, after in rounds:
        _require_alike(before, after)
    befores, afters = ([set(r[i]) for r in rounds] for i in (0, 1))
    both = set.intersection(*befores, *afters)
    if not both:
        raise Incomparable("cannot compare: no timed benchmark is in both results")
    found = [
        compared(name, [(b[name].samples, a[name].samples) for b, a in rounds])
        for name in sorted(both)
    ]
    known, still = set.union(*befores), set.intersection(*afters)
    missing = [f"missing after: {name}" for name in sorted(known - still)]
    missing += [f"missing in a run before: {name}" for name in sorted((known & still) - both)]
    new = [f"new: {name}" for name in sorted(set.union(*afters) - known)]
    return sorted(found, key=lambda c: -c.ratio), missing, new


def _timed(results: Results) -> Results:
    return {name: benchmark for name, benchmark in results.items() if benchmark.is_timed}


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
    slower = [c.name for c in found if c.verdict == SLOWER]
    if not slower:
        return found
    again, *_ = compare(rerun([known[name].test for name in slower]))
    fresh = {c.name: c for c in again}
    lost = [name for name in slower if name not in fresh]
    if lost:
        raise Incomparable(f"cannot confirm: {', '.join(lost)} did not run again")
    return [replace(c, again=fresh.get(c.name)) for c in found]


def pairs(before: Path, after: Path, tests: Sequence[str], count: int, run: Runner) -> Rounds:
    """`count` pairs of runs; which of the two goes first alternates."""
    rounds: list[tuple[Results, Results]] = []
    for i in tqdm(range(count), "pairs of runs"):
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
        return _loaded(file)


def _is_checkout(path: Path) -> bool:
    return (path / "pyproject.toml").exists()


def judge(
    options: argparse.Namespace, run: Runner
) -> tuple[list[Comparison], list[str], list[str]]:
    """All comparisons, confirmed where they must be, and what is missing and new.

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

    found, missing, new = compare(rounds)
    if options.rerun:
        try:
            found = confirmed(found, rounds[0][1], lambda tests: _only_shared(rerun(tests)))
        except Incomparable as why:
            raise Incomparable(f"{why}\n--no-rerun judges by these results alone") from why
    return found, missing, new


def _loaded(path: Path) -> Results:
    try:
        results = load([path])
    except Unreadable as error:
        raise Incomparable(str(error)) from error
    without = [name for name, benchmark in results.items() if not benchmark.has_samples]
    if without:
        raise Incomparable(
            f"cannot compare: {path} has no finite positive samples of {without[0]}, one of "
            f"{len(without)}; save with --results, --benchmark-json or --benchmark-save-data"
        )
    return results


def _only_shared(rounds: Rounds) -> Rounds:
    """Without the benchmarks that did not run again."""
    return [({name: b[name] for name in b.keys() & a.keys()}, a) for b, a in rounds]


def main(arguments: Sequence[str] | None = None, run: Runner = run_benchmarks) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--no-rerun", dest="rerun", action="store_false")
    parser.add_argument("--allow-missing", action="store_true")
    parser.add_argument("--rounds", type=_positive, default=4, help="pairs of runs of checkouts")
    parser.add_argument("--select", nargs="+", default=[], help="pytest arguments, for checkouts")
    options = parser.parse_args(arguments)
    try:
        found, missing, new = judge(options, run)
    except Incomparable as why:
        print(why)
        return 2
    head = ["benchmark", "after / before", f"{CONFIDENCE:.0%} interval", "again", "verdict"]
    rows = [[c.name, f"{c.ratio:.3f}", _interval(c), _again(c), c.verdict] for c in found]
    print(markdown(head, rows))
    print("\n".join(missing + new))
    slower, few = (sum(c.verdict == verdict for c in found) for verdict in (SLOWER, TOO_FEW))
    print(f"{len(found)} compared, {slower} slower, {len(missing)} missing, {len(new)} new")
    if few:
        print(f"cannot say: {few} with fewer than {FEWEST_SAMPLES} samples; run more rounds")
    if missing and not options.allow_missing:
        print(f"cannot say: {len(missing)} missing; --allow-missing if they were removed")
    if slower:
        return 1
    return 2 if few or (missing and not options.allow_missing) else 0


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _interval(c: Comparison) -> str:
    return f"{c.low:.3f} .. {c.high:.3f}"


def _again(c: Comparison) -> str:
    return "" if c.again is None else f"{c.again.ratio:.3f}, {_interval(c.again)}"


if __name__ == "__main__":
    sys.exit(main())
