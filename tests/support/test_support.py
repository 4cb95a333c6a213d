"""The harness itself: comparison rules, layouts, poison, the interpreter's bfloat16 and tf32."""

import ast
import os
import re
import signal
import time
from functools import partial

import pytest
import torch

from tests.support import mutants, random_faults
from tests.support.compare import assert_like_eager, assert_one_rounding, ulp
from tests.support.devices import DEVICE, DTYPES, INTERPRETING, dtype_name
from tests.support.forks import Finished, run_all
from tests.support.layouts import EXPANDED, LAYOUTS, contiguous
from tests.support.mutant_table import MUTANTS
from trilith.kernels._runtime.language import tl, triton

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@pytest.fixture
def exact():
    return torch.randn(5, 7, dtype=torch.float64)


@by_dtype
def test_ulp_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 0.5, 3.0, 1000.0, 1e-4, 2.0**-14], dtype=dtype)
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    following = (values.view(bits) + 1).view(dtype)
    assert torch.equal(ulp(values.double(), dtype), following.double() - values.double())


def test_ulp_of_zero_and_subnormal_numbers():
    values = torch.tensor([0.0, 1e-7, 2.0**-24], dtype=torch.float64)
    assert (ulp(values, torch.float16) == 2.0**-24).all()


@by_dtype
def test_one_rounding_is_accepted(exact, dtype):
    assert_one_rounding(exact.to(dtype), exact, scale=0.0)
    assert_like_eager(exact.to(dtype), exact, exact.to(dtype))


@by_dtype
@pytest.mark.parametrize("ulps", [4, -4])
def test_four_ulp_are_not(exact, dtype, ulps):
    wrong = exact.to(dtype)
    wrong[2, 3] += ulps * ulp(exact, dtype)[2, 3]
    with pytest.raises(AssertionError, match=r"in 1 of 35 elements.*worst at \[2, 3\]"):
        assert_one_rounding(wrong, exact, scale=0.0)


def test_scale_grants_fp32_roundings(exact):
    wrong = exact.float() + 1e-3
    assert_one_rounding(wrong, exact, scale=2000.0)
    with pytest.raises(AssertionError, match="bound"):
        assert_one_rounding(wrong, exact, scale=500.0)
    assert_one_rounding(wrong, exact, scale=500.0, terms=16)
    rows = torch.full((5, 1), 2000.0)
    assert_one_rounding(wrong, exact, scale=rows)
    rows[4] = 500.0
    with pytest.raises(AssertionError, match=r"worst at \[4, "):
        assert_one_rounding(wrong, exact, scale=rows)


def test_a_scale_that_grants_everything_is_refused(exact):
    with pytest.raises(ValueError, match="scale must be finite"):
        assert_one_rounding(exact.float(), exact, scale=float("inf"))


@by_dtype
def test_eager_sets_the_measure(exact, dtype):
    eager = exact.to(dtype)
    with pytest.raises(AssertionError, match="eager's worst"):
        assert_like_eager(eager * 1.05, exact, eager)
    assert_like_eager(eager * 1.05, exact, eager * 1.05)


def test_a_bias_below_the_worst_shows_in_the_mean():
    exact = torch.ones(64, 64, dtype=torch.float64)
    eager, biased = exact.half(), exact.half() + 2**-9
    eager[0, 0] += 2**-8
    with pytest.raises(AssertionError, match="mean error of the tensor"):
        assert_like_eager(biased, exact, eager)


