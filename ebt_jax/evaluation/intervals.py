"""Intervals of shares."""

from __future__ import annotations

import math

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
