"""What of a provider is checked here, and that what is not is said, by `check` and by pytest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trilith import pytest_plugin
from trilith.plugins import Implementation, Op, OpSpec, Sample, manager, report
from trilith.plugins import __main__ as command_line
from trilith.plugins.conformance import forward_matches_reference, gradients_match_reference
from trilith.plugins.coverage import EVERYTHING, Coverage, coverage
from trilith.plugins.selection import REFERENCE
from trilith.plugins.spec import HALF_AND_SINGLE

CPU = torch.device("cpu")


def forward(x: Tensor) -> tuple[Tensor, ...]:
    return ((3 * x).contiguous(),)


def twice(x: Tensor) -> tuple[Tensor, ...]:
    return ((2 * x).contiguous(),)


def samples(device, dtype):
    yield Sample(torch.randn(4, 6, device=device, dtype=dtype))


WRONG = OpSpec(
    name="acme_cover::double",
    forward=forward,
    backward=lambda ctx, dy: ((3 * dy).contiguous(),),
    reference=lambda x: 2 * x,
    samples=samples,
    devices=("cpu", "cuda"),
)


def rows_of(index: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (weight[index].contiguous(),)


def rows_back(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    index, weight = ctx.inputs
    dw = torch.zeros(weight.shape, device=dy.device)
    dw.index_add_(0, index.flatten(), dy.reshape(-1, weight.shape[1]).float())
    return None, (2 * dw).to(weight.dtype)  # twice too large


def rows_samples(device, dtype):
    index = torch.randint(11, (3, 5), device=device)
    yield Sample(index, torch.randn(11, 8, device=device, dtype=dtype))


ROWS = OpSpec(
    name="acme_cover::rows",
    forward=rows_of,
    backward=rows_back,
    reference=lambda index, weight: weight[index],
    samples=rows_samples,
    save_outputs=False,
    devices=("cpu", "cuda"),
    dtypes=(torch.int64,),
)


@pytest.fixture
def make():
    ops: list[Op] = []

    def make(spec: OpSpec, **changes: Any) -> Op:
        ops.append(Op(replace(spec, **changes)))
        return ops[-1]

    yield make
    for op in ops:
        op.destroy()


@pytest.fixture
def short(monkeypatch):
    """Two checks, which see what is wrong here."""
    checks = forward_matches_reference, gradients_match_reference
    monkeypatch.setattr(report, "CHECKS", checks)
    monkeypatch.setattr("trilith.plugins.conformance.CHECKS", checks)


def of(name: str = "acme_cover", dtypes=HALF_AND_SINGLE, **not_run: str) -> Coverage:
    return Coverage(name, tuple(dtypes), tuple(not_run.items()))


UNSEEN = "no sample has a first tensor of it"
FLOATS = "torch.float32, torch.float16, torch.bfloat16"


@pytest.mark.parametrize(
    ("spec", "changes", "expected"),
    [
        (WRONG, {}, of()),
        (WRONG, {"dtypes": None}, of()),
        (WRONG, {"dtypes": (torch.bfloat16,)}, of(dtypes=[torch.bfloat16])),
        (WRONG, {"dtypes": (torch.float64,)}, of(dtypes=[torch.float64])),
        (
            WRONG,
            {"dtypes": (torch.float64, torch.int32, torch.float32)},
            of(dtypes=[torch.float32, torch.float64], int32=UNSEEN),
        ),
        (WRONG, {"devices": ("cuda",)}, of(dtypes=[], every_check="runs on cuda, not cpu")),
        (
            WRONG,
            {"dtypes": (torch.int8,)},
            of(dtypes=[], every_check="takes torch.int8, not torch.float32"),
        ),
        (ROWS, {}, of()),
        (ROWS, {"dtypes": None}, of()),
        (ROWS, {"dtypes": (torch.int32, torch.int64)}, of(int32=UNSEEN)),
        (
            ROWS,
            {"dtypes": HALF_AND_SINGLE},
            of(
                dtypes=[],
                every_check=f"takes {FLOATS}, not torch.int64 (the first tensor of the samples is)",
            ),
        ),
    ],
)
def test_each_provider_is_covered_or_said_not_to_be(make, spec, changes, expected):
    found = coverage(make(spec, **changes), CPU)
    reference = [] if expected.dtypes else [Coverage(REFERENCE, HALF_AND_SINGLE)]
    assert found == [expected, *reference]


@pytest.mark.parametrize("spec", [replace(WRONG, dtypes=(torch.float64,)), ROWS])
def test_what_runs_in_no_usual_dtype_is_checked(make, short, spec):
    op = make(spec)
    failed = {row.check for row in report.check_op(op, CPU) if row.reason}
    assert "gradients_match_reference" in failed


def test_a_provider_that_cannot_run_here_is_a_row_and_no_failure(make, short):
    op = make(WRONG, forward=twice, backward=lambda ctx, dy: ((2 * dy).contiguous(),))
    op.add_implementation(
        Implementation(WRONG.name, "elsewhere", forward, WRONG.backward, devices=("cuda",))
    )
    rows = list(report.check_op(op, CPU))
    assert [row.provider for row in rows] == ["acme_cover", "acme_cover", "elsewhere"]
    assert not [row for row in rows if row.reason]
    assert [row.not_run for row in rows] == ["", "", "runs on cuda, not cpu"]
    assert rows[-1].check == EVERYTHING


@pytest.fixture
def named(make, monkeypatch):
    """An op that runs on a GPU alone, for whoever asks for ops by name."""
    op = make(WRONG, devices=("cuda",))
    monkeypatch.setattr(report, "default_device", lambda: CPU)
    monkeypatch.setattr(report, "named_ops", lambda *_, **__: [op])
    return op


def test_check_never_says_that_all_passed_where_some_was_not_run(named, short, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "INTERPRETING", True)
    assert command_line.main(["check", "acme_cover", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"  {EVERYTHING:<26} not run: runs on cuda, not cpu\n" in out
    assert "by reference" in out
    assert out.endswith("\n0 failed, 1 not run\n")


@pytest.mark.parametrize("interpreting", [True, False])
def test_pytest_skips_what_is_not_run_and_says_why(named, short, monkeypatch, interpreting):
    monkeypatch.setattr("trilith.plugins.spec.INTERPRETING", interpreting)
    with pytest.warns(UserWarning, match="only its reference is checked") as warned:
        cases = list(pytest_plugin._cases(("acme_cover",)))
    assert ("set trilith_interpret" in str(warned[0].message)) is not interpreting
    (skipped,) = [case for case in cases if case.marks]
    assert skipped.id == f"acme_cover::double-acme_cover-{EVERYTHING}"
    (mark,) = skipped.marks
    assert mark.name == "skip"
    assert mark.kwargs["reason"].endswith("every_check: not run: runs on cuda, not cpu")
    assert len(cases) == 1 + 2 * len(HALF_AND_SINGLE)
    assert manager.loaded
