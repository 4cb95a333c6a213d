"""Trilith: fused Triton kernels, transformer blocks, and a plugin contract.

Names are loaded when they are first asked for; the import needs neither Triton nor a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from trilith._version import __version__

_HOME = {
    "op": "trilith.kernels",
    "explain": "trilith.kernels",
    "kernels": "",
    "blocks": "",
    "plugins": "",
}

__all__ = ["__version__", "blocks", "explain", "kernels", "op", "plugins"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trilith' has no attribute {name!r}")
    home = _HOME[name]
    return getattr(import_module(home), name) if home else import_module(f"trilith.{name}")


def __dir__() -> list[str]:
    return __all__
