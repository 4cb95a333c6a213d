"""Which plugins are installed, in which order, and which of them the environment allows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from trilith.plugins.hookspecs import PROJECT

# Our own entry point, for where a stale *.egg-info beside the sources hides that of the install.
OWN = EntryPoint(name=PROJECT, value="trilith.blocks.builtin", group=PROJECT)


def installed() -> list[EntryPoint]:
    found = list(entry_points(group=PROJECT))
    return found if any(_distribution(e) == PROJECT for e in found) else [OWN, *found]


def _distribution(entry_point: EntryPoint) -> str:
    if entry_point is OWN:
        return PROJECT
    return entry_point.dist.name if entry_point.dist else ""


def in_order(found: Iterable[EntryPoint]) -> tuple[list[tuple[str, EntryPoint]], list[str]]:
    """Ours first, then by distribution and name; and the names that the environment leaves out."""
    named: dict[tuple[bool, str, str], EntryPoint] = {}
    for entry_point in found:
        distribution = _distribution(entry_point)
        named.setdefault((distribution != PROJECT, distribution, entry_point.name), entry_point)
    chosen, left_out = [], []
    for (is_foreign, distribution, name), entry_point in sorted(named.items()):
        full = f"{distribution}:{name}"
        if is_foreign and not _allowed({distribution, name, full}):
            left_out.append(full)
        else:
            chosen.append((full, entry_point))
    return chosen, left_out


def _allowed(names: set[str]) -> bool:
    if os.environ.get("TRILITH_DISABLE_PLUGIN_AUTOLOAD"):
        return False
    known = {_normal(name) for name in names}
    if known & _listed("TRILITH_DISABLED_PLUGINS"):
        return False
    return "TRILITH_PLUGINS" not in os.environ or bool(known & _listed("TRILITH_PLUGINS"))


def _listed(variable: str) -> set[str]:
    return {_normal(name) for name in os.environ.get(variable, "").split(",") if name.strip()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
