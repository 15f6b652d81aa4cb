"""How far the terms of a law could be from the fitted ones, at 95 %.

With few points the errors of an exponent are skewed, and percentiles of a bootstrap
hold the truth too rarely. So an interval has the values whose best law is not much
worse than the best of all: those where the rise of Huber's loss, over its unit, is
below a quantile of F(1, spare points) (the rho test: Schrader and Hettmansperger,
"Robust analysis of variance based upon a likelihood ratio criterion", Biometrika 1980;
with squares it is the profile likelihood of Bates and Watts). It does not depend on how
a law is written, and may have no upper end.

Where the means of the points are further from the law than seeds explain, it is the
points that are taken as independent, not the runs.

The plain slope of log y against log x has no floor and is a straight line's. It is the
slope over just these x: that the points bend is no error of it, seeds are. Ratios of
slopes are Fieller's ("Some problems in interval estimation", JRSS B 1954).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
from scipy import optimize, stats

from ebt_jax.evaluation.scaling.laws import (
    TERMS,
    Fit,
    Law,
    Points,
    best_exponent,
    exponent_range,
    fit_law,
    influence,
    project,
)

CONFIDENCE = 0.95
# Of F. At 0.97 intervals held the exponent in 94 to 98 of 100 curves, by the setting of
# tests/fit_coverage.py; at this in 95 or more in each.
LEVEL = 0.98
MISFIT = 0.05  # chance of a law that holds to be called a misfit
GRIDS = (65, 17, 17)  # points on which an end is looked for, each within the last
ENDS = 1e-6  # exactness of the floor's ends
PAIRS = 300  # exponents of each of two laws whose ratio is looked for


class Interval(NamedTuple):
    """A number with its 95 % interval.

    Attributes:
      value: the number; NaN if there is none.
      low: minus infinity if there is no lower end, NaN if nothing can be said.
      high: infinity if there is no upper end.
    """

    value: float
    low: float
    high: float


class Fitted(NamedTuple):
    """A law with what its intervals follow from.

    Attributes:
      points: fitted to.
      fit: of `fit_law`.
      unit: of rises of Huber's loss; NaN if there are no spare points.
      spare: degrees of freedom of `unit`.
      misfit: whether the points are further from the law than seeds explain.
    """

    points: Points
    fit: Fit
    unit: float
    spare: int
    misfit: bool

    @property
    def law(self) -> Law:
        """The law."""
        return self.fit.law

    @property
    def u(self) -> np.ndarray:
        """`[points]`, logarithms of x from their mean."""
        return np.log(self.points.x / self.law.center)


class Slope(NamedTuple):
    """The straight line of log y against log x.

    Attributes:
      value: minus its slope: positive where losses fall.
      error: its standard error; NaN if nothing can be said.
      spare: degrees of freedom of the error.
    """

    value: float
    error: float
    spare: int


def fitted(points: Points) -> Fitted:
    """Fits a law, and finds out how exact it can be."""
    fit = fit_law(points)
    bent = influence(fit.residuals, fit.delta)
    counted = float(np.mean(np.abs(fit.residuals) <= fit.delta))
    runs = len(bent)
    means, within, counts = by_point(points.x, bent)
    spare, total = runs - TERMS, float(np.sum(bent**2))
    between = float(np.sum(counts * means**2))
    seeds, places = runs - len(means), len(means) - TERMS
    misfit = False
    if seeds > 0 and places > 0:
        noise = max(float(np.sum(within**2)) / seeds, 1e-300)
        chance = stats.f.sf(between / places / noise, places, seeds)
        misfit = bool(chance < MISFIT)
    if misfit:
        spare, total = places, between
    if spare <= 0:
        return Fitted(points, fit, math.nan, 0, misfit)
    return Fitted(points, fit, max(total / spare / counted, 1e-24), spare, misfit)


def by_point(
    x: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means at each x, what is left of the values, and how many there are at each."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(place, values) / counts
    return means, values - means[place], counts


def exponent_interval(
    found: Fitted, level: float = LEVEL, limit: float | None = None
) -> Interval:
    """The exponent.

    Args:
      found: of `fitted`.
      level: of the quantile of F.
      limit: the quantile; None for that of the level.
    """
    value = found.law.exponent
    limit = _limit(found, level) if limit is None else limit
    if not math.isfinite(limit):
        return Interval(value, math.nan, math.nan)
    low, high = exponent_range(found.points.x)

    def end(stop: float) -> float | None:
        near, far = math.log(value), math.log(stop)
        for points in GRIDS:
            grid = np.linspace(near, far, points)
            rise = _rise(found, np.exp(grid))
            beyond = np.flatnonzero(rise[1:] > limit)
            if not len(beyond):
                return None
            i = int(beyond[0])
            near, far = float(grid[i]), float(grid[i + 1])
        root = np.sqrt(np.minimum(rise[i : i + 2], 1e300))  # nearly straight
        share = (math.sqrt(limit) - root[0]) / max(root[1] - root[0], 1e-300)
        return math.exp(near + float(np.clip(share, 0, 1)) * (far - near))

    below, above = end(min(low, value / 2)), end(max(high, value * 2))
    return Interval(
        value, 0.0 if below is None else below, math.inf if above is None else above
    )


def floor_interval(found: Fitted) -> Interval:
    """The floor, between 0 and the least loss."""
    y, u, delta = found.points.y, found.u, found.fit.delta
    limit = _limit(found, LEVEL)
    value, least = found.law.floor, float(np.min(y))
    if not math.isfinite(limit):
        return Interval(value, math.nan, math.nan)
    # A law as good as those at the floor's ends has an exponent as good, too.
    span = _wide(found, exponent_interval(found), 0.1)

    def over(floor: float) -> float:
        floors = np.asarray(floor)
        best = best_exponent(u, y, span, delta, floors)
        return float(_over(found, project(u, y, best, delta, floors).loss)) - limit

    low, high = 0.0, least
    if over(value) >= 0:  # a curve without noise
        return Interval(value, value, value)
    if value > 0 and over(0.0) > 0:
        low = _root(over, 0.0, value, ENDS * least)
    highest = least * (1 - 1e-6)
    if value < highest and over(highest) > 0:
        high = _root(over, value, highest, ENDS * least)
    return Interval(value, low, high)


def exponent_ratio(one: Fitted, other: Fitted) -> Interval:
    """The exponent of one law over that of another."""
    value = one.law.exponent / max(other.law.exponent, 1e-300)
    spare = min(one.spare, other.spare)
    if not spare:
        return Interval(value, math.nan, math.nan)
    limit = float(stats.f.ppf(LEVEL, 1, spare))
    sides = []
    for found in (one, other):
        its = exponent_interval(found, limit=limit)
        grid = np.geomspace(*_wide(found, its, 0.0), PAIRS)
        sides.append((its, grid, _rise(found, grid)))
    (first, top, rise), (second, bottom, also) = sides
    near = rise[:, None] + also <= limit
    ratios = np.where(near, top[:, None] / bottom, value)
    least, largest = float(ratios.min()), float(ratios.max())
    if first.low == 0 or second.high == math.inf:
        least = 0.0
    if first.high == math.inf or second.low == 0:
        largest = math.inf
    return Interval(value, least, largest)


def slope(points: Points) -> Slope:
    """The slope of log y against log x.

    Its error comes from seeds where there are several, else from the residuals.
    """
    u = np.log(points.x) - np.mean(np.log(points.x))
    v = np.log(points.y)
    square = float(np.sum(u**2))
    falls = -float(np.sum(u * v)) / square
    left = v - np.mean(v) + falls * u
    means, within, _ = by_point(points.x, left)
    spare, total = len(left) - len(means), float(np.sum(within**2))
    if not spare:
        spare, total = len(left) - 2, float(np.sum(left**2))
    error = math.sqrt(total / spare / square) if spare else math.nan
    return Slope(falls, error, spare)


def slope_interval(found: Slope) -> Interval:
    """A slope, by Student's t."""
    if not found.spare:
        return Interval(found.value, math.nan, math.nan)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, found.spare)) * found.error
    return Interval(found.value, found.value - reach, found.value + reach)


