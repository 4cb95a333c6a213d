"""Tables and a roofline plot of benchmark results, also where we lose.

    python -m perf.report RESULTS... [--out DIR]

Writes report.md, roofline.png and roofline.svg into DIR; without --out the tables go to the
terminal alone. RESULTS may be folders.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.gate import markdown
from perf.results import Benchmark, Unreadable, load

OURS = "trilith"
_LOSS = 0.98  # a nearer ratio is a draw
_BEYOND = 1.05  # times a limit: more than what measuring it is off by
_NOTED = ("workload", "provider", "dtype", "direction")
_INK, _MUTED, _GRID = "#1f2328", "#59636e", "#d8dee4"
_COLOURS = ("#0b62c4", "#c4430b", "#1f7a4d", "#8a3ffc", "#8c6d00", "#6e7781", "#b3127c")
_MARKERS = "osD^vPX"

Subject = tuple[str, str, str]
Rows = Mapping[Subject, Mapping[str, Benchmark]]


def by_subject(benchmarks: Iterable[Benchmark]) -> Rows:
    rows: defaultdict[Subject, dict[str, Benchmark]] = defaultdict(dict)
    for benchmark in benchmarks:
        rows[benchmark.subject][benchmark.provider] = benchmark
    return rows


def environment_lines(benchmarks: Iterable[Benchmark]) -> list[str]:
    """What the results ran on: one line per fact."""
    facts: defaultdict[str, set[str]] = defaultdict(set)
    for benchmark in benchmarks:
        for fact, value in benchmark.environment.items():
            facts[fact].add(value)
        for limit, unit in (("copy", "TB/s"), ("matmul", "TFLOP/s")):
            if limit in benchmark.info.get("limits", {}):
                value = benchmark.info["limits"][limit] / 1e12
                facts[f"{limit} limit"].add(f"{value:.3g} {unit}")
    return [f"- {fact}: {', '.join(sorted(values))}" for fact, values in sorted(facts.items())]


def ratio_table(rows: Rows) -> str:
    """A line per subject: our time, the fraction of the limit, and each peer's time over ours."""
    peers = sorted({p for found in rows.values() for p in found} - {OURS})
    head = ["case", "Trilith", "of the limit", "of a copy", *(f"× {peer}" for peer in peers)]
    head += ["peak memory", "eager's"]
    lines = []
    for subject, found in rows.items():
        ours = found.get(OURS)
        if ours is None:
            continue
        ratios = [_ratio(found.get(peer), ours) for peer in peers]
        facts = [_time(ours.median), _fraction(ours), _of_equal_copy(ours), *ratios]
        facts += [_memory(ours), _memory(found.get("eager"))]
        lines.append([" ".join(subject), *facts])
    return markdown(head, lines)


def losses(rows: Rows) -> list[str]:
    """Where a peer is faster than we are by more than 2 %, the worst first."""
    found = []
    for subject, row in rows.items():
        if OURS not in row:
            continue
        for provider, peer in row.items():
            ratio = peer.median / row[OURS].median
            if not provider.startswith(OURS) and ratio < _LOSS:
                found.append((ratio, f"- {' '.join(subject)}: {ratio:.2f} × {provider}"))
    return [line for _, line in sorted(found)]


def beyond(benchmarks: Iterable[Benchmark]) -> list[str]:
    """What is above a limit, a line each: some of the work that is counted is not done there."""
    return [
        f"- {' '.join(b.subject)} {b.provider}: {_of_the_limit(b):.1f} × the limit"
        for b in benchmarks
        if _of_the_limit(b) > _BEYOND
    ]


def report(benchmarks: Sequence[Benchmark], figure: str | None = None) -> str:
    """The whole report as Markdown."""
    rows = by_subject(b for b in benchmarks if b.info["workload"] != "dispatch")
    lost = losses(rows)
    sections = [
        "# Benchmark results",
        "\n".join(environment_lines(benchmarks)),
        "Columns with × give a peer's time over Trilith's in the same run: above 1 Trilith is "
        "faster, below 1 the peer is. The limit is what this device reached in this run: a copy's "
        "bandwidth, or a matrix product's throughput, whichever the case came nearer to; where it "
        "is the bandwidth, the time of a copy of as many bytes over Trilith's is beside it.",
        ratio_table(rows),
        "## Where a peer is faster by more than 2 %",
        "\n".join(lost) or "Nowhere.",
    ]
    unbounded = beyond(benchmarks)
    if unbounded:
        sections += [
            "## Above a limit",
            "Part of the work that is counted for these is done elsewhere, such as a gradient in "
            "forward. They are not in the plot.",
            "\n".join(unbounded),
        ]
    host = by_subject(b for b in benchmarks if "host_us" in b.info)
    if host:
        sections += [
            "## Host",
            "What the host needs to issue a call, and how long a call takes from its start to its "
            "completion, without a graph.",
            info_table(host, "host us a call", "host_us"),
            info_table(host, "end to end, us", "end_to_end_us"),
        ]
    if figure is not None:
        sections.insert(4, f"![Roofline]({figure})")
    return "\n\n".join(sections) + "\n"


