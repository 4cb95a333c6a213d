"""Figures against a committed baseline: which got worse, better, came, or went.

Figures are counted, so less is better, and the tolerance is for rounding only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = Mapping[str, Mapping[str, float]]

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Change:
    """One figure of one subject that is not what it was; None where there is none."""

    subject: str
    figure: str
    before: float | None
    after: float | None

    @property
    def is_worse(self) -> bool:
        if self.before is None:
            return False
        return self.after is None or self.after > self.before

    def __str__(self) -> str:
        name = f"{self.subject}: {self.figure}"
        if self.before is None:
            return f"new     {name} is {self.after:g}"
        if self.after is None:
            return f"WORSE   {name} was {self.before:g} and is no longer counted"
        verdict = "WORSE  " if self.is_worse else "better "
        return f"{verdict} {name} was {self.before:g}, is {self.after:g}"


def changes(before: Figures, after: Figures) -> list[Change]:
    """Every difference, those that are worse first."""
    found = []
    for subject in sorted({*before, *after}):
        old, new = before.get(subject, {}), after.get(subject, {})
        for figure in sorted({*old, *new}):
            change = Change(subject, figure, old.get(figure), new.get(figure))
            if not _same(change.before, change.after):
                found.append(change)
    return sorted(found, key=lambda change: not change.is_worse)


def _same(before: float | None, after: float | None) -> bool:
    if before is None or after is None:
        return before is after
    return abs(after - before) <= _TOLERANCE * max(abs(before), abs(after))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned too; the first column to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    lines = []
    for row in [head, rule, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
