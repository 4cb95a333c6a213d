"""The loss curve as a PNG."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_SMOOTHING = 0.95
_HEADROOM = 1.15


def loss_curve(
    path: Path, losses: Tensor, evals: list[tuple[int, float]], baselines: dict[str, float]
) -> None:
    """Training loss, validation loss and baselines over steps, in nats per byte.

    Args:
        losses: (steps,) float32 on CPU.
        evals: pairs of step and validation loss.
        baselines: losses by name, drawn as level lines.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = losses.tolist()
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(values), color="tab:blue", label="training, smoothed")
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="tab:orange", label="validation")
    for name, value in baselines.items():
        axes.axhline(value, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} {value:.2f}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color="0.3",
        )
    axes.set_ylim(0, _HEADROOM * max([*baselines.values(), *(loss for _, loss in evals)]))
    axes.set_xlim(0, len(values) + 1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.grid(alpha=0.2)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, format="png")


def _smoothed(values: list[float]) -> list[float]:
    """Exponential mean, without the bias of its start."""
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + 1 - _SMOOTHING
        smooth.append(mean / weight)
    return smooth
