"""examples/plugin is built as a wheel, installed in an environment of its own, and tested there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.plugins.environments import fresh, run

SOURCE = Path(__file__).parents[2] / "examples" / "plugin"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The interpreter of a fresh environment that has the wheel, and a copy of the tests.

    It sees this environment's packages, so nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "--quiet")
    offline = ("--no-deps", "--no-index")
    wheels = folder / "wheels"
    run(
        *pip, "wheel", *offline, "--no-build-isolation", "-w", wheels, folder / "source", cwd=folder
    )
    (wheel,) = wheels.glob("acme_layers-*.whl")
    python = fresh(folder)
    run(*pip, "--python", python, "install", *offline, wheel, cwd=folder)
    tests = folder / "tests"
    shutil.copytree(folder / "source" / "tests", tests)
    shutil.copy(folder / "source" / "pyproject.toml", folder)
    return python, folder


def test_it_is_listed_with_what_it_brings(installed):
    python, folder = installed
    listed = run(python, "-m", "trilith.plugins", "list", cwd=folder)
    assert "acme-layers:acme 0.1.0" in listed
    for brought in ("acme::relu2_gate", "trilith::rms_norm by acme", "acme.relu2_mlp"):
        assert brought in listed
    where = run(python, "-c", "import acme_layers; print(acme_layers.__file__)", cwd=folder)
    assert Path(where.strip()).is_relative_to(folder / "venv")


def test_its_implementation_runs_by_name_alone(installed):
    python, folder = installed
    explained = run(
        python, "-m", "trilith.plugins", "explain", "trilith::rms_norm", "--device", "cpu",
        cwd=folder,
    )  # fmt: skip
    assert "acme (priority -1)" in explained
    assert "[acme-layers:acme]" in explained


def test_its_own_tests_pass(installed):
    python, folder = installed
    out = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder)
    assert " failed" not in out
    assert " passed" in out
