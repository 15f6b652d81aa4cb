"""How often the intervals of `ebt fit` hold the truth, on curves whose law is known.

    python tests/fit_coverage.py
    python tests/fit_coverage.py --draws=100 --level=0.95

Each setting draws curves with x from 1 to 16, three seeds at each x and independent
lognormal noise, all from `--seed`. Columns: of how many of 100 curves the interval held
the exponent, its median width over the exponent; the same of the plain slope. A second
table, of fewer draws, has the floor, the ratio of two exponents, and a crossing. Exit
code: 1 if the exponent was held in fewer than 95 of 100 in a setting. `--level` is that
of the quantile of F; its default is what `ebt fit` takes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ebt_jax.evaluation.scaling import draws, intervals
from ebt_jax.evaluation.scaling.laws import Law, Points

LAWS = (
    Law(1.0, 1.0, 0.3, 1.0),
    Law(1.2, 0.8, 0.5, 1.0),
    Law(0.5, 2.0, 0.15, 1.0),
    Law(0.0, 2.0, 0.2, 1.0),
)
PLACES, NOISE, SEEDS, LARGEST = (5, 8), (0.005, 0.01, 0.02), 3, 16.0


class Coverage(NamedTuple):
    """Of one setting.

    Attributes:
      exponent: share of the draws whose interval held it.
      width: median width of the interval, over the exponent.
      slope: share of the draws whose interval held the slope of the law's points.
      slope_width: as `width`.
    """

    exponent: float
    width: float
    slope: float
    slope_width: float


def curve(law: Law, places: int, noise: float, rng: np.random.Generator) -> Points:
    """Losses of three seeds at each of some x."""
    x = np.repeat(np.geomspace(1.0, LARGEST, places), SEEDS)
    return Points(x, law(x) * np.exp(noise * rng.standard_normal(len(x))))


def coverage(
    law: Law,
    places: int,
    noise: float,
    count: int,
    level: float = intervals.LEVEL,
    seed: int = 0,
) -> Coverage:
    """How often the intervals of exponent and slope hold the truth."""
    rng = np.random.default_rng(seed)
    exact = np.geomspace(1.0, LARGEST, places)
    slope = intervals.slope(Points(exact, law(exact))).value
    exponents, slopes = [], []
    for _ in range(count):
        points = curve(law, places, noise, rng)
        found = intervals.fitted(points)
        exponents.append(intervals.exponent_interval(found, level))
        slopes.append(intervals.slope_interval(intervals.slope(points)))
    return Coverage(*_held(exponents, law.exponent), *_held(slopes, slope))


def others(
    law: Law, rival: Law, places: int, noise: float, count: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """The same of the floor, the ratio of two exponents, and where two laws cross."""
    rng = np.random.default_rng(seed)
    x = np.repeat(np.geomspace(1.0, LARGEST, places), SEEDS)
    cross = draws.crossing(law, rival, (None, None), x).value
    found: dict[str, list[intervals.Interval]] = {"floor": [], "ratio": [], "cross": []}
    for _ in range(count):
        one, other = (
            intervals.fitted(curve(each, places, noise, rng)) for each in (law, rival)
        )
        found["floor"].append(intervals.floor_interval(one))
        found["ratio"].append(intervals.exponent_ratio(one, other))
        redrawn = (draws.redraw(one, rng), draws.redraw(other, rng))
        found["cross"].append(draws.crossing(one.law, other.law, redrawn, x))
    truth = {
        "floor": law.floor,
        "ratio": law.exponent / rival.exponent,
        "cross": cross,
    }
    return {name: _held(each, truth[name]) for name, each in found.items()}


def _held(found: Sequence[intervals.Interval], truth: float) -> tuple[float, float]:
    """The share that held the truth, and the median width over it."""
    held = [each.low <= truth <= each.high for each in found]
    widths = [each.high - each.low for each in found]
    return float(np.mean(held)), float(np.median(widths)) / max(truth, 1e-12)


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--level", type=float, default=intervals.LEVEL)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("   floor  scale  exponent  points  noise   exponent  width   slope  width")
    least = 1.0
    for law, places, noise in itertools.product(LAWS, PLACES, NOISE):
        its = coverage(law, places, noise, given.draws, given.level, given.seed)
        least = min(least, its.exponent)
        print(
            f"{law.floor:8} {law.scale:6} {law.exponent:9} {places:5}x3 {noise:6.1%} "
            f"{100 * its.exponent:10.1f} {its.width:6.2f} {100 * its.slope:7.1f} "
            f"{its.slope_width:6.3f}",
            flush=True,
        )
    rival = Law(1.1, 0.7, 0.2, 1.0)
    crossed = Law(0.8, 1.2, 0.25, 1.0)
    print(f"\n{max(given.draws // 8, 1)} draws: held, width over the value")
    for one, other in ((LAWS[0], rival), (crossed, Law(1.05, 0.9, 0.35, 1.0))):
        for places, noise in ((5, 0.005), (8, 0.01)):
            count = max(given.draws // 8, 1)
            its = others(one, other, places, noise, count, given.seed)
            parts = [f"{n} {100 * h:.0f} {w:.2f}" for n, (h, w) in its.items()]
            print(f"{places}x3 {noise:.1%}  {'   '.join(parts)}", flush=True)
    print(f"\nexponent: at least {100 * least:.1f} of 100")
    return int(least < 0.95)


if __name__ == "__main__":
    sys.exit(main())
