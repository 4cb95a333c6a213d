"""What attention's public functions make of their options, or refuse."""

from __future__ import annotations

import math
from typing import Any

import torch

from trilith.kernels._runtime.checks import require
from trilith.plugins import registry


def score_window(op: str, causal: bool | str, window: Any) -> tuple[str, int, int]:
    """(alignment, how far left and right of the diagonal is seen), negative for any distance."""
    alignment, right = "bottom_right", -1
    if causal is not False:
        rule = 'be False, True, "top_left" or "bottom_right"'
        require(causal in ("top_left", "bottom_right"), op, "causal", rule, repr(causal))
        alignment, right = str(causal), 0
    before, after = sides(op, window)
    return alignment, before, after if right < 0 else 0


def sides(op: str, window: Any) -> tuple[int, int]:
    """How far left and right a window reaches, negative for any distance."""
    if window is None:
        return -1, -1
    valid = isinstance(window, tuple | list) and len(window) == 2
    valid = valid and all(
        n is None or (isinstance(n, int | torch.SymInt) and n >= 0) for n in window
    )
    require(valid, op, "window", "be (left, right), each None or an int from 0 on", window)
    before, after = (-1 if n is None else n for n in window)
    return before, after


def known_softcap(op: str, softcap: float | None) -> float:
    """0 for none."""
    if softcap is None:
        return 0.0
    require(0 < softcap < math.inf, op, "softcap", "be positive and finite", softcap)
    return softcap


def known_score_mod(op: str, name: str | None) -> str:
    """The name, "" for none."""
    if name is None:
        return ""
    names = registry.score_mod_names()
    require(name in names, op, "score_mod", f"be one of those registered: {names}", repr(name))
    return name


def known_precision(op: str, precision: str) -> str:
    require(precision in ("ieee", "tf32"), op, "precision", 'be "ieee" or "tf32"', repr(precision))
    return precision
