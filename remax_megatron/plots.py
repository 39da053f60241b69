"""The picture of a run: reward and greedy baseline over the steps, and validation accuracy.

    python -m remax_megatron.plots runs/demo/metrics.jsonl runs/demo/curves.png

Reads metrics.jsonl only; needs no display. Thin lines are the values of each step, thick ones their running mean.
"""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from remax_megatron.atomic import replacing
from remax_megatron.metrics import read_metrics

SAMPLED, GREEDY, VALIDATION, INK, GRID = "#2563eb", "#ea580c", "#15803d", "#334155", "#e2e8f0"


def plot_curves(metrics_jsonl: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Draws the two panels into `png` (1500 x 600 pixels), whole or not at all. ValueError when there is no record."""
    records = read_metrics(metrics_jsonl)
    if not records:
        raise ValueError(f"{metrics_jsonl}: no records to draw")

    def series(key: str) -> tuple[np.ndarray, np.ndarray]:
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    for key, label, color in (
        ("reward/mean", "sampled answers", SAMPLED),
        ("baseline/mean", "greedy answers (baseline)", GREEDY),
    ):
        steps, values = series(key)
        if len(steps):
            left.plot(steps, values, color=color, linewidth=1, alpha=0.3)
            left.plot(steps, _running_mean(values), color=color, linewidth=2.4, label=label)
    _dress(left, "Training reward", "mean reward of the step")
    if left.lines:
        left.legend(loc="best", frameon=False, fontsize=11, labelcolor=INK)

    steps, values = series("val/accuracy")
    right.plot(steps, values, color=VALIDATION, linewidth=2.4, marker="o", markersize=6)
    for i, align in ((0, "left"), (-1, "right"))[: len(steps)]:  # beside the line's start, over its end
        place = (10, -4) if align == "left" else (4, 10)
        label = f"{values[i]:.1%}"
        right.annotate(
            label, (steps[i], values[i]), place, textcoords="offset points", ha=align, fontsize=11, color=INK
        )
    _dress(right, "Validation accuracy", "answers that are right")
    if len(values) and min(values) >= 0 and max(values) <= 1:  # a reward of another range keeps its own axis
        right.set_ylim(-0.02, 1.08)
    right.margins(x=0.1)
    right.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))

    with replacing(png) as tmp:
        figure.savefig(tmp, format="png")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of about a tenth of the run, cut at the ends; its length equals `values`'."""
    half = len(values) // 20
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _dress(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=14, color=INK, loc="left", weight="bold")
    axes.set_xlabel("step", fontsize=12, color=INK)
    axes.set_ylabel(ylabel, fontsize=12, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.tick_params(labelsize=11, labelcolor=INK, color=GRID)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)


def main(argv: list[str] | None = None) -> int:
    """Draw the curves of a metrics.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m remax_megatron.plots", description="Draws a run's curves.")
    parser.add_argument("metrics_jsonl")
    parser.add_argument("out_png")
    args = parser.parse_args(argv)
    try:
        plot_curves(args.metrics_jsonl, args.out_png)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out_png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
