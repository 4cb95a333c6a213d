"""The training program: a whole run, stopping and going on, and one clear line for bad input."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from examples.lm.settings import PRESETS, parse, settings_from
from examples.train_lm import main, schedule
from tests.support.devices import DEVICE
from trilith.blocks import build_lm
from trilith.plugins.conformance.transforms import has_cpp_compiler

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--preset", "small", "--dim", "16", "--layers", "1", "--heads", "2", "--context", "16"]
RUN = [*TINY, "--batch", "2", "--accumulate", "2", "--dropout", "0.1", "--device", DEVICE]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text("".join(f"{n} bottles on the wall, {n} bottles.\n" for n in range(400)))
    return path


def start(*options, cwd=ROOT) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "examples.train_lm", *map(str, options)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def losses_in(checkpoint: Path) -> torch.Tensor:
    with safe_open(checkpoint, framework="pt") as file:
        return file.get_tensor("losses")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """An uninterrupted run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    code, printed, err = finish(start(*RUN, "--text", text, "--out", out, "--steps", 300))
    assert code == 0, err
    return out, printed


def test_a_run_writes_its_metrics_plot_sample_and_checkpoint(whole):
    out, printed = whole
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["val_loss"] < metrics["unigram_loss"]
    assert 0 < metrics["bigram_loss"] < metrics["unigram_loss"]
    assert metrics["tokens_per_s"] > 0 and metrics["seconds"] > 0 and metrics["params"] > 0
    assert metrics["steps"] == 300 and metrics["device"]
    assert min(metrics["step_bytes"].values()) > 0
    if DEVICE == "cpu":  # a GPU keeps whole blocks of memory, which at this size decide
        assert metrics["step_bytes"]["fused"] < metrics["step_bytes"]["logits"]
        counted = metrics["step_bytes_with_kernels"]
        assert 0 < counted["fused"] < counted["plain"]
    assert set(metrics["versions"]) >= {"trilith", "python", "torch"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text() in printed
    assert losses_in(out / "checkpoint.safetensors").isfinite().all()
    assert not list(out.glob("*.tmp"))


def when_saved(process: subprocess.Popen, checkpoint: Path) -> None:
    """Wait until the run has written a checkpoint."""
    deadline = time.monotonic() + 200
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("by", ["interrupt", "kill"])
def test_a_stopped_run_goes_on_with_the_same_losses(by, whole, text, tmp_path):
    options = [*RUN, "--text", text, "--out", tmp_path, "--steps", 300, "--save-every", 3]
    checkpoint = tmp_path / "checkpoint.safetensors"
    process = start(*options)
    when_saved(process, checkpoint)
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(signal.SIGINT if by == "interrupt" else signal.SIGKILL)
    code, _, err = finish(process)

    before = losses_in(checkpoint)
    trained = int(before.isfinite().sum())
    assert 0 < trained < 300
    if by == "interrupt":
        assert code == 130
        assert err.splitlines()[-1].startswith(f"train_lm: interrupted at step {trained}, saved")
    (tmp_path / "checkpoint.safetensors.tmp").write_bytes(b"half a file")
    code, _, err = finish(start(*options, "--resume"))

    assert code == 0, err
    assert torch.equal(losses_in(checkpoint), losses_in(whole[0] / "checkpoint.safetensors"))
    ours, theirs = (json.loads((out / "metrics.json").read_text()) for out in (tmp_path, whole[0]))
    assert ours["val_loss"] == theirs["val_loss"]
    assert (tmp_path / "sample.txt").read_text() == (whole[0] / "sample.txt").read_text()


@pytest.mark.skipif(
    DEVICE == "cpu" and not has_cpp_compiler(), reason="Inductor needs a C++ compiler"
)
@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(text, tmp_path):
    options = (*RUN, "--dropout", 0, "--text", text, "--steps", 20)
    runs = [("plain", ()), ("compiled", ("--compile",))]
    begun = [start(*options, "--out", tmp_path / name, *more) for name, more in runs]
    for process in begun:
        code, _, err = finish(process)
        assert code == 0, err
    plain, compiled = (losses_in(tmp_path / name / "checkpoint.safetensors") for name, _ in runs)
    assert compiled[-1] < compiled[0]
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-3)


