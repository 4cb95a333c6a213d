"""What the compiler makes of every kernel, without a GPU: registers, spills, load widths, MMA.

Of the launches that `tests/support/launches.py` finds. Needs a process without TRITON_INTERPRET:

    python -m tests.support.aot [--filter NAME] [--arch sm_90 ...] [--known FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tests.support import known
from tests.support.architectures import TARGETS, assume_target
from tests.support.binary import Report, judge, read
from tests.support.entries import entry_name
from tests.support.launches import Launch, captured, import_kernels, thinned, title, variant
from trilith.kernels._runtime.keys import settle_keys

# Launches that CI compiles, and the baseline has, beside one of each entry of attention's tables:
# so many of each kernel with dots, and of each without, whose code hardly depends on the
# architecture. The command above compiles all.
SAMPLED = {arch: (12, 6) if arch == "sm_90" else (6, 2) for arch in TARGETS}

_launches: list[Launch] = []
_known: dict[str, dict[str, Any]] = {}  # by `key`, what need not be compiled again


def _innermost(error: BaseException) -> str:
    """Triton wraps an error once for each function around it; the first one says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"[:500]


def examine(launch: Launch) -> Report:
    """Compile one launch and read its binary, unless it is known."""
    start = time.perf_counter()
    assume_target(launch.arch)
    report = Report(launch.op, launch.sample, launch.kernel.__name__, launch.arch, variant(launch))
    report.entry = entry_name(launch.entry) if launch.entry else ""
    settle_keys((launch.kernel, *launch.options.values()))
    key = known.key_of(launch.kernel, launch.args, launch.options) if _known else ""
    if key in _known:
        report = replace(report, key=key, is_known=True, **_known[key])
        judge(report)
        return report
    try:
        with contextlib.redirect_stderr(sys.stdout):
            compiled = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    except Exception as error:
        report.problems.append(f"does not compile: {_innermost(error)}")
        return report
    read(compiled, report)
    judge(report)
    report.seconds = time.perf_counter() - start
    return report


def _examine_at(index: int) -> Report:
    torch.set_num_threads(1)
    return examine(_launches[index])


def survey(
    archs: list[str], name: str = "", jobs: int = 2, source: str = "", most: Sequence[int] = ()
) -> tuple[list[Report], list[str]]:
    """Reports of the distinct launches on the given architectures, compiled in `jobs` processes;
    and the titles of all launches, also of those that `most` leaves out."""
    import_kernels()
    reports: list[Report] = []
    titles: set[str] = set()
    _launches.clear()
    for arch in archs:
        launches, failures = captured(arch, name, source)
        titles |= {title(x.kernel.__name__, arch, variant(x), x.op) for x in launches}
        _launches.extend(thinned(launches, most) if most else launches)
        reports.extend(failures)
    if jobs == 1:
        return reports + [examine(launch) for launch in _launches], sorted(titles)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        reports += pool.map(_examine_at, range(len(_launches)), chunksize=1)
    return reports, sorted(titles)


def table(reports: list[Report]) -> str:
    head = ("kernel", "arch", "regs", "spill B", "spill ins", "shared", "wide", "mma", "variant")
    rows = [
        (
            r.kernel,
            r.arch,
            str(r.registers),
            str(r.spilled),
            str(r.spill_instructions),
            str(r.shared),
            f"{r.wide:.0%}",
            str(r.mma),
            f"{r.variant} <- {r.op} {r.sample}",
        )
        for r in sorted(reports, key=lambda r: (r.kernel, r.variant, r.arch))
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    lines = []
    for row in [head, *rows]:
        cells = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[-1]]))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.aot", description=__doc__)
    parser.add_argument("--filter", default="", help="part of a kernel's or an op's name")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", metavar="FILE", help="write the reports there")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--most",
        nargs="+",
        type=int,
        default=(),
        help="launches per kernel and architecture; a second number is for kernels without dots",
    )
    parser.add_argument("--cases", default="", help="a module with cases(), instead of the shapes")
    parser.add_argument("--known", type=Path, help="compile what is not in this file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set; ahead-of-time compiling needs a process without it")
    start = time.perf_counter()
    if options.known:
        _known.update(known.read(options.known))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        reports, titles = survey(
            options.arch, options.filter, options.jobs, options.cases, options.most
        )
    if options.json:
        written = {"reports": [asdict(r) for r in reports], "launched": titles}
        Path(options.json).write_text(json.dumps(written))
    print(table(reports))
    failed = [r for r in reports if r.problems]
    for r in failed:
        print(f"{r.arch} {r.kernel} [{r.variant}] of {r.op} {r.sample}: {'; '.join(r.problems)}")
    fresh = sum(not r.is_known for r in reports)
    print(
        f"{len(reports)} binaries, {fresh} of them compiled, {len(failed)} with problems, "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
