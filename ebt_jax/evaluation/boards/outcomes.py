"""Runs a model over boards: what is right after each step, and energies of boards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.data.sudoku import Rules, solved_by_singles
from ebt_jax.interfaces import EnergyModel, Objective
from ebt_jax.models.board import answers
from ebt_jax.refine import PyTree

Batches = Iterable[Mapping[str, ArrayLike]]
CORRUPTIONS = ("one cell", "half the cells")  # of a solution; then the model's own


class Outcomes(NamedTuple):
    """What came of boards; arrays `[attempts, steps, boards]`, one step of one pass.

    Attributes:
      solved: 1 where all cells are right, else 0.
      cells: share of empty cells that are right.
      energy: after each step; None without energies.
      givens: cells given, `[boards]`.
      singles: whether singles alone solve a board, bool `[boards]`.
    """

    solved: np.ndarray
    cells: np.ndarray
    energy: np.ndarray | None
    givens: np.ndarray
    singles: np.ndarray


def find_outcomes(
    objective: Objective,
    params: PyTree,
    batches: Batches,
    rules: Rules,
    *,
    steps: int,
    attempts: int,
    seed: int,
) -> Outcomes:
    """Predicts boards, several times over.

    The first attempt draws what `metrics.evaluate` does. Without noise in the steps an
    energy after some steps is the one there would be if they were all.

    Args:
      objective: of boards.
      params: its parameters.
      batches: of boards; can be iterated over more than once.
      rules: of the boards.
      steps: refinement steps, or passes of a recurrent model.
      attempts: from initial candidates of their own; more than one is of use only
        where something is drawn.
      seed: of initial candidates and noise.
    """
    evaluate = jax.jit(objective.evaluate, static_argnums=3)
    key, puzzles = jax.random.key(seed), []
    found: dict[str, list[list[np.ndarray]]] = {"solved": [], "cells": [], "energy": []}
    for batch in batches:
        counts = np.asarray(batch["weights"]) > 0
        puzzles.append(np.asarray(batch["puzzle"])[counts])
        several: dict[str, list[np.ndarray]] = {name: [] for name in found}
        for attempt in range(attempts):
            drawn = jax.random.fold_in(key, attempt) if attempt else key
            seen = jax.device_get(evaluate(params, dict(batch), drawn, steps))
            several["solved"].append(seen["solved"][:, counts])
            several["cells"].append(seen["cell_accuracy"][:, counts])
            if "energy" in seen:
                several["energy"].append(seen["energy"][1:, counts])
        for name, arrays in several.items():
            found[name].append(arrays)
    joined = {
        name: np.concatenate([np.stack(arrays) for arrays in batches], axis=-1)
        for name, batches in found.items()
        if batches[0]
    }
    whole = np.concatenate(puzzles)
    return Outcomes(
        joined["solved"],
        joined["cells"],
        joined.get("energy"),
        (whole > 0).sum(axis=1),
        solved_by_singles(rules, whole.T),
    )


def find_energies(
    objective: Objective,
    model: EnergyModel,
    params: PyTree,
    batches: Batches,
    *,
    landscape: int,
    steps: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Energies of filled boards, in which no cell is in doubt.

    Args:
      objective: of the model.
      model: whose energy it is.
      params: its parameters.
      batches: of boards.
      landscape: the last one.
      steps: refinement steps of the model's own answers.
      seed: of initial candidates, noise and corruptions.

    Returns:
      `[boards]`: of the `solution`; of it with one empty cell, or half of them, made
      any other digit, by the names in `CORRUPTIONS`; of what the model answers, `own`;
      and whether that is `wrong`, bool.
    """
    from ebt_jax.thinking import Thinking

    predict = jax.jit(objective.predict, static_argnums=3)
    key, rng = jax.random.key(seed), np.random.default_rng(seed)

    @jax.jit
    def energy(params: PyTree, batch: PyTree, filled: jax.Array) -> jax.Array:
        digits = model.target(batch).shape[-1]
        candidate = jax.nn.one_hot(filled - 1, digits)
        context = model.encode_context(params, batch)
        return model.energy(params, context, candidate, jnp.int32(landscape))

    found: dict[str, list[np.ndarray]] = {}
    for arrays in batches:
        batch = {name: jnp.asarray(values) for name, values in arrays.items()}
        counts = np.asarray(batch["weights"]) > 0
        puzzle, solution = np.asarray(batch["puzzle"]), np.asarray(batch["solution"])
        logits = predict(params, batch, key, Thinking(steps))
        own = np.asarray(answers(logits, batch))
        boards = {
            "solution": solution,
            "own": own,
            **{
                name: corrupted(rng, puzzle, solution, whole)
                for name, whole in zip(CORRUPTIONS, (False, True), strict=True)
            },
        }
        for name, filled in boards.items():
            energies = np.asarray(energy(params, batch, jnp.asarray(filled)))
            found.setdefault(name, []).append(energies[counts])
        found.setdefault("wrong", []).append((own != solution).any(axis=1)[counts])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def corrupted(
    rng: np.random.Generator, puzzle: np.ndarray, solution: np.ndarray, half: bool
) -> np.ndarray:
    """Solutions with other digits in some empty cells, int32 `[boards, cells]`.

    Args:
      rng: of which cells, and which digits.
      puzzle: `[boards, cells]`, 0 where empty.
      solution: `[boards, cells]`.
      half: half of the empty cells, rounded up, in place of one.
    """
    digits = int(solution.max())
    empty = puzzle == 0
    count = (empty.sum(axis=1, keepdims=True) + 1) // 2 if half else 1
    rank = (
        np.where(empty, rng.random(puzzle.shape), 2.0).argsort(axis=1).argsort(axis=1)
    )
    shift = rng.integers(1, digits, puzzle.shape)
    other = (solution - 1 + shift) % digits + 1
    return np.where(empty & (rank < count), other, solution).astype(np.int32)
