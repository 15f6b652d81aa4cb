"""Intervals of 95 % of shares and of means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NORMAL_95 = 1.959964  # two-sided, standard deviations


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson (1927).

    Unlike mean +- 2 standard errors it is not empty where none or all are right.

    Args:
      right: how many, or the sum of what is 0 or 1.
      count: of how many independent trials, at least 1.
    """
    share, square = right / count, NORMAL_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half = NORMAL_95 * spread / (1 + square / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def student(values: Sequence[float]) -> tuple[float, float]:
    """The interval of a mean by Student's t; NaN where there are fewer than two values.

    Args:
      values: independent, as of runs with different seeds.
    """
    if len(values) < 2:
        return math.nan, math.nan

    from scipy import stats

    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    reach = quantile * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.mean(values)
    return mean - reach, mean + reach
