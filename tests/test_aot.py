"""Every kernel compiled ahead of time for six architectures: no spills, MMA where there are dots.

The compiling happens in a process without TRITON_INTERPRET; `python -m tests.support.aot` prints
the figures. What Triton would take from its cache, had it compiled the committed sources before, is
not compiled again: its figures are in `perf/baselines/known_binaries.json`. No figure may be worse
than in `perf/baselines/counted.json`, and no variant there may be one that is no longer launched.
"""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from perf import binaries, gate
from tests.support import aot, known
from tests.support.architectures import LAUNCHED_AS, TARGETS
from tests.support.entries import entry_name, live
from tests.support.launches import cases, title
from trilith.plugins import registry

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "perf" / "baselines" / "counted.json"

# (kernel, architecture) -> (pattern of the variant, most bytes spilled, what was tried).
SPILLS_ALLOWED: dict[tuple[str, str], tuple[str, int, str]] = {}
SPILLS_ALLOWED["attention_bwd_dq_kernel", "gfx942"] = (
    r"fp32\S* .*CHUNKS=\(8, 8\) ",
    0,
    "one register of IEEE products of 512 head dims moves to an accumulator register, no memory; "
    "chunks of 32 do the same, and 8 warps spill 430 to 720 bytes",
)
SPILLS_ALLOWED["attention_bwd_dkdv_kernel", "sm_90"] = (
    r".* BLOCK_M=64 BLOCK_N=128 BLOCK_D=128 .*(PAD_D=True|FLAGS=\(.*, True\))",
    24,
    "of padded head dims and of packed sequences, none otherwise; on an H200 these tiles take 1.25 "
    "ms where those that never spill take 1.36 to 1.68, and 64,128,16,8,3 takes 1.18 but spills 80",
)
for arch, most in (("sm_80", 24), ("sm_86", 24), ("sm_120", 32)):
    SPILLS_ALLOWED["attention_bwd_dkdv_kernel", arch] = (
        r"bf16,int64,int32,fp32 .*BLOCK_M=32 BLOCK_N=64 BLOCK_D=128 .*FLAGS=\(True, True, .*True\)",
        most,
        "of packed sequences with a window and dropout; 32,64,16,8,2 spills 8 to 40, one stage 16, "
        "and 32,32,32,8,2 and 16,64,16,8,2 none, but that is half the tile for every other call",
    )
SPILLS_ALLOWED["attention_fwd_kernel", "sm_100"] = (
    r"\S+,bool,fp32 .*(BLOCK_D=128|BLOCK_D=256) .*FLAGS=\(False, True, ",
    8,
    "two instructions of causal calls with a key mask; of 256 64,16,16,8,2 spills 16, 64,32,32,8,2 "
    "40, 128,16,16,8,2 48 elsewhere, and one stage none, but then no load runs ahead",
)
# One or two registers, of 255, of IEEE products with dropout and a key mask. Which of these calls
# spill changes with the kernel's every line: with dropout's float comparison others of them did.
_IEEE = r"fp32,bool,int64 .*BLOCK_M=32 BLOCK_N=32 BLOCK_D=64 "
for arch in ("sm_90", "sm_100", "sm_120"):
    variants, most, why = SPILLS_ALLOWED.get(("attention_bwd_dkdv_kernel", arch), ("", 8, ""))
    either = f"({variants}|{_IEEE})" if variants else _IEEE
    SPILLS_ALLOWED["attention_bwd_dkdv_kernel", arch] = (
        either,
        most,
        f"{why}; of IEEE products 8, for a tenth fewer instructions; other tiles were not tried",
    )
# (architecture, entry of attention's tables) -> why no tensor-core instruction is there.
NO_MMA_ALLOWED: dict[tuple[str, str], str] = {}
for scores in ("plain", "laden"):
    NO_MMA_ALLOWED["sm_90", f"half dkdv 512 {scores}"] = (
        "HGMMA needs 64 keys: 16,64,16,8,2,128 spills 72 bytes plain, 248 laden; one stage 200 and "
        "352; chunk 256 712; 32,64,32,8,1,128 264 and 520; chunk 64 none plain, but its eight "
        "programs make the scores eight times, and 88 laden; 4 or 16 warps of it 200 and 480"
    )
for arch, head_dim in itertools.product(("sm_90", "sm_100"), (256, 512)):
    NO_MMA_ALLOWED[arch, f"half decode {head_dim} laden"] = (
        "a tile has the queries of one key head, 16 rows mostly, where the instruction has 64"
    )

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton's compiler"
)


