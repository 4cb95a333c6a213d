"""What is counted, not timed: the same on every machine, so that each change can be held to it.

    python -m perf.counted [NAME ...] [--check | --update] [--binaries] [--json FILE]

Kernels run in Triton's interpreter. Parts of names, as softmax, count only those. --check exits
with 1 if a figure is worse than in perf/baselines/counted.json; --update writes the figures there.
--binaries adds spills and narrow loads of a sample of every kernel, compiled ahead of time for
each architecture; its baseline is kept per Triton version, and a variant of it that no call
launches any more is worse too. On CI tests/test_aot.py holds the same binaries to it. It is of all
kernels, and so takes no NAME, nor does --update.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from perf import binaries, gate
from perf.counting import (
    ALL,
    GOALS,
    ONE,
    OPS,
    SAVED,
    TWO,
    Figures,
    count_all,
    count_peers,
    subjects,
)
from perf.meters.dispatch import DIRECTIONS, host_microseconds
from tests.support import known

BASELINE = Path(__file__).parent / "baselines" / "counted.json"


def op_table(figures: Figures) -> str:
    memory = _both("bytes / minimal", "requests / minimal")
    counts = _both("launches", "launches, strided")
    return _table_of_ops(figures, [*memory, "saved / minimal", *counts])


def arithmetic_table(figures: Figures) -> str:
    return _table_of_ops(figures, _both("products / minimal", "operations", "special", "reduced"))


def _both(*kinds: str) -> list[str]:
    return [f"{direction} {kind}" for kind in kinds for direction in ("forward", "backward")]


def _table_of_ops(figures: Figures, columns: Sequence[str]) -> str:
    rows = []
    for name in (w.name for w in OPS if w.name in figures):
        found = [figures[name].get(column) for column in columns]
        rows.append([name, *("—" if figure is None else f"{figure:.4g}" for figure in found)])
    return gate.markdown(["op, bf16", *columns], rows)


def block_table(figures: Figures, peers: Figures) -> str:
    head = ["block, bf16", SAVED, "in elements", "eager's", "torch.compile's", "goal"]
    for direction in ("forward", "backward"):
        head += [f"{direction} launches", "eager's", "torch.compile's"]
    rows = []
    for kind, goal in GOALS.items():
        ours, eager = figures[f"{kind} block"], peers[f"{kind} eager"]
        compiled = peers[f"{kind} compiled"]
        elements = [f"{p[SAVED] / 2:.2f}" for p in (ours, eager, compiled)]
        row = [kind, f"{ours[SAVED]:g}", *elements, f"{goal}"]
        for key in ("forward launches", "backward launches"):
            row += [f"{p[key]:g}" for p in (ours, eager, compiled)]
        rows.append(row)
    return gate.markdown(head, rows)


def compile_table(figures: Figures) -> str:
    """Compilations by the end of one, two, and all sizes."""
    rows = [
        [name.removesuffix(" under torch.compile"), *(f"{own[k]:g}" for k in (ONE, TWO, ALL))]
        for name, own in figures.items()
        if ONE in own
    ]
    return gate.markdown(["under torch.compile", ONE, TWO, ALL], rows)


def host_table(host: Figures) -> str:
    head = ["host us a call", "op", "autograd.Function", "ratio"]
    rows = [[d, *(f"{host[d][k]:.1f}" for k in ("op", "plain", "ratio"))] for d in DIRECTIONS]
    return gate.markdown(head, rows)


def chosen(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the subjects to count; what cannot be done is refused before counting."""
    parser = argparse.ArgumentParser(prog="python -m perf.counted", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names, as softmax; none for all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--binaries", action="store_true", help="also compile ahead of time")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail on a figure worse than before")
    action.add_argument("--update", action="store_true", help="make the figures the baseline")
    options = parser.parse_args(arguments)
    names = list(subjects(options.names))
    if not names:
        parser.error(f"nothing is called {' or '.join(options.names)}")
    if options.names and options.update:
        parser.error("a baseline has every figure: --update takes no names")
    if options.names and options.binaries:
        parser.error(
            "the sample is of all kernels: --binaries takes no names; "
            "python -m tests.support.aot --filter NAME compiles those of one"
        )
    if options.check and not BASELINE.exists():
        parser.error(f"there is no {BASELINE} to check against; --update writes it")
    if options.json:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written: {error.strerror}")
    return options, names


def main(arguments: Sequence[str] | None = None) -> int:
    options, names = chosen(arguments)
    start = time.perf_counter()
    torch.set_num_threads(1)
    figures, seconds = count_all(names, os.cpu_count() or 1)
    results = {"figures": figures, "torch": torch.__version__, "seconds": seconds, "binaries": {}}
    parts = [op_table(figures), arithmetic_table(figures), compile_table(figures)]
    if not options.names:
        parts += _all_else(results, options.binaries, options.update)
    print("\n\n".join(parts))
    print(f"\ncounted in {time.perf_counter() - start:.0f} s")
    status = _judge(results, options.names, options.check, options.update)
    if options.json:
        gate.write(options.json, results)
    return status


def _all_else(results: dict[str, Any], with_binaries: bool, update: bool) -> list[str]:
    """Blocks beside their peers, the host's time, and binaries: their tables, and into results."""
    host: Figures = {}
    for direction in DIRECTIONS:
        cost: dict[str, float] = host_microseconds(direction)
        host[direction] = cost | {"ratio": cost["op"] / cost["plain"]}
    peers = count_peers()
    results |= {"peers": peers, "host": host}
    parts = [block_table(results["figures"], peers), host_table(host)]
    if with_binaries:
        reports, launched = binaries.survey()
        compiled = binaries.figures(reports)
        results |= {"binaries": {version("triton"): compiled}, "launched": sorted(launched)}
        parts.append(binaries.table(compiled))
        if update:
            known.write(known.FILE, reports)
    return parts


def _judge(results: dict[str, Any], names: list[str], check: bool, update: bool) -> int:
    if not (check or update):
        return 0
    baseline = gate.read(BASELINE)
    compiled, before = baseline.get("binaries", {}), baseline.get("figures", {})
    if names:
        before = {name: own for name, own in before.items() if any(n in name for n in names)}
    found = gate.changes(before, results["figures"])
    for triton, own in results["binaries"].items():
        found += binaries.changes(compiled.get(triton, {}), own, results["launched"])
    print("\n".join(map(str, found)) or "every figure is as it was")
    if update:
        kept = {k: results[k] for k in ("figures", "torch")}
        gate.write(BASELINE, kept | {"binaries": compiled | results["binaries"]})
        return 0
    return int(any(change.is_worse for change in found))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: nothing was written")