def info_table(rows: Rows, head: str, fact: str) -> str:
    """A fact in microseconds, of each provider."""
    providers = sorted({p for found in rows.values() for p in found}, key=lambda p: (p != OURS, p))
    lines = [
        [" ".join(subject), *(_microseconds(found.get(provider), fact) for provider in providers)]
        for subject, found in rows.items()
    ]
    return markdown([head, *providers], lines)


def roofline_points(benchmarks: Iterable[Benchmark]) -> list[tuple[Benchmark, float, float]]:
    """(benchmark, FLOP per byte, FLOP/s) of each that has both and is not above a limit."""
    return [
        (b, b.info["flops"] / b.info["bytes"], b.info["flops"] / b.median)
        for b in benchmarks
        if b.info.get("flops") and b.info.get("bytes") and b.info.get("limits")
        if _of_the_limit(b) <= _BEYOND
    ]


def plot_roofline(benchmarks: Sequence[Benchmark], paths: Sequence[Path]) -> bool:
    """Draw every measured point under the device's limits; False if there is none to draw."""
    points = roofline_points(benchmarks)
    if not points:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    _draw_limits(axes, points)
    providers = sorted({b.provider for b, _, _ in points}, key=lambda p: (p != OURS, p))
    for i, provider in enumerate(providers):
        own = [(x, y) for b, x, y in points if b.provider == provider]
        axes.plot(
            *zip(*own, strict=True),
            _MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
            label=provider,
            markersize=7 if provider == OURS else 5,
            markerfacecolor=None if provider == OURS else "white",
            zorder=3 if provider == OURS else 2,
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("FLOP per byte of least traffic", color=_MUTED)
    axes.set_ylabel("FLOP/s", color=_MUTED)
    gpu = points[0][0].environment.get("gpu", "")
    axes.set_title(f"Reached, under the limits measured in the same run · {gpu}", color=_INK)
    axes.grid(which="major", color=_GRID, linewidth=0.6)
    axes.tick_params(colors=_MUTED, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _draw_limits(axes: Any, points: Sequence[tuple[Benchmark, float, float]]) -> None:
    copy, matmul = (points[0][0].info["limits"][k] for k in ("copy", "matmul"))
    intensities = [x for _, x, _ in points]
    ridge = matmul / copy
    low, high = min([*intensities, ridge]) / 3, max([*intensities, ridge]) * 3
    axes.plot([low, ridge, high], [low * copy, matmul, matmul], color=_INK, linewidth=1.4)
    style = {"color": _MUTED, "fontsize": 9}
    axes.annotate(
        f"matmul {matmul / 1e12:.0f} TFLOP/s",
        (high, matmul),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        **style,
    )
    axes.annotate(
        f"copy {copy / 1e12:.2f} TB/s",
        ((low * ridge) ** 0.5, (low * ridge) ** 0.5 * copy),
        xytext=(-6, 6),
        textcoords="offset points",
        ha="right",
        **style,
    )


def _ratio(peer: Benchmark | None, ours: Benchmark) -> str:
    return "" if peer is None else f"{peer.median / ours.median:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _of_the_limit(benchmark: Benchmark) -> float:
    """The fraction of the limit that it came nearer to; 0 where none was measured."""
    return max(benchmark.info.get(k, 0.0) for k in ("fraction_of_copy", "fraction_of_matmul"))


def _fraction(benchmark: Benchmark) -> str:
    return f"{_of_the_limit(benchmark):.0%}" if "limits" in benchmark.info else ""


def _of_equal_copy(benchmark: Benchmark) -> str:
    fraction = benchmark.info.get("fraction_of_equal_copy")
    return "" if fraction is None else f"{fraction:.0%}"


def _memory(benchmark: Benchmark | None) -> str:
    peak = None if benchmark is None else benchmark.info.get("peak_memory_bytes")
    return "" if peak is None else f"{peak / 2**20:.0f} MiB"


def _microseconds(benchmark: Benchmark | None, fact: str) -> str:
    value = None if benchmark is None else benchmark.info.get(fact)
    return "" if value is None else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        benchmarks = list(load(options.results).values())
    except Unreadable as why:
        parser.error(str(why))
    foreign = [b.name for b in benchmarks if not b.info.keys() >= {*_NOTED}]
    if foreign:
        parser.error(f"not of this suite: {', '.join(foreign[:3])}; no {' or '.join(_NOTED)}")
    figure = None
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "report.md").open("a").close()
        except OSError as error:
            parser.error(f"--out {options.out} cannot be written: {error.strerror}")
        paths = [options.out / f"roofline.{suffix}" for suffix in ("png", "svg")]
        figure = paths[0].name if plot_roofline(benchmarks, paths) else None
    text = report(benchmarks, figure)
    print(text)
    if options.out is not None:
        (options.out / "report.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