def run(module, *options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def survey(arch, report, *options):
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    always = ("--arch", arch, "--json", str(report), "--jobs", jobs)
    answer = run("tests.support.aot", *always, *options)
    assert report.exists(), answer.stdout + answer.stderr
    found = json.loads(report.read_text())
    return found["reports"], found["launched"]


def excused(report, problem):
    key = (report["kernel"], report["arch"])
    if problem.startswith("spills"):
        variants, most, _ = SPILLS_ALLOWED.get(key, ("", -1, ""))
        return re.match(variants, report["variant"]) is not None and report["spilled"] <= most
    return problem.startswith("no MMA") and (report["arch"], report["entry"]) in NO_MMA_ALLOWED


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_binaries(arch, tmp_path):
    sample = ("--most", *map(str, aot.SAMPLED[arch]), "--known", str(known.FILE))
    reports, launched = survey(arch, tmp_path / "reports.json", *sample)
    assert reports
    faults = [
        f"{r['kernel']} [{r['variant']}] of {r['op']}({r['sample']}): {problem}"
        for r in reports
        for problem in r["problems"]
        if not excused(r, problem)
    ]
    assert not faults, "\n" + "\n".join(faults)
    compiled = {r["entry"]: r for r in reports if r["entry"]}
    tables = LAUNCHED_AS.get(arch, arch)
    assert compiled.keys() == {entry_name(e) for e in live() if e.architecture == tables}
    stale = [e for a, e in NO_MMA_ALLOWED if a == arch and compiled[e]["mma"]]
    assert not stale, f"these have tensor-core instructions: {stale}"
    baseline = gate.read(BASELINE).get("binaries", {}).get(version("triton"), {})
    found = binaries.changes(baseline, binaries.figures(reports), launched)
    worse = [str(change) for change in found if change.is_worse]
    meant = "if it is meant: python -m perf.counted --binaries --update"
    assert not worse, "\n".join(["", *map(str, found), meant])


@needs_triton
def test_the_cases_reach_every_entry_of_attentions_tables():
    """On each architecture, each by its own kernel: none is dead, none is never compiled."""
    answer = run("tests.support.entries")
    assert answer.returncode == 0, answer.stdout + answer.stderr


@needs_triton
def test_every_op_has_shapes():
    with FakeTensorMode():
        shaped = {name for name, _ in cases()}
    ours = {name for name in registry.op_names() if name.startswith("trilith::")}
    assert ours <= shaped, f"tests/kernels/shapes_*.py have no call of {sorted(ours - shaped)}"


@needs_triton
def test_survey_sees_faults(tmp_path):
    """Spills, too much shared memory, a dot without MMA and a broken case are each reported."""
    cases = ("--cases", "tests.support.faulty_kernels")
    reports, _ = survey("sm_90", tmp_path / "reports.json", *cases)
    problems = {r["kernel"]: " ".join(r["problems"]) for r in reports}
    assert "spills: " in problems["spilling_kernel"]
    assert "shared memory: " in problems["sharing_kernel"]
    assert "no MMA" in problems["unfit_dot_kernel"]
    assert "does not compile" in problems["broken_kernel"]
    assert "running on fake tensors: ValueError: refused" in problems["-"]
    assert problems["copy_kernel"] == ""


@needs_triton
def test_what_is_known_is_not_compiled_and_what_has_changed_is(tmp_path, monkeypatch):
    """Figures are taken by key: those of the file, even if they are wrong."""
    source = (ROOT / "tests/support/faulty_kernels.py").read_text()
    file = tmp_path / "known.json"

    def copies_of(folder, source, *options):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own_kernels.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / folder))
        cases = ("--cases", "own_kernels", "--filter", "copy_kernel")
        found, _ = survey("sm_90", tmp_path / f"{folder}.json", *cases, *options)
        return [r for r in found if r["kernel"] == "copy_kernel"]

    fresh = copies_of("fresh", source)
    known.write(file, [{**report, "spilled": 12} for report in fresh])
    again = copies_of("again", source, "--known", str(file))
    assert all(r["is_known"] for r in again) and not any(r["is_known"] for r in fresh)
    assert [r["spilled"] for r in again] == [12 for _ in fresh]
    assert all(r["problems"] for r in again)
    assert [r["registers"] for r in again] == [r["registers"] for r in fresh]

    broken = ("--cases", "tests.support.faulty_kernels", "--filter", "broken_kernel")
    failed, _ = survey("sm_90", tmp_path / "broken.json", *broken, "--known", str(file))
    assert any("does not compile" in problem for r in failed for problem in r["problems"])
    known.write(tmp_path / "nothing.json", failed)
    assert known.read(tmp_path / "nothing.json") == {}

    called = source.replace("tl.load(x_ptr + offs, mask=offs < N)", "_loaded(x_ptr, offs, N)")
    callee = "@triton.jit\ndef _loaded(x, offs, N):\n    return tl.load(x + offs, mask=offs < N)\n"
    called += "\n\n" + callee
    known.write(file, copies_of("called", called))
    changed = called.replace("return tl.load(", "return 1 + tl.load(")
    assert not any(r["is_known"] for r in copies_of("changed", changed, "--known", str(file)))
    assert all(r["is_known"] for r in copies_of("same", called, "--known", str(file)))


@needs_triton
def test_what_the_sample_leaves_out_is_launched_all_the_same(tmp_path):
    one = ("--filter", "_softmax_fwd_kernel", "--most", "1", "--known", str(known.FILE))
    reports, launched = survey("sm_90", tmp_path / "reports.json", *one)
    assert len(reports) == 1 and len(launched) > 1


@needs_triton
def test_survey_specialises_as_the_jit_does(tmp_path):
    """Divisible by 16 or not, aligned or not: three variants of one kernel, two of them narrow."""
    options = ("--cases", "tests.support.faulty_kernels", "--filter", "copy_kernel")
    reports, launched = survey("sm_90", tmp_path / "reports.json", *options)
    copies = [r for r in reports if r["kernel"] == "copy_kernel"]
    assert sorted(r["wide"] for r in copies) == [0.0, 1.0]
    assert {title(r["kernel"], "sm_90", r["variant"], r["op"]) for r in copies} == {*launched}
    assert all(r["registers"] > 0 for r in copies)
