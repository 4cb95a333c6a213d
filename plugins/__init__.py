"""How a layer becomes part of the library: specs, the op machinery, the registry, the hooks."""

if __name__ == "plugins":
    raise ImportError("import trilith.plugins, not plugins: the folder is mapped by the package")

from trilith.plugins.fusion import may_fuse
from trilith.plugins.hookspecs import CONTRACT, hookimpl
from trilith.plugins.manager import Failure, Manager, manager, trace, use_implementation
from trilith.plugins.op import Op
from trilith.plugins.registry import Registry, registry
from trilith.plugins.selection import PluginWarning, SelectionKey
from trilith.plugins.spec import (
    TRITON_DEVICES,
    BackwardContext,
    Cost,
    Implementation,
    ModuleSpec,
    OpSpec,
    Sample,
    ScoreMod,
)
from trilith.plugins.trace import OpCalled

__all__ = [
    "CONTRACT",
    "TRITON_DEVICES",
    "BackwardContext",
    "Cost",
    "Failure",
    "Implementation",
    "Manager",
    "ModuleSpec",
    "Op",
    "OpCalled",
    "OpSpec",
    "PluginWarning",
    "Registry",
    "Sample",
    "ScoreMod",
    "SelectionKey",
    "hookimpl",
    "manager",
    "may_fuse",
    "registry",
    "trace",
    "use_implementation",
]
