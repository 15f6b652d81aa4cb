"""Laws of several methods, and what they say against a baseline's."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.evaluation.scaling.collect import BASELINES, Collected, by_group
from ebt_jax.evaluation.scaling.draws import BEYOND, Drawn, crossing, redraw
from ebt_jax.evaluation.scaling.intervals import (
    Fitted,
    Interval,
    Slope,
    exponent_interval,
    exponent_ratio,
    fitted,
    floor_interval,
    slope,
    slope_interval,
    slope_ratio,
)

LOOSE = 3.0  # largest over least exponent of an interval that says little


class Method(NamedTuple):
    """What is found of a method.

    Attributes:
      name: of the group.
      seeds: different ones.
      found: its law.
      straight: its slope.
      exponent: b.
      floor: c.
      slope: of log y against log x, its sign changed.
      drawn: laws of redrawn losses; None where nothing can be said.
    """

    name: str
    seeds: int
    found: Fitted
    straight: Slope
    exponent: Interval
    floor: Interval
    slope: Interval
    drawn: Drawn | None


class Rival(NamedTuple):
    """A method against the baseline.

    Attributes:
      name: of the method.
      slope: how much faster it scales in per cent: ratio of slopes less 1, the paper's
        scaling rate.
      exponent: the same of exponents.
      crossing: the x at which the laws change places; infinity if there is none.
      better: whether the method is the better one beyond the crossing, or everywhere.
    """

    name: str
    slope: Interval
    exponent: Interval
    crossing: Interval
    better: bool


class Comparison(NamedTuple):
    """All of it.

    Attributes:
      collected: what it follows from.
      methods: the baseline first, if there is one.
      rivals: the others; empty where there is one method.
      notes: what to beware of, a sentence each.
    """

    collected: Collected
    methods: list[Method]
    rivals: list[Rival]
    notes: list[str]


def compare(collected: Collected, baseline: str | None, seed: int = 0) -> Comparison:
    """Fits a law to each group and compares them.

    Args:
      collected: points.
      baseline: a group; None for the one that looks like it, else the first.
      seed: of what is redrawn.

    Raises:
      UserError: for what cannot be fitted, or a baseline that is no group.
    """
    groups = by_group(collected.points)
    if baseline is not None and baseline not in groups:
        close = difflib.get_close_matches(baseline, groups, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"--baseline={baseline!r} is no group; {hint}There are: {', '.join(groups)}"
        )
    first = baseline or collected.baseline or _likely(groups)
    order = [first, *(name for name in groups if name != first)]
    methods = []
    for name in order:
        points = groups[name]
        seeds = {point.seed for point in collected.points if point.group == name}
        found, straight = fitted(points), slope(points)
        methods.append(
            Method(
                name=name,
                seeds=len(seeds),
                found=found,
                straight=straight,
                exponent=exponent_interval(found),
                floor=floor_interval(found),
                slope=slope_interval(straight),
                drawn=redraw(found, np.random.default_rng(seed + len(methods))),
            )
        )
    rivals = [_against(method, methods[0]) for method in methods[1:]]
    notes = [*collected.notes, *(note for m in methods for note in _notes_of(m))]
    notes += [note for rival in rivals for note in _crossing_notes(rival, methods)]
    return Comparison(collected, methods, rivals, notes)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was found, for a file; not all of it is finite."""
    collected = comparison.collected
    methods = {
        method.name: {
            "runs": len(method.found.points.x),
            "seeds": method.seeds,
            "x": [
                float(method.found.points.x.min()),
                float(method.found.points.x.max()),
            ],
            "slope": method.slope._asdict(),
            "exponent": method.exponent._asdict(),
            "floor": method.floor._asdict(),
            "coefficient": method.found.law.coefficient,
            "misfit": method.found.misfit,
        }
        for method in comparison.methods
    }
    rivals = {
        rival.name: {
            "slope_percent": rival.slope._asdict(),
            "exponent_percent": rival.exponent._asdict(),
            "crossing": rival.crossing._asdict(),
            "better_beyond": rival.better,
        }
        for rival in comparison.rivals
    }
    return {
        "x": collected.x_label,
        "y": collected.y_label,
        "law": "y = floor + coefficient x^-exponent",
        "baseline": comparison.methods[0].name,
        "methods": methods,
        "against_baseline": rivals,
        "notes": comparison.notes,
        "points": [point._asdict() for point in collected.points],
    }


def _likely(groups: Mapping[str, Any]) -> str:
    """The group whose name is most like a baseline's; else the first."""
    named = [name for name in groups if any(b in name for b in BASELINES)]
    return named[0] if named else next(iter(groups))


def _against(method: Method, baseline: Method) -> Rival:
    points, others = method.found.points, baseline.found.points
    x = np.concatenate([points.x, others.x])
    law, other = method.found.law, baseline.found.law
    place = crossing(law, other, (method.drawn, baseline.drawn), x)
    beyond = BEYOND * float(x.max())
    return Rival(
        method.name,
        _percent(slope_ratio(method.straight, baseline.straight)),
        _percent(exponent_ratio(method.found, baseline.found)),
        place,
        bool(law(beyond) < other(beyond))
        if place.value == math.inf
        else bool(law(place.value * 1.01) < other(place.value * 1.01)),
    )


def _percent(ratio: Interval) -> Interval:
    return Interval(*(100 * (end - 1) for end in ratio))


def _notes_of(method: Method) -> list[str]:
    notes, exponent, found = [], method.exponent, method.found
    if method.slope.value <= 0:
        notes.append(f"{method.name}: y does not fall with x; its law means nothing")
    if not found.spare:
        notes.append(
            f"{method.name}: {len(found.points.x)} runs leave nothing to judge 3 terms "
            "by, so its law has no intervals; add points or seeds"
        )
    elif exponent.low == 0 or exponent.high > LOOSE * exponent.low:
        notes.append(
            f"{method.name}: these points do not tell floor and exponent apart; "
            "compare slopes, or add a wider range of x"
        )
    if found.misfit:
        notes.append(
            f"{method.name}: points are further from the law than seeds explain, so "
            "its intervals take the points, not the runs, as independent"
        )
    if method.seeds == 1:
        notes.append(f"{method.name}: one seed; how seeds differ is taken from the fit")
    return notes


def _crossing_notes(rival: Rival, methods: list[Method]) -> list[str]:
    baseline = methods[0]
    method = next(method for method in methods if method.name == rival.name)
    ends = [m.found.points.x.max() for m in (method, baseline)]
    if rival.crossing.value == math.inf:
        order = "below" if rival.better else "above"
        return [
            f"{rival.name}: its law stays {order} that of {baseline.name} up to "
            f"{BEYOND:g} times the largest x"
        ]
    if rival.crossing.value > min(ends):
        return [
            f"{rival.name}: the crossing with {baseline.name} is "
            f"{rival.crossing.value / min(ends):.1f} times the largest x that was "
            "measured: extrapolation, not a result"
        ]
    return []
