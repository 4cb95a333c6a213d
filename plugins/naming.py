"""When an op's name may be taken again: its plugin is removed, or its source is run again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trilith.plugins.spec import OpSpec

if TYPE_CHECKING:
    from trilith.plugins.op import Op

NOBODY = "no plugin"


def require_replaceable(previous: Op, spec: OpSpec) -> None:
    """That no plugin brought the previous op, and that the new one is of the same source.

    So it is in a notebook whose cell is run again, and in a module that is reloaded.
    """
    owner = previous.owner_of(previous.spec.provider)
    said = f"op {spec.name} is already defined, by {owner}"
    if owner != NOBODY:
        raise ValueError(f"{said}; trilith.plugins.manager.remove({owner!r}) takes it out")
    first, second = _source(previous.spec), _source(spec)
    if first != second or "<locals>" in first:
        raise ValueError(f"{said}, with the forward {first}; its destroy() frees the name")


def _source(spec: OpSpec) -> str:
    return f"{spec.forward.__module__}.{spec.forward.__qualname__}"