def slope_ratio(one: Slope, other: Slope) -> Interval:
    """A slope over another; without ends where the other could be 0."""
    value = one.value / other.value if other.value else math.nan
    if not (one.spare and other.spare and math.isfinite(value)):
        return Interval(value, math.nan, math.nan)
    v1, v2 = one.error**2, (value * other.error) ** 2
    if v1 + v2 == 0:
        return Interval(value, value, value)
    spare = (v1 + v2) ** 2 / (v1**2 / one.spare + v2**2 / other.spare)  # Welch's
    t = float(stats.t.ppf((1 + CONFIDENCE) / 2, spare))
    # (one - r other)^2 <= t^2 (error^2 + r^2 error^2), a parabola in r.
    square = other.value**2 - (t * other.error) ** 2
    if square <= 0:
        return Interval(value, -math.inf, math.inf)
    middle = one.value * other.value / square
    rest = (one.value**2 - (t * one.error) ** 2) / square
    reach = math.sqrt(max(middle**2 - rest, 0.0))
    return Interval(value, middle - reach, middle + reach)


def _rise(found: Fitted, exponent: np.ndarray) -> np.ndarray:
    """By how much the best laws of exponents are worse than the best of all."""
    loss = project(found.u, found.points.y, exponent, found.fit.delta).loss
    return _over(found, loss)


def _over(found: Fitted, loss: np.ndarray) -> np.ndarray:
    return 2 * np.maximum(loss - found.fit.loss, 0.0) / found.unit


def _limit(found: Fitted, level: float) -> float:
    return float(stats.f.ppf(level, 1, found.spare)) if found.spare else math.nan


def _root(
    function: Callable[[float], float], low: float, high: float, near: float
) -> float:
    """Where a function changes its sign, as exactly as is asked for."""
    return float(cast(float, optimize.brentq(function, low, high, xtol=near)))


def _wide(found: Fitted, interval: Interval, margin: float) -> tuple[float, float]:
    """The ends of an exponent's interval, moved apart, where there are any."""
    low, high = exponent_range(found.points.x)
    value = interval.value
    below = interval.low if interval.low > 0 else min(low, value / 2)
    above = interval.high if interval.high < math.inf else max(high, value * 2)
    more = 1 + margin
    return max(below / more, min(low, below)), min(above * more, max(high, above))
