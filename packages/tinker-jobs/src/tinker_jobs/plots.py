"""The curve of a job, loss or reward over its optimizer steps, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("svg", "png")
"""Of a job's plots; the ending of the path decides."""
_COLOURS = {"train": "#1f6fb2", "eval": "#c8553d"}


def curve_of(metrics: Mapping[str, Any]) -> str | None:
    """``reward`` or ``loss``, whichever the metrics have over their steps; None for neither."""
    for curve in ("reward", "loss"):
        if _series(metrics, "steps", f"train/{curve}") is not None:
            return curve
    return None


def draw(metrics: Mapping[str, Any], path: Path) -> None:
    """Write the curve of a job's metrics to an ``.svg`` or a ``.png``.

    Raises `ValueError` for metrics without a curve and for another ending, `OSError` where nothing can be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curve = curve_of(metrics)
    if curve is None:
        raise ValueError("neither train/reward nor train/loss is there over steps; nothing to draw")
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"{path.name} must end in one of {', '.join('.' + one for one in FORMATS)}")
    figure = Figure(figsize=(7.0, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (_draw_reward if curve == "reward" else _draw_loss)(axes, metrics)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward" if curve == "reward" else "loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)


def _draw_loss(axes: Axes, metrics: Mapping[str, Any]) -> None:
    _line(axes, _series(metrics, "steps", "train/loss"), "train")
    history = _series(metrics, "eval/steps", "eval/loss_history")
    held_out = metrics.get("eval/loss")
    if history is not None:
        _line(axes, history, "eval", marker="o")
    elif isinstance(held_out, int | float):
        _line(axes, ([metrics["steps"][-1]], [held_out]), "eval", marker="o")


def _draw_reward(axes: Axes, metrics: Mapping[str, Any]) -> None:
    _line(axes, _series(metrics, "steps", "train/reward"), "train")
    low = _series(metrics, "steps", "train/reward_min_per_step")
    high = _series(metrics, "steps", "train/reward_max_per_step")
    if low is not None and high is not None:
        axes.fill_between(
            low[0], low[1], high[1], color=_COLOURS["train"], alpha=0.12, linewidth=0, label="lowest to highest"
        )
    _line(axes, _series(metrics, "eval/steps", "eval/reward"), "eval", marker="o")


def _line(
    axes: Axes, series: tuple[Sequence[float], Sequence[float]] | None, name: str, *, marker: str | None = None
) -> None:
    if series is not None:
        axes.plot(*series, label=name, color=_COLOURS[name], linewidth=1.6, marker=marker or _marker(series[0]))


def _marker(steps: Sequence[float]) -> str | None:
    """A curve of one step is a point."""
    return "o" if len(steps) == 1 else None


def _series(metrics: Mapping[str, Any], axis: str, name: str) -> tuple[Sequence[float], Sequence[float]] | None:
    steps, values = metrics.get(axis), metrics.get(name)
    if not isinstance(steps, list) or not isinstance(values, list) or len(steps) != len(values):
        return None
    # A step that did not report this one holds None.
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return ([step for step, _ in pairs], [value for _, value in pairs]) if pairs else None
