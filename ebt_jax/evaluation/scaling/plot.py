"""The plot of a comparison: points of every seed, laws, and bands around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from ebt_jax.evaluation.plots import new_figure, save_figure
from ebt_jax.evaluation.scaling.compare import Comparison, Method
from ebt_jax.evaluation.scaling.draws import band

# Told apart also by who does not see red and green (Okabe and Ito, 2008).
COLOURS = ("#333333", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP*"
SHORT = 30.0  # largest over least y, below which powers of ten are too few ticks
MOST_TICKS = 8
BEYOND = 1.6  # times the ends of x, to which laws are drawn


def plot_laws(comparison: Comparison, path: Path) -> Path:
    """Draws every method's points and law on logarithmic axes.

    Dots are runs. Within the points a law is drawn whole, with the band of its 95 %
    intervals; beyond them it is dashed.

    Args:
      comparison: of `compare`.
      path: of the PNG file.
    """
    collected = comparison.collected
    figure, axes = new_figure("Scaling laws")
    for place, method in enumerate(comparison.methods):
        _draw(
            axes, method, COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    losses = np.concatenate([m.found.points.y for m in comparison.methods])
    low, high = losses.min(), losses.max()
    margin = (high / low) ** 0.12
    axes.set_ylim(low / margin, high * margin)
    if high / low < SHORT:
        axes.yaxis.set_major_locator(LogLocator(subs=tuple(np.arange(1.0, 10.0, 0.5))))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    places = np.unique(np.concatenate([m.found.points.x for m in comparison.methods]))
    if len(places) <= MOST_TICKS:  # runs are at these x; there is nothing between
        axes.xaxis.set_major_locator(FixedLocator(places.tolist()))
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(collected.x_label)
    axes.set_ylabel(collected.y_label)
    axes.legend(frameon=False, fontsize="small")
    return save_figure(figure, path)


def _draw(axes: Axes, method: Method, colour: str, marker: str) -> None:
    points, law = method.found.points, method.found.law
    ends = points.x.min(), points.x.max()
    inside = np.geomspace(*ends, 80)
    if method.drawn is not None:
        low, high = band(method.drawn, inside)
        axes.fill_between(inside, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(inside, law(inside), color=colour, linewidth=1.4)
    for outside in ((ends[0] / BEYOND, ends[0]), (ends[1], ends[1] * BEYOND)):
        x = np.geomspace(*outside, 20)
        axes.plot(x, law(x), color=colour, linewidth=1, linestyle=(0, (4, 3)))
    label = (
        f"{method.name}: slope {method.slope.value:.4f}, b {method.exponent.value:.2f}"
    )
    axes.plot(
        points.x,
        points.y,
        marker,
        color=colour,
        markersize=4,
        markerfacecolor="none",
        alpha=0.9,
        label=label,
    )
