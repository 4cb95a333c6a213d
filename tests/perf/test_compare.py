"""Comparing results: regressions are found, noise is not one."""

import math

import numpy as np
import pytest

from perf.compare import (
    FEWEST_SAMPLES,
    TOO_FEW,
    Incomparable,
    main,
    resampled_medians,
    run_benchmarks,
)
from perf.compare import compared as compared_in_rounds
from perf.results import Benchmark
from tests.perf.results import H200, entry, samples, write


def compared(name, before, after):
    return compared_in_rounds(name, [(before, after)])


@pytest.mark.parametrize("seed", range(5))
def test_ten_percent_slower_is_found(seed):
    result = compared("norm", samples(1e-4, seed=seed), samples(1.1e-4, seed=seed + 100))
    assert result.verdict == "SLOWER"
    assert result.low < 1.1 < result.high


@pytest.mark.parametrize("seed", range(5))
def test_ten_percent_faster_is_found(seed):
    result = compared("norm", samples(1.1e-4, seed=seed), samples(1e-4, seed=seed + 100))
    assert result.verdict == "faster"


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_regression(seed):
    before, after = samples(1e-4, 0.2, seed=seed), samples(1e-4, 0.2, seed=seed + 100)
    assert compared("norm", before, after).verdict == "same"


def test_a_sure_but_small_effect_is_no_regression():
    result = compared("norm", samples(1e-4, 0.001), samples(1.03e-4, 0.001, seed=1))
    assert result.low > 1
    assert result.verdict == "same"


def test_a_large_effect_that_is_not_sure_is_no_regression():
    before, after = samples(1e-4, 0.5, n=8), samples(1.1e-4, 0.5, n=8, seed=3)
    result = compared("norm", before, after)
    assert result.low < 1 < result.high
    assert result.verdict == "same"


def test_outliers_of_a_few_samples_do_not_decide():
    after = samples(1e-4, seed=1)
    after[:5] = [1e-2] * 5
    assert compared("norm", samples(1e-4), after).verdict == "same"


def test_the_same_samples_give_the_same_answer():
    before, after = samples(1e-4), samples(1.2e-4, seed=1)
    assert compared("norm", before, after) == compared("norm", before, after)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 31, 40])
def test_medians_are_those_of_samples_drawn_one_by_one(count):
    values, generator = np.arange(count), np.random.default_rng(7)
    ours = np.concatenate([resampled_medians(values, generator) for _ in range(5)])
    theirs = np.median(generator.choice(values, size=(len(ours), count)), 1)
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.04 * max(1, theirs.std()))
    assert ours.std() == pytest.approx(theirs.std(), rel=0.03)
    assert {*ours} <= {*(values[:, None] + values).ravel() / 2}


def test_what_cannot_be_read_is_told(tmp_path, capsys):
    whole, broken, empty = (tmp_path / name for name in ("whole.json", "broken.json", "empty"))
    write(whole, [entry("a", samples(1e-4))])
    broken.write_text("{")
    empty.mkdir()
    for wrong in (tmp_path / "nowhere.json", broken, empty):
        assert main([str(whole), str(wrong)]) == 2
        printed = capsys.readouterr().out
        assert wrong.name in printed and printed.startswith("cannot ")


SHAPES = ["[1, 2]", "null", "{}", '{"benchmarks": [1]}', '{"benchmarks": [{"name": "a"}]}']


@pytest.mark.parametrize("text", SHAPES)
def test_json_of_another_shape_is_refused_in_one_line(tmp_path, capsys, text):
    whole, other = tmp_path / "whole.json", tmp_path / "other.json"
    write(whole, [entry("a", samples(1e-4))])
    other.write_text(text)
    assert main([str(whole), str(other)]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"cannot read {other}: ")


@pytest.mark.parametrize("rounds", ["0", "-1", "some"])
def test_rounds_are_a_number_of_runs(tmp_path, capsys, rounds):
    with pytest.raises(SystemExit) as left:
        main([str(tmp_path), str(tmp_path), "--rounds", rounds], never)
    assert left.value.code == 2
    assert "--rounds" in capsys.readouterr().err


def benchmark(name, data, environment=H200):
    return Benchmark(name, data, 0.0, {"environment": environment}, f"perf/bench.py::{name}")


def never(checkout, tests):
    raise AssertionError("nothing is suspicious, so nothing runs again")


