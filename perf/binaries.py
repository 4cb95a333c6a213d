"""Figures of the kernels' binaries, from the ahead-of-time survey, and their gate.

Kept for each variant of a kernel: its architecture, dtypes and launch options. A survey may compile
a sample of them, so that a variant which is launched but not in the sample is not compared. One
that no call launches any more is worse until `--update`: its calls have other tiles, stages or
alignment now, and their binaries nothing to be compared with. A new variant is judged by
`tests/test_aot.py`, which allows no spill that is not on its list.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from perf import gate
from tests.support.aot import SAMPLED
from tests.support.known import FILE
from tests.support.launches import title

Figures = dict[str, dict[str, float]]
SPILLED, INSTRUCTIONS = "spilled bytes", "spill instructions"
NARROW, PROBLEMS = "narrow loads", "problems"


def survey() -> tuple[list[dict[str, Any]], set[str]]:
    """Reports on the sample of each architecture, from processes that compile what is not known;
    and the titles of all that is launched."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    reports: list[dict[str, Any]] = []
    launched: set[str] = set()
    for arch, most in SAMPLED.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reports.json"
            command = [sys.executable, "-m", "tests.support.aot", "--arch", arch]
            answer = subprocess.run(
                [*command, "--most", *map(str, most), "--known", str(FILE), "--json", str(path)],
                env=environ,
                capture_output=True,
                text=True,
            )
            if not path.exists():
                raise RuntimeError(f"ahead-of-time compiling failed:\n{answer.stderr[-2000:]}")
            found = json.loads(path.read_text())
            reports += found["reports"]
            launched |= {*found["launched"]}
    return reports, launched


def figures(reports: Iterable[Mapping[str, Any]]) -> Figures:
    """The worst of each variant; several of one name differ in alignment and sizes."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for r in reports:
        own = found[title(r["kernel"], r["arch"], r["variant"], r["op"])]
        for figure, value in (
            (SPILLED, r["spilled"]),
            (INSTRUCTIONS, r["spill_instructions"]),
            (NARROW, round(1 - r["wide"], 4)),
            (PROBLEMS, len(r["problems"])),
        ):
            own[figure] = max(own.get(figure, 0), value)
    return dict(found)


def changes(
    before: gate.Figures, after: gate.Figures, launched: Collection[str]
) -> list[gate.Change]:
    """Differences of the variants that are in both; and, on the architectures of those launched,
    variants that no longer are, with the new ones of their kernel."""
    archs = {_arch(name) for name in launched}
    shared = before.keys() & after.keys()
    gone = {k for k in before if _arch(k) in archs and k not in launched} - shared
    kernels = {_kernel_and_arch(k) for k in gone}
    new = {k for k in after.keys() - shared if _kernel_and_arch(k) in kernels}
    return gate.changes({k: before[k] for k in shared | gone}, {k: after[k] for k in shared | new})


def _kernel_and_arch(name: str) -> str:
    return name.partition(" [")[0]


def _arch(name: str) -> str:
    return _kernel_and_arch(name).rpartition(" ")[2]


def table(found: gate.Figures) -> str:
    """By kernel: bytes spilled by the worst variant of each architecture; wide loads."""
    by_kernel: defaultdict[str, defaultdict[str, list[Mapping[str, float]]]]
    by_kernel = defaultdict(lambda: defaultdict(list))
    for name, own in found.items():
        kernel, arch, _ = name.split(" ", 2)
        by_kernel[kernel][arch].append(own)
    rows = []
    for kernel, archs in sorted(by_kernel.items()):
        spills = [max((v[SPILLED] for v in archs[a]), default=0) for a in SAMPLED]
        own = archs["sm_90"]
        narrow = sum(v[NARROW] for v in own) / max(1, len(own))
        variants = sum(map(len, archs.values()))
        rows.append([kernel, f"{variants}", *(f"{s:g}" for s in spills), f"{narrow:.1%}"])
    head = ["kernel", "variants", *(f"{SPILLED}, {a}" for a in SAMPLED), f"{NARROW}, sm_90"]
    return gate.markdown(head, rows)
