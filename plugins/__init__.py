"""How a layer becomes part of the library: specs, the op machinery, the registry, the hooks."""

if __name__ == "plugins":
    raise ImportError("import trilith.plugins, not plugins: the folder is mapped by the package")

from trilith.plugins.hookspecs import CONTRACT, hookimpl
from trilith.plugins.manager import Failure, Manager, PluginWarning, manager
from trilith.plugins.op import Op
from trilith.plugins.registry import Registry, registry
from trilith.plugins.spec import (
    TRITON_DEVICES,
    BackwardContext,
    Cost,
    Implementation,
    ModuleSpec,
    OpSpec,
    Sample,
)

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
    "OpSpec",
    "PluginWarning",
    "Registry",
    "Sample",
    "hookimpl",
    "manager",
    "registry",
]
