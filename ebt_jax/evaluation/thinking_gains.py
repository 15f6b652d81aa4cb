"""What thinking gains: means over seeds, by method and data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from ebt_jax.errors import UserError
from ebt_jax.evaluation.intervals import student
from ebt_jax.evaluation.report.shift import (
    HELD_OUT,
    gains,
    gains_since_first_step,
    said,
)
from ebt_jax.evaluation.scaling.axes import tokens_of
from ebt_jax.evaluation.scaling.collect import groups_of


class MeanGain(NamedTuple):
    """How much lower the perplexity of some data gets, over the seeds of a method.

    Attributes:
      method: its name.
      tokens: of training.
      data: its name.
      way: how it was thought.
      shift: perplexity as trained over the held-out one, the mean.
      percent: how much lower perplexity gets in per cent, the mean; below 0 it rises.
      low: the lower end of Student's 95 % interval over seeds; NaN with one seed.
      high: its upper end.
      seeds: how many.
    """

    method: str
    tokens: int
    data: str
    way: str
    shift: float
    percent: float
    low: float
    high: float
    seeds: int


def mean_gains(
    patterns: Sequence[str], by: Sequence[str] = ()
) -> tuple[list[MeanGain], list[str]]:
    """Gains of finished runs, see `report.shift`, as means over seeds.

    Args:
      patterns: folders, or globs of them.
      by: settings whose values make methods; none for all that differ.

    Returns:
      Gains of each method in turn, by shift, held-out text first; and what was left
      out, a sentence each.

    Raises:
      UserError: if there is no finished run, or none that thought.
    """
    found, notes = groups_of(patterns, (), by)
    each: dict[tuple[str, int, str, str], list[tuple[float, float]]] = {}
    for name, run, config in found:
        for gain in [*gains_since_first_step(run), *gains(run)]:
            key = name, tokens_of(config), gain.data, said(gain)
            each.setdefault(key, []).append((gain.shift, 100 * gain.share))
    if not each:
        raise UserError(
            "none of the runs has thought: train EBTs with --config.eval.curve_steps, "
            "or score them by `ebt evaluate --task --think`"
        )
    made = []
    for (name, tokens, data, way), values in each.items():
        shifts, percents = zip(*values, strict=True)
        low, high = student(percents)
        shift, percent = statistics.mean(shifts), statistics.mean(percents)
        made.append(
            MeanGain(name, tokens, data, way, shift, percent, low, high, len(values))
        )
    made.sort(
        key=lambda gain: (
            gain.method.rpartition("-")[0],  # the longer trained after the shorter
            gain.tokens,
            gain.method,
            gain.data != HELD_OUT,
            gain.shift,
        )
    )
    return made, notes


def rows(found: Sequence[MeanGain]) -> list[list[str]]:
    """A table's heads and its lines."""
    heads = ["method", "tokens", "data", "shift", "how", "gain, %", "seeds"]
    return [
        heads,
        *(
            [
                gain.method,
                f"{gain.tokens:,}",
                gain.data,
                f"{gain.shift:.2f}",
                gain.way,
                _said(gain),
                str(gain.seeds),
            ]
            for gain in found
        ),
    ]


def as_json(found: Sequence[MeanGain]) -> dict[str, Any]:
    """All of it; intervals of one seed are not finite."""
    return {"gains": [gain._asdict() for gain in found]}


def _said(gain: MeanGain) -> str:
    if math.isnan(gain.low):
        return f"{gain.percent:+.2f}"
    return f"{gain.percent:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"