def again(results):
    """A runner that gives these results, and notes what was asked for."""

    def run(checkout, tests):
        run.asked.append(list(tests))
        return {b.name: b for b in results}

    run.asked = []
    return run


def run(tmp_path, before, after, *options, runner=never):
    files = [write(tmp_path / f"{i}.json", results) for i, results in enumerate((before, after))]
    return main([*map(str, files), *options], runner)


def test_the_command_fails_on_a_regression_and_names_it(tmp_path, capsys):
    before = [entry("norm", samples(1e-4)), entry("loss", samples(1e-3))]
    after = [entry("norm", samples(2e-4, seed=1)), entry("loss", samples(1e-3, seed=1))]
    assert run(tmp_path, before, after, "--no-rerun") == 1
    out = capsys.readouterr().out
    assert "2 compared, 1 slower" in out
    (row,) = (line for line in out.splitlines() if "norm" in line)
    assert "SLOWER" in row


def test_the_command_passes_without_one(tmp_path, capsys):
    before, after = [entry("norm", samples(1e-4))], [entry("norm", samples(1e-4, seed=1))]
    assert run(tmp_path, before, after) == 0


@pytest.mark.parametrize("fact, other", [("gpu", "NVIDIA A100"), ("torch", "2.13.0")])
def test_other_hardware_or_software_is_refused_in_one_line(tmp_path, capsys, fact, other):
    before = [entry("norm", samples(1e-4))]
    after = [entry("norm", samples(2e-4), environment=H200 | {fact: other})]
    assert run(tmp_path, before, after) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"cannot compare: {fact} was {H200[fact]} before, is {other} after"]


def test_a_benchmark_that_is_missing_after_does_not_pass_unless_allowed(tmp_path, capsys):
    before = [entry("norm", samples(1e-4)), entry("old", samples(1e-4))]
    after = [entry("norm", samples(1e-4, seed=1)), entry("fresh", samples(1e-4))]
    assert run(tmp_path, before, after) == 2
    out = capsys.readouterr().out
    assert "missing after: old" in out and "new: fresh" in out and "--allow-missing" in out
    assert run(tmp_path, before, after, "--allow-missing") == 0
    assert run(tmp_path, after[:1], after) == 0, "a new benchmark is no reason to fail"
    slow = [entry("norm", samples(2e-4, seed=1))]
    assert run(tmp_path, before, slow, "--no-rerun") == 1, "what is missing hides no regression"


def test_results_that_share_nothing_are_refused(tmp_path, capsys):
    assert run(tmp_path, [entry("a", samples(1e-4))], [entry("b", samples(1e-4))]) == 2
    assert "no timed benchmark is in both" in capsys.readouterr().out


UNFIT = {"none": [], "NaN": [math.nan], "infinite": [math.inf], "zero": [0.0], "negative": [-1e-4]}


