"""python -m trilith.plugins: what each command prints, and its exit status."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from tests.plugins.negative import OPS, PLUGINS, SOUND, Bringing
from tests.support.devices import DEVICE
from trilith.plugins import Manager, PluginWarning, Registry, interpreter, report
from trilith.plugins import __main__ as command_line
from trilith.plugins.__main__ import listing, main
from trilith.plugins.conformance import CHECKS, compare
from trilith.plugins.conformance.modules import MODULE_CHECKS
from trilith.plugins.manager import explain
from trilith.pytest_plugin import _cases


@pytest.fixture
def bring(monkeypatch):
    """Adds an op by a plugin to a manager that the commands take for the only one."""
    own = Manager(Registry())
    own.load([])
    monkeypatch.setattr(command_line, "manager", own)

    def bring(spec):
        assert own.add(f"acme-layers:{spec.name.partition('::')[2]}", lambda: Bringing(spec))

    yield bring
    for op in own.registry.ops():
        op.destroy()


def test_list_shows_what_each_plugin_brings_and_why_others_failed(monkeypatch):
    registry = Registry()
    own = Manager(registry)
    own.add("acme-layers:good", lambda: Bringing(SOUND))
    with pytest.warns(PluginWarning):
        own.add("acme-layers:clash", PLUGINS["name_clash"][0])
    own.disabled.append("acme-layers:off")
    lines = listing(own)
    registry.op(SOUND.name).destroy()
    assert lines[0] == "acme-layers:good"
    assert lines[1].split() == ["op", "negative::sound"]
    assert "acme-layers:off: disabled by the environment" in lines
    assert lines[-1].startswith("acme-layers:clash: failed at trilith_register_ops: ValueError: op")


def test_list_shows_our_own_ops(capsys):
    assert main(["list"]) == 0
    assert "trilith::rms_norm" in capsys.readouterr().out


def test_explain(capsys, monkeypatch):
    assert main(["explain", "trilith::rms_norm", "--device", DEVICE, "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    assert "trilith (priority 0): takes torch.float32, torch.float16, torch.bfloat16" in out
    assert "takes: the reference (PyTorch)\n" in out


def test_explain_assumes_what_the_function_does(capsys):
    assert main(["explain", "trilith::rms_norm"]) == 0
    assert capsys.readouterr().out.strip() == str(explain("trilith::rms_norm")).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "acme::nothing"], "no op 'acme::nothing'; there are: "),
        (["explain", "rms_norm"], "no op 'rms_norm', did you mean trilith::rms_norm?; there are: "),
        (["explain", "trilith::rms_norm", "--device", "gpu"], "must be a device of torch"),
        (["explain", "trilith::rms_norm", "--dtype", "bf17"], "must be a dtype of torch"),
        (["check", "nobody"], "no op or plugin 'nobody'; ops are: "),
        (["new", "A"], "name must be lower-case"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_status_is_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tool", [lambda: main(["check", "acme"]), lambda: list(_cases(("acme",)))])
def test_without_numpy_the_checks_say_that_they_need_it(monkeypatch, capsys, tool):
    monkeypatch.setattr(interpreter, "find_spec", lambda name: None)
    try:
        status, said = tool(), capsys.readouterr().err
    except ModuleNotFoundError as error:
        status, said = 2, str(error)
    assert status == 2
    assert "need numpy: pip install numpy" in said


def test_check_passes_with_a_table(capsys, bring):
    bring(SOUND)
    assert main(["check", "negative::sound", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "negative::sound by negative" in out
    assert "verdict" in out
    assert "FAILED" not in out
    assert out.endswith("all passed\n")


def test_check_fails_with_the_check_its_hint_and_what_was_wrong(capsys, bring):
    spec, check = OPS["wrong_gradient"]
    bring(spec)
    assert main(["check", "negative::wrong_gradient", "--device", "cpu"]) == 1
    assert not compare.observers
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith(f"  {check} ")]
    assert "FAILED" in lines[at]
    assert "one gradient per parameter" in lines[at]
    assert "gradient of x: element" in lines[at + 1]


def test_every_check_has_a_hint_and_no_other():
    assert set(report.HINTS) == {check.__name__ for check in CHECKS}
    assert set(report.MODULE_HINTS) == {check.__name__ for check in MODULE_CHECKS}
    assert all(report.HINTS.values())


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.0, "0%"), (0.25, "25%"), (9.99, "999%"), (11825.77, ">999%"), (math.nan, ">999%")],
)
def test_figures_far_beyond_a_bound_are_capped(share, shown):
    assert report.percent(share) == shown


def test_check_takes_the_name_of_a_distribution(capsys, bring):
    bring(SOUND)
    assert main(["check", "acme-layers", "--device", "cpu"]) == 0
    assert "negative::sound by negative" in capsys.readouterr().out


def test_new(tmp_path, capsys):
    assert main(["new", "acme", "--into", str(tmp_path)]) == 0
    assert (tmp_path / "acme-layers" / "acme_layers" / "plugin.py").exists()
    assert "pip install" in capsys.readouterr().out
    assert main(["new", "acme", "--into", str(tmp_path)]) == 2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_check_runs_kernels_in_the_interpreter_without_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "trilith.plugins", "check", "trilith::dropout"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trilith::dropout by trilith" in done.stdout


def test_check_refuses_a_python_without_assertions():
    code = """
from trilith.plugins.__main__ import main
for name in ("trilith::dropout", "rms_norm"):
    try:
        main(["check", name])
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-O", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout.count("the conformance checks are assert statements") == 2, done.stderr
    assert "passed" not in done.stdout
