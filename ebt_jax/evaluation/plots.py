"""The two plots of a run: how it learnt, and what thinking longer is worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ebt_jax.errors import UserError

if TYPE_CHECKING:  # matplotlib takes half a second, which no run waits for at its start
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, HELD_OUT = "#9db7d5", "#c0392b"


def learning_curve(workdir: str | Path) -> Path:
    """Plots training loss and held-out loss against optimiser steps.

    Reads `metrics.jsonl`. The first steps of a run can lie far above the rest: they
    are cut off by the frame, not left out of the file.

    Args:
      workdir: of the run; `learning_curve.png` is written into it.

    Returns:
      The path of the plot.

    Raises:
      UserError: if the workdir has no metrics.
    """
    train = _series(workdir, "train/loss")
    held_out, measure, unit = _series(workdir, "eval/nll"), "nll", "nats per token"
    if not len(held_out):
        held_out = _series(workdir, "eval/smooth_l1")
        measure = unit = "smooth L1" if len(held_out) else measure
    figure, axes = new_figure("Learning curve")
    if len(train):
        axes.plot(*train.T, color=TRAIN, linewidth=1, label="training loss")
    if len(held_out):
        label = f"held-out {measure}, {held_out[-1, 1]:.3g} at the end"
        axes.plot(*held_out.T, color=HELD_OUT, marker="o", markersize=4, label=label)
    _frame(axes, np.concatenate([train, held_out])[:, 1])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(unit)
    if axes.lines:
        axes.legend(frameon=False)
    return save_figure(figure, Path(workdir) / "learning_curve.png")


def thinking_curve(
    workdir: str | Path,
    per_step: Sequence[float],
    label: str = "held-out nll (nats per token)",
) -> Path:
    """Plots a held-out number against the number of refinement steps.

    Args:
      workdir: of the run; `thinking_curve.png` is written into it.
      per_step: the number after step 1, 2, ...
      label: what it is.

    Returns:
      The path of the plot.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure("Thinking curve")
    steps = range(1, len(per_step) + 1)
    axes.plot(steps, per_step, color=HELD_OUT, marker="o", markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("refinement step")
    axes.set_ylabel(label)
    return save_figure(figure, Path(workdir) / "thinking_curve.png")


def _series(workdir: str | Path, name: str) -> np.ndarray:
    """`[points, 2]`: step and value of every line of the metrics that has the value."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} does not exist; name the workdir of a training run")
    with path.open() as lines:
        rows = [json.loads(line) for line in lines]
    points = [(row["step"], row[name]) for row in rows if name in row]
    return np.array(points, float).reshape(-1, 2)


def new_figure(title: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes in the style of all plots."""
    from matplotlib.figure import Figure

    # `Figure` instead of pyplot: no global state, and no display is looked for.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _frame(axes: Axes, losses: np.ndarray) -> None:
    """Limits that show the bulk of the losses, whatever the first ones were."""
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return
    low, middle = losses.min(), np.median(losses)
    high = min(losses.max(), middle + 5 * (middle - low))
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG."""
    figure.savefig(path, dpi=150)
    return path
