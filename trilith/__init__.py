"""Trilith: fused Triton kernels, transformer blocks, and a plugin contract.

Names are loaded when they are first asked for; the import needs neither Triton nor a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trilith._version import __version__

if TYPE_CHECKING:
    from trilith import blocks, inspect, kernels, plugins
    from trilith._explain import explain
    from trilith.blocks.drop_in.attention_interface import register_transformers
    from trilith.blocks.fuse import fuse, unfuse
    from trilith.kernels.attention.torch_flash import register_flash_attention
    from trilith.plugins.manager import find_op as op
    from trilith.plugins.manager import trace, use_implementation

_FUNCTIONS = {
    "op": ("trilith.plugins.manager", "find_op"),
    "explain": ("trilith._explain", "explain"),
    "fuse": ("trilith.blocks.fuse", "fuse"),
    "register_flash_attention": (
        "trilith.kernels.attention.torch_flash",
        "register_flash_attention",
    ),
    "register_transformers": (
        "trilith.blocks.drop_in.attention_interface",
        "register_transformers",
    ),
    "trace": ("trilith.plugins.manager", "trace"),
    "unfuse": ("trilith.blocks.fuse", "unfuse"),
    "use_implementation": ("trilith.plugins.manager", "use_implementation"),
}
_MODULES = ("blocks", "inspect", "kernels", "plugins")

__all__ = [
    "__version__",
    "blocks",
    "explain",
    "fuse",
    "inspect",
    "kernels",
    "op",
    "plugins",
    "register_flash_attention",
    "register_transformers",
    "trace",
    "unfuse",
    "use_implementation",
]


if not TYPE_CHECKING:  # to which a name that is none is an error

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"trilith.{name}")
        if name in _FUNCTIONS:
            module, function = _FUNCTIONS[name]
            return getattr(import_module(module), function)
        raise AttributeError(f"module 'trilith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
