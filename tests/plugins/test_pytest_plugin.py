"""The pytest plugin: light where it is not used, and plain about what it is asked wrongly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.environments import clean

UNRELATED = """
import sys

def test_nothing_heavy_is_imported():
    assert not {"torch", "triton", "trilith.plugins"} & set(sys.modules)

def test_the_environment_is_left_alone():
    import os
    assert "TRITON_INTERPRET" not in os.environ
"""


def _pytest(
    folder: Path, source: str, *options: str, ini: str = ""
) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(source)
    (folder / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers"]
    return subprocess.run(
        [*command, *options], cwd=folder, env=clean(), capture_output=True, text=True, timeout=300
    )


def test_an_unrelated_run_imports_nothing_of_ours(tmp_path):
    done = _pytest(tmp_path, UNRELATED)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("", 'mark it @pytest.mark.trilith_conformance("name of your op")'),
        ('@pytest.mark.trilith_conformance("acme::nothing")', "no op or plugin 'acme::nothing'"),
    ],
)
def test_what_is_asked_wrongly_is_said(tmp_path, marker, message):
    source = f"import pytest\n{marker}\ndef test_it(trilith_check):\n    trilith_check()\n"
    done = _pytest(tmp_path, source)
    assert done.returncode != 0
    assert message in done.stdout


def test_three_lines_are_a_test_for_each_check(tmp_path):
    source = """
import pytest

@pytest.mark.trilith_conformance("trilith::dropout")
def test_conformance(trilith_check):
    trilith_check()
"""
    names = "gradients_match_reference or input_layouts"
    done = _pytest(tmp_path, source, "-v", "-k", names, ini="trilith_interpret = true")
    assert done.returncode == 0, done.stdout
    for name in ("gradients_match_reference-bfloat16", "input_layouts-float32"):
        assert f"test_conformance[trilith::dropout-trilith-{name}] PASSED" in done.stdout