@pytest.mark.parametrize("wrong", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("side", [0, 1])
def test_samples_that_are_no_times_are_refused_with_how_to_save_them(tmp_path, capsys, wrong, side):
    good, bad = entry("norm", samples(1e-4)), entry("norm", samples(1e-4))
    bad["stats"]["data"] = samples(1e-4) + wrong if wrong else []
    sides = [[good], [good]]
    sides[side] = [bad]
    assert run(tmp_path, *sides) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{side}.json has no finite positive samples of norm" in line
    assert "--benchmark-save-data" in line and "--results" in line


def test_results_that_pytest_benchmark_saved_without_data_are_refused(tmp_path, capsys):
    saved = entry("norm", samples(1e-4))
    del saved["stats"]["data"]
    assert run(tmp_path, [saved], [saved]) == 2
    assert "--benchmark-save-data" in capsys.readouterr().out


def test_of_too_few_samples_nothing_is_said(tmp_path, capsys):
    assert compared("norm", [1e-3], [1.06e-3]).verdict == TOO_FEW
    few = [1e-3] * (FEWEST_SAMPLES - 1)
    assert run(tmp_path, [entry("norm", few)], [entry("norm", few)], "--no-rerun") == 2
    assert TOO_FEW in capsys.readouterr().out
    enough = [1e-3] * FEWEST_SAMPLES
    assert run(tmp_path, [entry("norm", enough)], [entry("norm", enough)]) == 0


def test_too_few_samples_in_a_second_run_confirm_nothing(tmp_path):
    runner = again([benchmark("norm", [2e-4])])
    assert run(tmp_path, FAST, SLOW, runner=runner) == 2


def test_the_time_of_counting_is_not_compared(tmp_path, capsys):
    norm = entry("norm", samples(1e-4))
    before, after = (entry("counted", [seconds], figures={}) for seconds in (1.0, 2.0))
    assert run(tmp_path, [norm, before], [norm, after]) == 0
    assert "1 compared" in capsys.readouterr().out
    assert run(tmp_path, [norm, before], [norm]) == 0


def test_a_folder_of_results_is_read_whole(tmp_path, capsys):
    for folder, seed in (("before", 0), ("after", 1)):
        (tmp_path / folder).mkdir()
        for name in ("norm", "loss"):
            write(tmp_path / folder / f"{name}.json", [entry(name, samples(1e-4, seed=seed))])
    assert main([str(tmp_path / "before"), str(tmp_path / "after")], never) == 0
    assert "2 compared" in capsys.readouterr().out


SLOW = [entry("norm", samples(2e-4, seed=1)), entry("loss", samples(1e-3, seed=1))]
FAST = [entry("norm", samples(1e-4)), entry("loss", samples(1e-3))]


def test_what_is_slower_runs_again_before_it_fails(tmp_path, capsys):
    runner = again([benchmark("norm", samples(2e-4, seed=2))])
    assert run(tmp_path, FAST, SLOW, runner=runner) == 1
    assert runner.asked == [["norm"]]
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "| norm" in line)
    assert "SLOWER" in row


def test_what_is_not_slower_again_is_no_regression(tmp_path, capsys):
    runner = again([benchmark("norm", samples(1e-4, seed=2))])
    assert run(tmp_path, FAST, SLOW, runner=runner) == 0
    assert "slower once, not again" in capsys.readouterr().out


def test_what_cannot_be_confirmed_here_is_neither(tmp_path, capsys):
    elsewhere = again([benchmark("norm", samples(2e-4), H200 | {"gpu": "none"})])
    assert run(tmp_path, FAST, SLOW, runner=elsewhere) == 2
    assert "gpu was NVIDIA H200 before, is none after" in capsys.readouterr().out
    assert run(tmp_path, FAST, SLOW, runner=again([])) == 2


@pytest.fixture
def checkouts(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").touch()
    return tmp_path / "old", tmp_path / "new"


class Machine:
    """Runs two checkouts; it slows down from run to run, and `new` takes `factor` times as long."""

    def __init__(self, factor, later=None):
        self.factor, self.later = factor, later
        self.order = []

    def __call__(self, checkout, tests):
        self.order.append(checkout.name)
        seconds = 1e-4 * 1.03 ** len(self.order)
        if checkout.name == "new":
            seconds *= self.later if tests and self.later else self.factor
        return {"norm": benchmark("norm", samples(seconds, seed=len(self.order)))}


def test_checkouts_are_run_in_turns(checkouts):
    machine = Machine(1.0)
    assert main([*map(str, checkouts), "--rounds", "4"], machine) == 0
    assert machine.order == ["old", "new", "new", "old"] * 2


def test_a_machine_that_slows_down_hides_no_regression(checkouts):
    assert main([*map(str, checkouts)], Machine(1.1)) == 1
    assert main([*map(str, checkouts)], Machine(1.1, later=1.0)) == 0


def test_a_benchmark_that_fails_in_one_run_is_missing(checkouts, capsys):
    def runner(checkout, tests):
        results = Machine(1.0)(checkout, tests)
        runner.runs += 1
        if runner.runs != runner.fails:
            results["loss"] = benchmark("loss", samples(1e-3))
        return results

    for runner.fails, where in ((2, "missing after: loss"), (1, "missing in a run before: loss")):
        runner.runs = 0
        assert main([*map(str, checkouts)], runner) == 2
        assert where in capsys.readouterr().out


def test_a_checkout_and_a_results_file_are_not_compared(checkouts, tmp_path, capsys):
    file = write(tmp_path / "a.json", FAST)
    assert main([str(checkouts[0]), str(file)], never) == 2
    assert "two checkouts or two results" in capsys.readouterr().out


def test_a_checkout_without_its_environment_is_refused(checkouts):
    with pytest.raises(Incomparable, match="run make env there"):
        run_benchmarks(checkouts[0], [])
