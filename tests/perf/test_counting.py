"""What a slower function turns red: the figures that the gate holds, on small shapes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perf import gate
from tests.support.devices import INTERPRETING
from trilith import kernels

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="counts loads and stores by interpreting")


@pytest.fixture
def counted(monkeypatch):
    """`perf.counted`, whose counting takes no time."""
    from perf import counted

    def count_all(names, jobs):
        return {name: {"forward launches": 99.0} for name in names}, dict.fromkeys(names, 0.0)

    monkeypatch.setattr(counted, "count_all", count_all)
    return counted


@pytest.fixture(scope="module")
def counting():
    from perf import counting

    return counting


def as_copied(x):
    return kernels.softmax(x.contiguous())


def with_a_copied_gradient(x):
    y = kernels.softmax(x)
    y.register_hook(lambda dy: dy.contiguous())
    return y


def with_more_saved(x):
    return kernels.softmax(x) * x.detach().exp().mean()


def twice(x):
    kernels.softmax(x)
    return kernels.softmax(x)


@pytest.mark.parametrize(
    ("slower", "figure"),
    [
        (as_copied, "forward launches, strided"),
        (with_a_copied_gradient, "backward launches, strided"),
        (with_more_saved, "saved / minimal"),
        (twice, "forward requests / minimal"),
        (twice, "forward launches"),
        (twice, "forward operations"),
        (twice, "forward special"),
        (twice, "forward reduced"),
    ],
)
def test_a_slower_function_is_seen(counting, slower, figure):
    workload = counting.softmax(16, 256)
    before = counting.count_op(workload)
    after = counting.count_op(replace(workload, trilith=slower))
    worse = [c for c in gate.changes({"op": before}, {"op": after}) if c.is_worse]
    assert figure in {change.figure for change in worse}


def of_wider_operands(q, k, v):
    return kernels.attention(*(t.float() for t in (q, k, v)), causal=True).to(q.dtype)


def test_products_of_wider_operands_are_seen(counting):
    workload = counting.attention(1, 1, 32, 16)
    before = counting.count_op(workload)
    after = counting.count_op(replace(workload, trilith=of_wider_operands))
    for figure in ("forward products / minimal", "backward products / minimal"):
        assert after[figure] == 2 * before[figure] > 0


# Of each op's kind the quickest to count: elementwise with dropout, without, and with products.
QUICK = ("dropout-p0.1-M64-N1024", "rotary-B1-H8-T256-D64", "attention-causal-B1-H2-T256-D64")


@pytest.mark.parametrize("name", QUICK)
def test_the_committed_figures_are_what_is_counted_and_not_less_either(counting, name):
    """To the gate a figure that falls is better, also where its meter sees no longer all."""
    from perf.counted import BASELINE

    committed = gate.read(BASELINE)
    if committed["torch"].partition("+")[0] != torch.__version__.partition("+")[0]:
        pytest.skip("torch's own operators are counted too, and another torch has others")
    found = counting.subjects([name])[name]()
    assert gate.changes({name: committed["figures"][name]}, {name: found}) == []


def test_every_subject_has_committed_figures(counting):
    from perf.counted import BASELINE

    assert set(counting.subjects()) == set(gate.read(BASELINE)["figures"])


def test_names_choose_what_is_counted(counting):
    names = list(counting.subjects(["rotary", "gpt block"]))
    assert {"gpt block", "gpt block under torch.compile", "rotary under torch.compile"} <= {*names}
    assert not [name for name in names if "softmax" in name]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["softmax", "--binaries", "--check"], "--binaries takes no names"),
        (["softmax", "--json", "/proc/nope/figures.json"], "figures.json cannot be written"),
        (["softmax", "--json", "/"], "--json / cannot be written"),
    ],
)
def test_what_cannot_be_done_is_refused_before_counting(
    counted, capsys, monkeypatch, options, reason
):
    monkeypatch.setattr(counted, "count_all", None)
    with pytest.raises(SystemExit) as left:
        counted.main(options)
    assert left.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_check_against_no_baseline_is_refused(counted, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(counted, "count_all", None)
    monkeypatch.setattr(counted, "BASELINE", tmp_path / "counted.json")
    with pytest.raises(SystemExit) as left:
        counted.main(["softmax-M256", "--check"])
    assert left.value.code == 2
    assert "counted.json to check against; --update writes it" in capsys.readouterr().err


def test_ctrl_c_ends_it_in_one_line(tmp_path):
    """Sent to all of its processes, as a terminal does."""
    command = [sys.executable, "-u", "-m", "perf.counted", "--json", str(tmp_path / "figures.json")]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's "&" ignores it
    )
    assert running.stderr is not None
    said = running.stderr.read(20)  # of the progress bar
    os.killpg(running.pid, signal.SIGINT)
    said += running.stderr.read()
    assert running.wait(60) == 1
    assert said.endswith("\ninterrupted: nothing was written\n")
    assert "Traceback" not in said


def test_the_verdict_comes_before_the_figures_are_written(counted, capsys, monkeypatch, tmp_path):
    file = tmp_path / "below" / "figures.json"
    assert counted.main(["softmax-M256", "--check", "--json", str(file)]) == 1
    assert list(json.loads(file.read_text())["figures"]) == ["softmax-M256-N2048"]

    def fails(path, results):
        raise OSError("no space left")

    capsys.readouterr()
    monkeypatch.setattr(counted.gate, "write", fails)
    with pytest.raises(OSError, match="no space"):
        counted.main(["softmax-M256", "--check", "--json", str(file)])
    assert "WORSE   softmax-M256-N2048: forward launches" in capsys.readouterr().out
