"""Functions that a call goes through: what Python does on the host, the same on every machine."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_TORCH = str(Path(torch.__file__).parent)


def calls(function: Callable[[], Any]) -> Counter[str]:
    """Counts by name what `function()` calls: Python's functions, and C's where Python calls them.

    Torch's own Python and comprehensions are left out: they differ between versions.
    """
    counts: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event in ("call", "c_call") and not frame.f_code.co_filename.startswith(_TORCH):
            name = frame.f_code.co_name if event == "call" else arg.__name__
            if not name.startswith("<"):
                counts[name] += 1

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    counts.subtract(["setprofile"])
    return counts
