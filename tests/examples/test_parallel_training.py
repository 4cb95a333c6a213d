"""`--parallel`: many processes train as one does, and go on when one of them was killed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.examples.test_train_lm import TINY, finish, losses_in, text, when_saved  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
RUN = [*TINY, "--batch", "4", "--device", "cpu", "--steps", "40"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


EACH_MODE = """
import os, sys
from examples.train_lm import main

port, out, *options = sys.argv[1:]
place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
for mode in ("none", "ddp", "fsdp", "tp"):
    if mode != "none":
        os.environ.update(place, MASTER_PORT=port)
    parallel = [] if mode == "none" else ["--parallel", mode]
    assert main([*options, *parallel, "--out", f"{out}/{mode}"]) == 0
"""


def launch(*command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(processes, mode, *options):
    how = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return launch(*how, "-m", "examples.train_lm", "--parallel", mode, *options)


def free_port():
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def single(text, tmp_path_factory):  # noqa: F811
    """By mode the losses of a group of one process, without dropout."""
    out = tmp_path_factory.mktemp("single")
    code, _, err = finish(launch("-c", EACH_MODE, free_port(), out, *RUN, "--text", text))
    assert code == 0, err
    return {folder.name: losses_in(folder / "checkpoint.safetensors") for folder in out.iterdir()}


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "tp"])
def test_a_group_of_one_trains_like_no_group(mode, single):
    torch.testing.assert_close(single[mode], single["none"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "tp"])
def test_two_processes_train_like_one(mode, single, text, tmp_path):  # noqa: F811
    code, _, err = finish(torchrun(2, mode, *RUN, "--text", text, "--out", tmp_path))
    assert code == 0, err
    found = losses_in(tmp_path / "checkpoint.safetensors")
    torch.testing.assert_close(found, single["none"], rtol=1e-4, atol=0)


def test_a_killed_rank_loses_nothing(single, text, tmp_path):  # noqa: F811
    options = [*RUN, "--text", text, "--out", tmp_path, "--save-every", 3]
    checkpoint = tmp_path / "checkpoint.safetensors"
    run = torchrun(4, "fsdp+tp", *options)
    when_saved(run, checkpoint)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, _, _ = finish(run)
    assert code != 0
    trained = int(losses_in(checkpoint).isfinite().sum())
    assert 0 < trained < 40
    code, printed, err = finish(torchrun(4, "fsdp+tp", *options, "--resume"))
    assert code == 0, err
    assert printed.count("val_loss") == 1  # of one rank
    assert err.count(f" {trained}/40 [00:00<?") == 1
    torch.testing.assert_close(losses_in(checkpoint), single["none"], rtol=1e-4, atol=0)


def test_torchrun_and_parallel_go_together(text, tmp_path, capsys, monkeypatch):  # noqa: F811
    from examples.train_lm import main

    options = [*RUN, "--text", str(text), "--out", str(tmp_path)]
    assert main([*options, "--parallel", "ddp"]) == 2
    assert "--parallel ddp needs torchrun: torchrun" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(options) == 2
    assert "give --parallel ddp|fsdp|tp|fsdp+tp" in capsys.readouterr().err
