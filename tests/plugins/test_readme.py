"""Every snippet of plugins/README.md runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.plugins.environments import GENERATED_TESTS, fresh, run

README = Path(__file__).parents[2] / "plugins" / "README.md"

pytestmark = pytest.mark.slow


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def test_python(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(snippets("python")))
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    out = run(sys.executable, script, cwd=tmp_path, **interpreted)
    assert "tutorial::softsign on" in out
    assert len(snippets("python")) >= 6


def test_shell(tmp_path):
    python = fresh(tmp_path)
    (script,) = snippets("sh")
    path = f"{python.parent}:/usr/bin:/bin"
    out = run("bash", "-euc", script, cwd=tmp_path, PATH=path, PIP_NO_INDEX="1")
    assert "wrote acme-layers" in out
    assert f"{GENERATED_TESTS} passed" in out
    assert "acme-layers:acme 0.1.0" in out
    assert "acme::relu2 by acme" in out
    assert out.endswith("all passed\n")


def test_every_hook_field_and_variable_of_the_contract_is_told():
    from dataclasses import fields

    from trilith.plugins import CONTRACT, OpSpec
    from trilith.plugins.manager import _HOOKS

    text = README.read_text()
    assert f"Version {CONTRACT[0]}.{CONTRACT[1]}" in text
    missing = [hook for hook in _HOOKS if f"`{hook}(" not in text]
    missing += [f.name for f in fields(OpSpec) if f"`{f.name}" not in text]
    sources = "".join(path.read_text() for path in README.parent.glob("*.py"))
    missing += [v for v in set(re.findall(r"TRILITH_[A-Z_]+[A-Z]", sources)) if v not in text]
    assert not missing
