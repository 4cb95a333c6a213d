"""Comparing results: regressions are found, noise is not one."""

import pytest

from perf.compare import compared, main
from tests.perf.results import H200, entry, samples, write


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


def run(tmp_path, before, after):
    return main([str(write(tmp_path / "a.json", before)), str(write(tmp_path / "b.json", after))])


def test_the_command_fails_on_a_regression_and_names_it(tmp_path, capsys):
    before = [entry("norm", samples(1e-4)), entry("loss", samples(1e-3))]
    after = [entry("norm", samples(2e-4, seed=1)), entry("loss", samples(1e-3, seed=1))]
    assert run(tmp_path, before, after) == 1
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


def test_benchmarks_in_one_only_are_listed(tmp_path, capsys):
    before = [entry("norm", samples(1e-4)), entry("old", samples(1e-4))]
    after = [entry("norm", samples(1e-4, seed=1)), entry("fresh", samples(1e-4))]
    assert run(tmp_path, before, after) == 0
    out = capsys.readouterr().out
    assert "missing after: old" in out and "new: fresh" in out


def test_results_that_share_nothing_are_refused(tmp_path, capsys):
    assert run(tmp_path, [entry("a", samples(1e-4))], [entry("b", samples(1e-4))]) == 2
    assert "no benchmark is in both" in capsys.readouterr().out


def test_a_folder_of_results_is_read_whole(tmp_path, capsys):
    for folder, seed in (("before", 0), ("after", 1)):
        (tmp_path / folder).mkdir()
        for name in ("norm", "loss"):
            write(tmp_path / folder / f"{name}.json", [entry(name, samples(1e-4, seed=seed))])
    assert main([str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    assert "2 compared" in capsys.readouterr().out
