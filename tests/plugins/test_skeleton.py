"""`python -m trilith.plugins new`: what it writes installs, and its tests pass as generated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.plugins.environments import GENERATED_TESTS, run
from trilith.plugins.scaffold import write


def _run(*command: str, cwd: Path, **variables: str) -> str:
    return run(sys.executable, "-m", *command, cwd=cwd, **variables)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    into = tmp_path_factory.mktemp("new")
    folder = write("zeta_labs", into)
    pip = ("pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    _run(*pip, "--target", str(into / "site"), str(folder), cwd=into)
    return folder, {"PYTHONPATH": str(into / "site")}


def test_the_files_are_named_and_nothing_is_left_of_the_template(generated):
    folder, _ = generated
    assert folder.name == "zeta-labs-layers"
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"pyproject.toml", "README.md", "zeta_labs_layers/relu2.py"} <= written
    assert {"tests/test_conformance.py", "tests/test_training.py"} <= written
    for name in written:
        if not name.startswith("build"):
            assert "vendor" not in (folder / name).read_text().lower(), name


def test_what_it_writes_is_in_order(generated):
    folder, environment = generated
    pytest.importorskip("ruff", reason="a development tool")
    rules = ("--isolated", "--line-length", "100")
    _run("ruff", "check", *rules, "--select", "E,F,I,B,UP", ".", cwd=folder, **environment)
    _run("ruff", "format", "--check", *rules, ".", cwd=folder, **environment)


def test_it_is_listed_once_installed(generated):
    folder, environment = generated
    listed = _run("trilith.plugins", "list", cwd=folder, **environment)
    assert "zeta-labs-layers:zeta_labs 0.1.0" in listed
    assert "zeta_labs::relu2" in listed
    assert "zeta_labs.relu2_mlp" in listed


@pytest.mark.slow
def test_its_tests_pass_as_generated(generated):
    folder, environment = generated
    out = _run("pytest", "-q", "-p", "no:cacheprovider", cwd=folder, **environment)
    assert " failed" not in out
    assert f"{GENERATED_TESTS} passed" in out


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("Acme", "; acme would do"),
        ("a-b", "; a_b would do"),
        *((name, "") for name in ("trilith", "Trilith", "vendor", "", "1a", "class", "aten")),
    ],
)
def test_a_name_that_is_no_namespace_is_refused(tmp_path, name, instead):
    with pytest.raises(ValueError, match=f"name must be lower-case .*, got '{name}'{instead}$"):
        write(name, tmp_path)


def test_nothing_is_overwritten(tmp_path):
    write("acme", tmp_path)
    with pytest.raises(FileExistsError, match="acme-layers must not exist already"):
        write("acme", tmp_path)
