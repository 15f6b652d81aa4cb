"""What follows from whole laws: bands around them, and where two of them cross.

The intervals of these come from laws fitted to redrawn losses. Residuals are drawn
anew, over points and seeds, around the law; they are widened for the terms that were
fitted to them and, by a chi-square draw, for what so few say about their size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ebt_jax.evaluation.scaling.intervals import (
    CONFIDENCE,
    Fitted,
    Interval,
    by_point,
)
from ebt_jax.evaluation.scaling.laws import (
    TERMS,
    Law,
    best_exponent,
    exponent_range,
    influence,
    project,
)

DRAWS = 300
BEYOND = 1000.0  # times the largest x, up to which crossings are looked for
PLACES = 1500  # of x at which the order of two laws is looked at


class Drawn(NamedTuple):
    """Laws of redrawn losses.

    Attributes:
      floor: `[draws]`.
      scale: `[draws]`.
      exponent: `[draws]`.
      center: of all.
    """

    floor: np.ndarray
    scale: np.ndarray
    exponent: np.ndarray
    center: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """`[draws, places]`, the losses at x."""
        u = np.log(x / self.center)
        return self.floor[:, None] + self.scale[:, None] * np.exp(
            -self.exponent[:, None] * u
        )


def redraw(found: Fitted, rng: np.random.Generator, draws: int = DRAWS) -> Drawn | None:
    """Laws that could have come out, had the seeds been others.

    Args:
      found: the law that did.
      rng: which others.
      draws: how many.

    Returns:
      The laws, None where no points are spare to learn of the noise.
    """
    if not found.spare:
        return None
    points, law = found.points, found.law
    noise = _noise(found, rng, draws)
    y = law(points.x) * np.exp(noise)
    span, delta = exponent_range(points.x), found.fit.delta
    exponent = best_exponent(found.u, y, span, delta)
    best = project(found.u, y[:, None], exponent[:, None], delta)
    return Drawn(best.floor[:, 0], best.scale[:, 0], exponent, law.center)


def band(drawn: Drawn, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % intervals of a law's losses at each x."""
    losses = drawn(x)
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(losses, tail, 0), np.quantile(losses, 1 - tail, 0)


def crossing(
    one: Law, other: Law, draws: tuple[Drawn | None, Drawn | None], x: np.ndarray
) -> Interval:
    """The first x, from the smallest of the points on, at which laws change places.

    Args:
      one: a law.
      other: another.
      draws: of `redraw`, of both.
      x: `[points]` of both.

    Returns:
      The x; infinity where there is none up to `BEYOND` times the largest point. The
      ends are NaN where nothing can be said.
    """
    grid = np.geomspace(float(x.min()), BEYOND * float(x.max()), PLACES)
    value = float(_first_change((one(grid) - other(grid))[None], grid)[0])
    first, second = draws
    if first is None or second is None:
        return Interval(value, math.nan, math.nan)
    found = np.sort(_first_change(first(grid) - second(grid), grid))
    tail = (1 - CONFIDENCE) / 2
    last = len(found) - 1
    low, high = found[math.floor(tail * last)], found[math.ceil((1 - tail) * last)]
    return Interval(value, min(float(low), value), max(float(high), value))


def _noise(found: Fitted, rng: np.random.Generator, draws: int) -> np.ndarray:
    """`[draws, points]`, residuals that could have been."""
    x = found.points.x
    bent = influence(found.fit.residuals, found.fit.delta)
    runs = len(x)
    size = np.sqrt(found.spare / rng.chisquare(found.spare, (draws, 1)))
    if not found.misfit:
        wide = (bent - bent.mean()) * math.sqrt(runs / found.spare)
        return size * rng.choice(wide, (draws, runs))
    means, within, _ = by_point(x, bent)
    places = len(means)
    wide = (means - means.mean()) * math.sqrt(places / (places - TERMS))
    seeds = within * math.sqrt(runs / (runs - places))
    _, place = np.unique(x, return_inverse=True)
    at_points = rng.choice(wide, (draws, places))[:, place]
    return size * (at_points + rng.choice(seeds, (draws, runs)))


def _first_change(gaps: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """`[draws]`, where gaps first change their sign along x; infinity if nowhere."""
    changes = np.sign(gaps[:, 1:]) * np.sign(gaps[:, :-1]) < 0
    at = np.argmax(changes, -1)
    rows = np.arange(len(gaps))
    before, after = gaps[rows, at], gaps[rows, at + 1]
    share = np.where(changes[rows, at], before, 0.0) / np.where(
        changes[rows, at], before - after, 1.0
    )
    u = np.log(grid)
    where = np.exp(u[at] + share * (u[at + 1] - u[at]))
    return np.where(changes.any(-1), where, math.inf)
