"""The report: ratios, losses, the roofline."""

import pytest

from perf.report import beyond, by_subject, losses, main, ratio_table, report, roofline_points
from perf.results import load
from tests.perf.results import H200, entry, samples, write

LIMITS = {"copy": 4.3e12, "matmul": 790e12}


def timed(workload, provider, seconds, *, n_bytes=1e9, flops=2e9):
    return entry(
        f"{workload}-{provider}",
        samples(seconds),
        workload=workload,
        provider=provider,
        bytes=n_bytes,
        flops=flops,
        limits=LIMITS,
        fraction_of_copy=n_bytes / seconds / LIMITS["copy"],
        fraction_of_matmul=flops / seconds / LIMITS["matmul"],
        fraction_of_equal_copy=0.93,
        peak_memory_bytes=2**30 if provider == "trilith" else 2**31,
        host_us=31.5,
        end_to_end_us=310.0,
    )


@pytest.fixture
def results(tmp_path):
    attention = {"n_bytes": 2e8, "flops": 5e11}
    return write(
        tmp_path / "results.json",
        [
            timed("norm", "trilith", 2.6e-4),
            timed("norm", "eager", 5.2e-4),
            timed("norm", "compile", 2.5e-4),
            timed("attention", "trilith", 1.2e-3, **attention),
            timed("attention", "sdpa-flash", 1.1e-3, **attention),
        ],
    )


def test_ratios_are_the_peers_time_over_ours(results):
    text = report(list(load([results]).values()))
    row = next(line for line in text.splitlines() if line.startswith("| norm bf16 forward "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["260.5 us", "89%", "93%"]
    assert cells[-2:] == ["1024 MiB", "2048 MiB"]
    assert "2.00" in cells and "0.96" in cells


def test_the_host_and_end_to_end_have_a_table_each(results):
    _, tables = report(list(load([results]).values())).split("## Host")
    host, end_to_end = tables.split("end to end, us")
    for table, cell in ((host, "31.5"), (end_to_end, "310.0")):
        row = next(line for line in table.splitlines() if line.startswith("| norm bf16 forward "))
        assert row.count(cell) == 3


def test_losses_are_told_the_worst_first(results):
    lost = losses(by_subject(load([results]).values()))
    assert lost == [
        "- attention bf16 forward: 0.92 × sdpa-flash",
        "- norm bf16 forward: 0.96 × compile",
    ]


def test_ours_under_another_name_is_beside_the_peers_and_none_that_is_faster(results, tmp_path):
    compiled = write(tmp_path / "compiled.json", [timed("norm", "trilith-compile", 1e-5)])
    rows = by_subject(load([results, compiled]).values())
    assert losses(rows) == losses(by_subject(load([results]).values()))
    assert "× trilith-compile" in ratio_table(rows)


def test_the_environment_and_the_limits_are_told(results):
    text = report(list(load([results]).values()))
    assert f"- gpu: {H200['gpu']}" in text
    assert "- copy limit: 4.3 TB/s" in text and "- matmul limit: 790 TFLOP/s" in text


def test_roofline_points_are_flops_per_byte_and_flops_per_second(results):
    point = {b.name: (x, y) for b, x, y in roofline_points(load([results]).values())}
    intensity, rate = point["attention-trilith"]
    assert intensity == 2500
    assert rate == pytest.approx(5e11 / 1.2e-3, rel=0.01)


def test_what_is_above_a_limit_is_told_and_not_plotted(results, tmp_path):
    ahead = timed("loss", "liger", 1e-4), timed("loss", "trilith", 3e-4)
    found = load([results, write(tmp_path / "loss.json", ahead)]).values()
    assert beyond(found) == ["- loss bf16 forward liger: 2.3 × the limit"]
    assert {b.name for b, *_ in roofline_points(found)} == {b.name for b in found} - {"loss-liger"}
    text = report(list(found))
    assert "## Above a limit" in text and "loss bf16 forward liger: 2.3 ×" in text
    assert "Above a limit" not in report(list(load([results]).values()))


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_no_results_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("null", "null"), ("none", '{"benchmarks": []}')):
        (tmp_path / f"{name}.json").write_text(text)
    for wrong in ("nowhere.json", "empty", "broken.json", "null.json", "none.json"):
        assert f"cannot read {tmp_path / wrong}: " in refusal(capsys, tmp_path / wrong)


def test_results_of_another_suite_are_refused(tmp_path, capsys):
    foreign = entry("theirs", samples(1e-4))
    foreign["extra_info"] = {}
    assert "not of this suite: theirs" in refusal(capsys, write(tmp_path / "a.json", [foreign]))


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(results, capsys):
    for out in (results, results / "below", "/proc/nope"):
        assert f"--out {out} cannot be written: " in refusal(capsys, results, "--out", out)


def test_the_command_writes_report_and_plots(results, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main([str(results), "--out", str(out)]) == 0
    assert "![Roofline](roofline.png)" in (out / "report.md").read_text()
    assert (out / "roofline.png").stat().st_size > 10_000
    assert "<svg" in (out / "roofline.svg").read_text()[:1000]


def test_results_of_a_cpu_have_no_limits_and_no_plot(tmp_path, capsys):
    path = write(tmp_path / "cpu.json", [entry("norm", samples(1e-4))])
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "roofline.png").exists()
    assert "norm bf16 forward" in capsys.readouterr().out