def test_one_bad_row_shows():
    exact = torch.ones(64, 64, dtype=torch.float64)
    eager = exact.half()
    eager[:, ::8] += 2**-9
    eager[0, 0] += 2**-6
    bad = exact.half()
    bad[3] += 2**-9
    with pytest.raises(AssertionError, match=r"mean error of row \[3\]"):
        assert_like_eager(bad, exact, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_a_second_rounding_shows_in_the_mean(dtype):
    exact = torch.randn(64, 64, dtype=torch.float64)
    assert_one_rounding((exact * 3).to(dtype), exact * 3, scale=0.0)
    twice = (exact.to(dtype).double() * 3).to(dtype)
    with pytest.raises(AssertionError, match="mean error of the tensor.*one rounding's"):
        assert_one_rounding(twice, exact * 3, scale=0.0)


def test_a_truncation_shows_in_the_mean():
    exact = torch.randn(64, 64, dtype=torch.float64)
    truncated = (exact.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="one rounding's"):
        assert_one_rounding(truncated, exact, scale=0.0)


@pytest.mark.parametrize("compare", ["one rounding", "like eager"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_patterns(exact, compare, value):
    def check(actual, expected):
        if compare == "one rounding":
            assert_one_rounding(actual, expected, scale=1.0)
        else:
            assert_like_eager(actual, expected, expected.float())

    special = exact.clone()
    special[1, 2] = value
    check(special.float(), special)
    with pytest.raises(AssertionError, match=r"NaN or inf differ in 1 of 35.*\[1, 2\]"):
        check(exact.float(), special)
    with pytest.raises(AssertionError, match="NaN or inf differ"):
        check(special.float(), exact)
    if value == value:
        with pytest.raises(AssertionError, match="NaN or inf differ"):
            check(special.float(), special.abs() * -special.sign())


def test_overflow_may_fall_either_way_at_the_limit_alone():
    near = torch.tensor([65519.9, 65520.1], dtype=torch.float64)
    assert_one_rounding(torch.tensor([65504.0, float("inf")]).half(), near, scale=0.0)
    assert_one_rounding(torch.tensor([float("inf"), 65504.0]).half(), near, scale=0.0)
    with pytest.raises(AssertionError, match="NaN or inf differ"):
        assert_one_rounding(
            torch.tensor([float("inf")]).half(),
            torch.tensor([6e4], dtype=torch.float64),
            scale=0.0,
        )


def test_shapes_and_dtypes_are_checked(exact):
    with pytest.raises(AssertionError, match="shape"):
        assert_one_rounding(exact[0].float(), exact, scale=1.0)
    with pytest.raises(ValueError, match="must be float64"):
        assert_one_rounding(exact.float(), exact.float(), scale=1.0)
    with pytest.raises(ValueError, match="eager must be"):
        assert_like_eager(exact.float(), exact, exact.half())


@pytest.mark.parametrize("shape", [(3, 4, 5), (6, 5), (7,), (), (1, 5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_keep_values(layout, shape):
    tensor = torch.randn(shape)
    moved = layout(tensor)
    assert torch.equal(moved, tensor)
    assert moved.data_ptr() != tensor.data_ptr()


def test_layouts_differ():
    tensor = torch.randn(2, 4, 6)
    found = [f(tensor) for f in LAYOUTS]
    seen = {(t.stride(), t.storage_offset(), t.is_neg()) for t in found}
    assert len(seen) == len(LAYOUTS) - 1  # odd_unit_strides shows on size 1 alone
    single = torch.randn(1, 4)
    assert {f(single).stride() for f in LAYOUTS} > {contiguous(single).stride()}


@pytest.mark.parametrize("layout", EXPANDED, ids=lambda f: f.__name__)
def test_expanded_layouts_have_stride_zero(layout):
    assert 0 in layout(torch.randn(3, 4)).stride()


def test_what_lies_between_is_nan():
    for layout in LAYOUTS:
        moved = layout(torch.randn(2, 4, 6))
        size = moved.untyped_storage().nbytes() // 4
        everything = torch.as_strided(moved, (size,), (1,), 0)
        assert int(everything.isnan().sum()) == size - moved.numel()


@by_dtype
def test_poison_reaches_every_way_to_allocate(poison, dtype):
    x = torch.ones(4, dtype=dtype, device=DEVICE)
    for fresh in (
        torch.empty(4, dtype=dtype, device=DEVICE),
        torch.empty_like(x),
        x.new_empty(4),
        torch.empty_strided((4,), (2,), dtype=dtype, device=DEVICE),
        x.new_empty_strided((4,), (2,)),
    ):
        assert fresh.isnan().all()


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr = "ieee"):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x, input_precision=PRECISION))


EDGES = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.4e38, -3.4e38, 1e-40, float("inf")]


@pytest.mark.skipif(not (INTERPRETING or DEVICE == "cuda"), reason="needs Triton")
class TestBfloat16:
    def cast(self, x, dtype):
        y = torch.empty(x.shape, dtype=dtype, device=DEVICE)
        _cast_kernel[(1,)](x, y, N=x.numel())
        return y

    def test_rounds_to_nearest_even(self):
        x = torch.cat([torch.tensor(EDGES), torch.randn(1024 - len(EDGES))]).to(DEVICE)
        found = self.cast(x, torch.bfloat16)
        assert torch.equal(found.view(torch.int16), x.bfloat16().view(torch.int16))

    def test_nan_stays_nan(self):
        x = torch.full((16,), float("nan"), device=DEVICE)
        assert self.cast(x, torch.bfloat16).isnan().all()

    def test_widens_exactly(self):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        x = x[~x.isnan()].to(DEVICE)
        x = torch.cat([x, x.new_zeros(2**16 - x.numel())])
        assert torch.equal(self.cast(x, torch.float32), x.float())

    def test_dot_takes_values(self):
        x = torch.randn(32, 32, dtype=torch.bfloat16, device=DEVICE)
        y = torch.empty(32, 32, device=DEVICE)
        _dot_kernel[(1,)](x, y, N=32)
        torch.testing.assert_close(y, x.float() @ x.float(), rtol=1e-3, atol=1e-3)

    @pytest.mark.skipif(not INTERPRETING, reason="hardware sums in float32")
    def test_a_dot_is_rounded_once_whatever_the_cpu(self):
        """In float32 an element's sum depends on where BLAS finds it: recomputed scores differ."""
        x = 1e4 + torch.randn(32, 32)
        y = torch.empty(32, 32)
        _dot_kernel[(1,)](x, y, N=32)
        assert torch.equal(y, (x.double() @ x.double()).float())

    @pytest.mark.skipif(not INTERPRETING, reason="hardware may cut instead of rounding")
    def test_tf32_rounds_factors_to_10_bits_of_mantissa(self):
        x = torch.randn(32, 32)
        bits = x.view(torch.int32) + 0xFFF + (x.view(torch.int32) >> 13 & 1)
        expected = (bits & ~0x1FFF).view(torch.float32).double()
        y = torch.empty(32, 32)
        _dot_kernel[(1,)](x, y, N=32, PRECISION="tf32")
        torch.testing.assert_close(y.double(), expected @ expected, rtol=1e-6, atol=1e-5)
        assert (y.double() - x.double() @ x.double()).abs().max() > 1e-4


class TestMutants:
    @pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
    def test_its_text_is_in_the_source_once(self, mutant):
        assert mutants.stale(mutant) is None
        assert mutant.old != mutant.new

    def test_every_kernel_file_has_one(self):
        sources = {p.relative_to(mutants.ROOT) for p in (mutants.ROOT / "kernels").rglob("*.py")}
        code = {p for p in sources if p.name not in ("__init__.py", "language.py")}
        modules = {".".join(("trilith", *p.with_suffix("").parts)) for p in code}
        assert not modules - {mutant.module for mutant in MUTANTS}

    def test_names_differ(self):
        assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 28

    def test_random_faults_are_of_every_kernel_file_and_change_one_place_each(self):
        files = (mutants.ROOT / "kernels").rglob("*.py")
        compiled = {path for path in files if "@triton.jit" in path.read_text()}
        faults = random_faults.drawn([], 10**9, seed=0)
        paths = {f.module: mutants.ROOT / f"{f.module[8:].replace('.', '/')}.py" for f in faults}
        assert set(paths.values()) == compiled
        sources = {module: path.read_text() for module, path in paths.items()}
        for fault in random_faults.drawn([], 100, seed=0):
            changed = fault.applied_to(sources[fault.module])
            ast.parse(changed)
            assert len(changed) == len(sources[fault.module]) + len(fault.new) - len(fault.old)
            assert changed != sources[fault.module]
        assert (
            random_faults.drawn([], 9, seed=1) == random_faults.drawn([], 9, seed=1) != faults[:9]
        )

    @pytest.mark.parametrize("text", ["no such text", "import"], ids=["none", "several"])
    def test_a_text_that_is_not_there_once_is_told(self, text):
        mutant = mutants.Mutant("stale", "trilith.kernels.norms", text, "", "tests/kernels")
        told = mutants.stale(mutant)
        assert re.match(r"stale: its text is \d+ times in trilith.kernels.norms", told)

    @pytest.mark.parametrize(
        ("status", "output", "verdict"),
        [
            (1, "E   AssertionError\nFAILED tests/a.py::b - assert 0", "killed"),
            (0, "1 passed", "SURVIVED"),
            (1, "E   NameError: x\nFAILED tests/a.py::b - NameError", "ERROR"),
            (1, "E   triton.CompilationError: at 1:0\nFAILED tests/a.py::b", "ERROR"),
            (2, "E   tests.support.mutants.StaleMutant: text\nERROR tests/a.py", "ERROR"),
            (1, "E   tests.support.mutants.UnknownMutant: x is\nFAILED tests/a.py::b", "ERROR"),
            (1, "ERROR tests/a.py::b", "ERROR"),
            (5, "no tests ran", "ERROR"),
            (-11, "", "ERROR"),
            (None, "FAILED tests/a.py::b", "ERROR"),
        ],
        ids=str,
    )
    def test_only_a_test_that_fails_by_its_assertions_kills(self, status, output, verdict):
        found, told = mutants.verdict(MUTANTS[0], Finished(0, status, output, 1.0))
        assert found == verdict
        assert found != "killed" or told == "tests/a.py::b"

    def test_a_module_that_is_imported_already_cannot_be_mutated(self):
        import trilith.kernels._norm_forward  # noqa: F401

        with pytest.raises(RuntimeError, match="_norm_forward is imported already"):
            mutants.install(MUTANTS[0].name)

    def test_a_name_that_is_not_in_the_table_is_told(self):
        with pytest.raises(mutants.UnknownMutant, match="other is not in the table"):
            mutants.install("other")

    @pytest.mark.parametrize(
        ("verdict", "failing", "status", "last"),
        [
            ("killed", set(), 0, "1 mutants, 1 killed"),
            ("SURVIVED", set(), 1, "1 mutants, 0 killed"),
            ("ERROR", set(), 1, "1 mutants, 0 killed"),
            ("killed", {"a test"}, 1, "1 mutants, 0 killed"),
        ],
        ids=["killed", "survived", "error", "its test fails anyway"],
    )
    def test_only_mutants_that_a_sound_test_kills_pass(
        self, verdict, failing, status, last, monkeypatch, capsys
    ):
        monkeypatch.setattr(mutants, "warm", lambda: None)
        monkeypatch.setattr(
            mutants, "run", lambda chosen, jobs: [(m, verdict, "a test", 1.0) for m in chosen]
        )
        monkeypatch.setattr(mutants, "failing_anyway", lambda tests, jobs: failing)
        assert mutants.main([MUTANTS[0].name]) == status
        assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestForks:
    def run(self, *tasks, limit=60.0):
        found = sorted(run_all(tasks, jobs=2, limit=limit), key=lambda finished: finished.task)
        return [(f.status, f.output) for f in found]

    def test_each_has_its_status_and_its_output(self):
        def told(status):
            print(f"task {status}")
            os.write(2, b"and its descriptor\n")
            return status

        found = self.run(*(partial(told, status) for status in range(4)))
        assert [status for status, _ in found] == [0, 1, 2, 3]
        for status, output in found:
            assert f"task {status}\n" in output and "and its descriptor\n" in output

    def test_a_crash_ends_one_alone(self):
        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        (killed, _), (raised, traceback), (sound, _) = self.run(die, lambda: 1 // 0, int)
        assert (killed, raised, sound) == (-signal.SIGKILL, 70, 0)
        assert "ZeroDivisionError" in traceback

    def test_what_runs_past_its_limit_is_stopped(self):
        assert self.run(partial(time.sleep, 600), limit=0.1) == [(None, "")]
