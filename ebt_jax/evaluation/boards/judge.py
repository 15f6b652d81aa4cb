"""From what came of boards to numbers with intervals, and tables of them.

Every number is `[mean, low, high]`: 95 % of bootstrap samples of the boards lie between
low and high. Where none is solved, or all are, no sample differs, and the interval is
Wilson's. What two choices differ by is taken board by board.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ebt_jax.evaluation.boards.outcomes import CORRUPTIONS, Outcomes
from ebt_jax.evaluation.uncertainty import auroc

RESAMPLES = 1000
WILSON = 1.96**2  # of an interval that holds 95 %
_FEWER = 200  # of a number that takes longer
Number = list[float]  # mean, low, high


def judge(outcomes: Outcomes, trained: int, seed: int) -> dict[str, Any]:
    """How many boards are solved, by steps and by attempts.

    Args:
      outcomes: of at least as many steps.
      trained: steps that a prediction takes.
      seed: of the bootstrap.

    Returns:
      `givens` (their mean), `boards`; after the trained steps `solved` and `cells`;
      `curve`, the same after each step; `thinking`, boards solved after the trained
      steps less those after one, and `longer`, after all steps less after the trained.
      `singles`: the share of boards that singles solve, and `solved` of those and of
      the others. `each`: the share of attempts that solve each board. Of several
      attempts with energies `best_of`, see `_best_of`; of energies `auroc`, the chance
      that a board that is not solved has a higher one than one that is.
    """
    rng = np.random.default_rng(seed)
    solved, cells = outcomes.solved.mean(axis=0), outcomes.cells.mean(axis=0)
    at = min(trained, len(solved)) - 1
    judged: dict[str, Any] = {
        "boards": len(outcomes.givens),
        "givens": float(outcomes.givens.mean()),
        "steps": at + 1,
        "solved": interval(rng, solved[at]),
        "cells": interval(rng, cells[at]),
        "curve": [
            {
                "step": step,
                "solved": interval(rng, solved[step - 1]),
                "cells": interval(rng, cells[step - 1]),
            }
            for step in range(1, len(solved) + 1)
        ],
        "singles": _by_singles(rng, outcomes.singles, solved[at]),
        "each": solved[at].tolist(),
    }
    if len(solved) > 1:
        judged["thinking"] = difference(rng, solved[at], solved[0])
        judged["longer"] = difference(rng, solved[-1], solved[at])
    if outcomes.energy is None:
        return judged
    energy, right = outcomes.energy[:, at], outcomes.solved[:, at]
    judged["auroc"] = _interval_of(
        rng,
        lambda chosen: auroc(energy[:, chosen].ravel(), 1 - right[:, chosen].ravel()),
        energy.shape[1],
    )
    if len(energy) > 1:
        judged["best_of"] = _best_of(rng, energy, right)
    return judged


def judge_energies(energies: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """How often the solution has a lower energy than another board.

    Args:
      energies: of `find_energies`.
      seed: of the bootstrap.

    Returns:
      By what is compared with it; of the model's own answers those that are wrong, None
      where there are none.
    """
    rng = np.random.default_rng(seed)
    true, wrong = energies["solution"], energies["wrong"]
    lower = {name: (true < energies[name]).astype(float) for name in CORRUPTIONS}
    judged: dict[str, Any] = {name: interval(rng, v) for name, v in lower.items()}
    own = (true < energies["own"]).astype(float)[wrong]
    judged["own wrong answers"] = interval(rng, own) if own.size else None
    return judged


def interval(rng: np.random.Generator, values: np.ndarray) -> Number:
    """Mean of `[boards]`, and 95 % of its bootstrap, see the module."""
    count = len(values)
    if values.min() == values.max() and values[0] in (0, 1):
        unseen = WILSON / (count + WILSON)
        return [1.0, 1 - unseen, 1.0] if values[0] else [0.0, 0.0, unseen]
    drawn = (
        rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) @ values / count
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [float(values.mean()), float(low), float(high)]


def difference(rng: np.random.Generator, a: np.ndarray, b: np.ndarray) -> Number:
    """What the mean of a is above that of b, of the same boards, and 95 % of that."""
    apart = (a - b + 1) / 2  # so that no difference is neither 0 nor 1
    return [2 * part - 1 for part in interval(rng, apart)]


def tables(judged: Mapping[str, Any]) -> str:
    """The results of all ranges of givens, for people.

    Args:
      judged: by range, such as `24-30`, what `judge` found, and with it as `energy`
        what `judge_energies` did, where there are energies.
    """
    heads = ["givens", "boards", "solved", "cells right", "by steps", "singles solve"]
    heads += ["solved of those", "solved of others"]
    rows = []
    for band, found in judged.items():
        singles = found["singles"]
        rows.append(
            [
                band,
                str(found["boards"]),
                shown(found["solved"]),
                shown(found["cells"]),
                shown(found["thinking"], "+") if "thinking" in found else "-",
                f"{singles['share']:.1%}",
                *(shown(singles[name]) for name in ("solved", "others_solved")),
            ]
        )
    made = [aligned(heads, rows), _curves(judged)]
    made += [_choices(judged), _checks(judged)]
    return "\n\n".join(table for table in made if table)


def shown(number: Sequence[float] | None, sign: str = "") -> str:
    """`29.7% (27.1 to 32.4)`."""
    if number is None:
        return "-"
    mean, low, high = (100 * part for part in number)
    return f"{mean:{sign}.1f}% ({low:{sign}.1f} to {high:{sign}.1f})"


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text, the first column to the left."""
    lines = [heads, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _by_singles(
    rng: np.random.Generator, singles: np.ndarray, solved: np.ndarray
) -> dict[str, Any]:
    parts = {"solved": solved[singles], "others_solved": solved[~singles]}
    numbers = {n: interval(rng, v) if v.size else None for n, v in parts.items()}
    return {"share": float(singles.mean()), **numbers}


def _best_of(
    rng: np.random.Generator, energy: np.ndarray, right: np.ndarray
) -> list[dict[str, Any]]:
    """Of the first 2, 4, ... attempts, and of all: what becomes of each choice.

    Boards solved by the attempt of `lowest` energy, by a `random` one, by the best one
    (`oracle`); and `gain`, the first of these less the second.
    """
    attempts = len(energy)
    counts = [2**i for i in range(1, attempts.bit_length()) if 2**i < attempts]
    found = []
    for count in [*counts, attempts]:
        lowest = energy[:count].argmin(axis=0)
        chosen = np.take_along_axis(right[:count], lowest[None], axis=0)[0]
        anyone, best = right[:count].mean(axis=0), right[:count].max(axis=0)
        found.append(
            {
                "attempts": count,
                "lowest": interval(rng, chosen),
                "random": interval(rng, anyone),
                "oracle": interval(rng, best),
                "gain": difference(rng, chosen, anyone),
            }
        )
    return found


def _interval_of(
    rng: np.random.Generator, of: Callable[[np.ndarray], float], count: int
) -> Number | None:
    """A number of boards `[chosen]`, and 95 % of its bootstrap; None if undefined."""
    whole = of(np.arange(count))
    drawn = [of(rng.integers(count, size=count)) for _ in range(_FEWER)]
    drawn = [value for value in drawn if np.isfinite(value)]
    if not np.isfinite(whole):
        return None
    return [float(whole), *map(float, np.quantile(drawn, [0.025, 0.975]))]


def _curves(judged: Mapping[str, Any]) -> str:
    longest = max(len(found["curve"]) for found in judged.values())
    if longest == 1:
        return ""
    heads = ["step", *(f"solved, {band} given" for band in judged)]
    rows = [
        [str(i + 1), *(shown(found["curve"][i]["solved"]) for found in judged.values())]
        for i in range(longest)
    ]
    return aligned(heads, rows)


def _choices(judged: Mapping[str, Any]) -> str:
    rows = [
        [
            band,
            str(row["attempts"]),
            *(shown(row[name]) for name in ("random", "lowest", "oracle")),
            shown(row["gain"], "+"),
        ]
        for band, found in judged.items()
        for row in found.get("best_of", ())
    ]
    heads = ["givens", "attempts", "a random one", "lowest energy", "the best one"]
    return aligned([*heads, "lowest - random"], rows) if rows else ""


def _checks(judged: Mapping[str, Any]) -> str:
    others = (*CORRUPTIONS, "own wrong answers")
    rows = []
    for band, found in judged.items():
        if "energy" in found:
            area = found["auroc"]
            cells = "-" if area is None else "{:.3f} ({:.3f} to {:.3f})".format(*area)
            rows.append([band, cells, *(shown(found["energy"][o]) for o in others)])
    heads = ["givens", "AUROC of energy", *(f"solution below {o}" for o in others)]
    return aligned(heads, rows) if rows else ""
