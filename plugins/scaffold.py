"""Writes a new distribution from the templates in skeleton/."""

from __future__ import annotations

import re
from pathlib import Path

from trilith.plugins.hookspecs import CONTRACT, PROJECT

_TEMPLATES = Path(__file__).parent / "skeleton"
_SUFFIX = ".template"
_PLACEHOLDER = "vendor"


def write(name: str, into: Path) -> Path:
    """Write the distribution `<name>-layers`; where it is.

    Raises:
        ValueError: the name is no namespace.
        FileExistsError: something of that name is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in (PROJECT, _PLACEHOLDER):
        raise ValueError(
            f"new: name must be lower-case letters, digits and _, and not {PROJECT!r} or "
            f"{_PLACEHOLDER!r}, got {name!r}"
        )
    folder = into / f"{name.replace('_', '-')}-layers"
    if folder.exists():
        raise FileExistsError(f"new: {folder} must not exist already")
    for template in sorted(_TEMPLATES.rglob(f"*{_SUFFIX}")):
        relative = str(template.relative_to(_TEMPLATES)).removesuffix(_SUFFIX)
        target = folder / relative.replace("package/", f"{name}_layers/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_filled(template.read_text(), name))
    return folder


def _filled(text: str, name: str) -> str:
    distribution = name.replace("_", "-")
    text = text.replace("vendor-layers", f"{distribution}-layers")
    return text.replace("(CONTRACT)", str(CONTRACT)).replace(_PLACEHOLDER, name)
