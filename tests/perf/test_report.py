"""The report: ratios, losses, the roofline."""

import pytest

from perf.report import by_subject, losses, main, report, roofline_points
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


def test_the_environment_and_the_limits_are_told(results):
    text = report(list(load([results]).values()))
    assert f"- gpu: {H200['gpu']}" in text
    assert "- copy limit: 4.3 TB/s" in text and "- matmul limit: 790 TFLOP/s" in text


def test_roofline_points_are_flops_per_byte_and_flops_per_second(results):
    point = {b.name: (x, y) for b, x, y in roofline_points(load([results]).values())}
    intensity, rate = point["attention-trilith"]
    assert intensity == 2500
    assert rate == pytest.approx(5e11 / 1.2e-3, rel=0.01)


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