def test_a_new_run_keeps_the_checkpoint_of_the_last(text, tmp_path):
    run = [*RUN, "--text", text, "--out", tmp_path, "--steps"]
    assert finish(start(*run, 2))[0] == 0
    first = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert finish(start(*run, 3, "--checkpoint-activations"))[0] == 0
    assert (tmp_path / "previous.safetensors").read_bytes() == first


def test_a_missing_library_is_named_with_the_command_that_installs_it():
    program = "import sys; sys.modules['tqdm'] = None; import examples.train_lm"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert found.stderr == "train_lm: tqdm is missing; install it: pip install -e '.[examples]'\n"


def test_runs_as_a_file_from_anywhere(tmp_path):
    found = subprocess.run(
        [sys.executable, ROOT / "examples" / "train_lm.py", "--text", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr == "train_lm: cannot read --text nowhere: No such file or directory\n"


def bad_inputs(folder: Path, good: Path, saved: Path) -> dict[str, tuple[list, str]]:
    """Options by name, and what the line must say."""
    (folder / "empty").write_bytes(b"")
    (folder / "short").write_bytes(b"only a few words")
    (folder / "file").write_text("in the way")
    (folder / "damaged.safetensors").write_bytes(saved.read_bytes()[:500])
    text = ["--text", good]
    cuda = "" if torch.cuda.is_available() else "PyTorch sees no GPU"
    return {
        "no_file": (["--text", folder / "nowhere"], "cannot read --text .*: No such file"),
        "directory": (["--text", folder], "cannot read --text .*: Is a directory"),
        "empty": (["--text", folder / "empty"], "--text .* is empty"),
        "short": (["--text", folder / "short"], "has 15 bytes, and one window needs 17"),
        "no_checkpoint": ([*text, "--resume", folder / "nowhere"], "no checkpoint at"),
        "other_shape": (
            [*text, "--resume", saved, "--dim", "32"],
            "was made with dim=16, .*this run has dim=32",
        ),
        "damaged": ([*text, "--resume", folder / "damaged.safetensors"], "cannot read checkpoint"),
        "heads": ([*text, "--heads", "3"], "n_heads must divide dim=16, got 3"),
        "steps": ([*text, "--steps", "0"], "--steps: must be at least 1, got 0; see --help"),
        "number": ([*text, "--lr", "fast"], "--lr: invalid .*'fast'"),
        "compile": (
            ["--compile", "--parallel", "tp"],
            "--compile --parallel tp: .*give ddp or fsdp",
        ),
        "option": (["--nonsense"], "unrecognized arguments: --nonsense"),
        "out": ([*text, "--out", folder / "file" / "deeper"], "cannot write to --out"),
        **({"cuda": ([*text, "--device", "cuda"], cuda)} if cuda else {}),
    }


CASES = (
    "no_file directory empty short no_checkpoint other_shape damaged heads steps number compile "
    "option out cuda"
)


@pytest.mark.parametrize("name", CASES.split())
def test_bad_input_gives_one_line_and_loses_nothing(name, whole, text, tmp_path, capsys):
    saved = whole[0] / "checkpoint.safetensors"
    before = saved.read_bytes()
    cases = bad_inputs(tmp_path, text, saved)
    if name not in cases:
        pytest.skip("this machine has a GPU")
    options, message = cases[name]
    run = [*TINY, "--out", str(whole[0]), "--batch", "2", "--steps", "300"]

    code = main([*run, *map(str, options)])

    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("train_lm: ") and printed.err.count("\n") == 1
    assert printed.out == ""
    assert re.search(message, printed.err), printed.err
    assert saved.read_bytes() == before


def test_schedule_warms_up_and_comes_down():
    settings = settings_from(parse(["--preset", "small", "--steps", "100"]), "text")
    shares = [schedule(step, settings) for step in range(100)]
    assert shares[0] == pytest.approx(0.2)
    assert max(shares) == shares[4] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(shares[5:], shares[6:], strict=False))
    assert shares[-1] == pytest.approx(settings.final_lr, abs=0.01)


def test_gpt2_small_has_gpt2_small_size():
    with torch.device("meta"):
        model = build_lm(PRESETS["gpt2-small"].model)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
