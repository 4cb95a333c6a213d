"""How a layer becomes part of the library: specs, the op machinery, the registry."""

if __name__ == "plugins":
    raise ImportError("import trilith.plugins, not plugins: the folder is mapped by the package")

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
    "TRITON_DEVICES",
    "BackwardContext",
    "Cost",
    "Implementation",
    "ModuleSpec",
    "Op",
    "OpSpec",
    "Registry",
    "Sample",
    "registry",
]
