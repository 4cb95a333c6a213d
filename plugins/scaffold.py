"""Writes a new distribution from the templates in skeleton/."""

from __future__ import annotations

import re
from keyword import iskeyword
from pathlib import Path

from trilith.plugins.hookspecs import CONTRACT, PROJECT

_TEMPLATES = Path(__file__).parent / "skeleton"
_SUFFIX = ".template"
_PLACEHOLDER = "vendor"
_TAKEN = (PROJECT, _PLACEHOLDER, "reference", "torch", "aten", "prim", "prims")


def write(name: str, into: Path) -> Path:
    """Write the distribution `<name>-layers`; where it is.

    Raises:
        ValueError: the name is no namespace.
        FileExistsError: something of that name is there already.
    """
    if not _is_free(name):
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        suggestion = f"; {plain} would do" if _is_free(plain) else ""
        raise ValueError(
            "new: name must be lower-case letters, digits and _, no keyword, and not one of "
            f"{', '.join(_TAKEN)}, got {name!r}{suggestion}"
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


def _is_free(name: str) -> bool:
    plain = re.fullmatch(r"[a-z][a-z0-9_]*", name)
    return bool(plain) and name not in _TAKEN and not iskeyword(name)


def _filled(text: str, name: str) -> str:
    distribution = name.replace("_", "-")
    text = text.replace("vendor-layers", f"{distribution}-layers")
    return text.replace("(CONTRACT)", str(CONTRACT)).replace(_PLACEHOLDER, name)
