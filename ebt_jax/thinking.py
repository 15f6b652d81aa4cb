"""Thinking: how much refinement a prediction gets once a model is trained.

Longer, until the energy no longer falls, by other steps, or the best of several
attempts: `Thinking` says which, `think` does it. What a prediction draws belongs to its
key, so nothing here depends on how predictions are batched. Forward only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ebt_jax.accepting import refine_accepting
from ebt_jax.errors import UserError
from ebt_jax.methods import (
    Adam,
    Annealed,
    Descent,
    Langevin,
    Lower,
    Mala,
    Method,
    Momentum,
    transform_of,
)
from ebt_jax.randomness import fold_in
from ebt_jax.refine import (
    EnergyFn,
    Perturbing,
    PyTree,
    RefineConfig,
    refine,
    refine_until,
)

__all__ = [
    "AS_TRAINED",
    "Adam",
    "Annealed",
    "Descent",
    "Effort",
    "Langevin",
    "Lower",
    "Mala",
    "Method",
    "Momentum",
    "Thinking",
    "Thought",
    "check_thinking",
    "final_energy",
    "think",
]


class Thinking(NamedTuple):
    """How a prediction is refined. Static: part of the compiled program.

    Attributes:
      num_steps: refinement steps, or the most of them where there is a tolerance; 0
        for the trained number.
      best_of: candidates for each prediction, from initial noise of their own; one of
        them is taken.
      tolerance: a prediction stops when its energy falls by no more than this, in units
        of the energy, see `refine_until`; None takes all steps.
      by: which candidate is taken: `energy`, that of the lowest in the last landscape,
        or `drop`, that whose energy fell most, from the initial candidate's in the
        first landscape to it.
      landscapes: `last` takes steps beyond one for each landscape in the last one;
        `each` takes num_steps in each.
      step_size: below 1 it multiplies the trained one, from 1 on it replaces it, as in
        the published code; 0 leaves it.
      method: how a step is made.
    """

    num_steps: int = 0
    best_of: int = 1
    tolerance: float | None = None
    by: str = "energy"
    landscapes: str = "last"
    step_size: float = 0.0
    method: Method = Descent()


AS_TRAINED = Thinking()


class Effort(NamedTuple):
    """What a prediction took.

    Attributes:
      num_steps: int32 `[*batch]`, refinement steps of the candidate that was taken.
      gradients: int32 `[*batch]`, evaluations of an energy and its gradient, those of
        candidates that were not taken included.
      energies: int32 `[*batch]`, evaluations of an energy alone.
    """

    num_steps: jax.Array
    gradients: jax.Array
    energies: jax.Array


class Thought(NamedTuple):
    """A refined prediction.

    Attributes:
      candidate: the stored candidate, leaves `[*batch, ...]`, not normalised.
      effort: what it took.
      spread: `[*batch]`, standard deviation of the final energies of all candidates: of
        the minima found, how much they differ. 0 where there was one candidate.
    """

    candidate: PyTree
    effort: Effort
    spread: jax.Array

    @property
    def num_steps(self) -> jax.Array:
        """Refinement steps of the candidate that was taken, int32 `[*batch]`."""
        return self.effort.num_steps


def think(
    energy_fn: EnergyFn,
    params: PyTree,
    context: PyTree,
    keys: jax.Array,
    *,
    initial: Callable[[jax.Array], PyTree],
    thinking: Thinking,
    step_size: ArrayLike,
    config: RefineConfig,
    normalize: Callable[[PyTree], PyTree],
    noise_std: ArrayLike | None = None,
    perturbing: Perturbing | None = None,
    rows: Callable[[PyTree, jax.Array], PyTree] | None = None,
) -> Thought:
    """Predicts by refinement.

    The first of several candidates is the one that there is with `best_of` 1.

    Args:
      energy_fn: see `EnergyFn`.
      params: passed to `energy_fn`.
      context: passed to `energy_fn`; all candidates of a prediction share it.
      keys: PRNG keys `[*batch]`, one for each prediction.
      initial: `(keys) -> candidate`, what refinement starts from; that of another model
        where there is a good one, such as a feed-forward model's logits.
      thinking: how.
      step_size: as in `refine`.
      config: as in `refine`; its `num_steps` is the trained number.
      normalize: as in `refine`.
      noise_std: as in `refine`.
      perturbing: as in `refine`.
      rows: as in `refine_until`: what has stopped leaves the work, of one candidate for
        each prediction.

    Raises:
      UserError: at trace time, for what `check_thinking` refuses.
    """
    check_thinking(thinking, config.num_landscapes)
    config = _stepping(thinking, config)
    if thinking.step_size:
        replaced = thinking.step_size >= 1
        step_size = thinking.step_size * (1 if replaced else jnp.asarray(step_size))
    if isinstance(thinking.method, Adam):
        step_size = thinking.method.rate
    if isinstance(thinking.method, Langevin):
        noise_std = thinking.method.noise

    def attempt(keys: jax.Array) -> tuple[Thought, PyTree]:
        start, key = initial(fold_in(keys, 0)), fold_in(keys, 1)
        several = thinking.best_of > 1
        none = jnp.zeros(keys.shape, jnp.int32)
        all_steps = none + config.num_steps
        shared = {"config": config, "step_size": step_size, "normalize": normalize}
        moved = {
            "transform": transform_of(thinking.method),
            "noise_std": noise_std,
            "perturbing": perturbing,
        }
        if isinstance(thinking.method, Lower | Mala):
            candidate, _, _, gradients = refine_accepting(
                energy_fn,
                params,
                context,
                start,
                method=thinking.method,
                key=key,
                **shared,
            )
            effort = Effort(all_steps, none + gradients, none)
        elif thinking.tolerance is None:
            candidate, _ = refine(
                energy_fn,
                params,
                context,
                start,
                key=key,
                observe=lambda step: None,
                **shared,
                **moved,
            )
            effort = Effort(all_steps, all_steps, none)
        else:
            candidate, _, taken, converged = refine_until(
                energy_fn,
                params,
                context,
                start,
                max_steps=config.num_steps,
                tolerance=thinking.tolerance,
                key=key,
                rows=None if several else rows,
                **shared,
                **moved,
            )
            # One more evaluation finds that an energy no longer falls.
            effort = Effort(taken, taken + converged, none)
        return Thought(candidate, effort, none.astype(jnp.float32)), (
            start if several and thinking.by == "drop" else None
        )

    if thinking.best_of == 1:
        return attempt(keys)[0]
    # 0 and 1 are what the first candidate itself folds into its keys.
    others = [fold_in(keys, i) for i in range(2, thinking.best_of + 1)]
    thoughts, starts = jax.vmap(attempt)(jnp.stack([keys, *others]))

    def energies(candidates: PyTree, landscape: int) -> jax.Array:
        def energy(candidate: PyTree) -> jax.Array:
            candidate = _in_landscape(candidate, landscape, config, normalize)
            return energy_fn(params, context, candidate, jnp.int32(landscape))

        return jax.vmap(energy)(candidates)

    final = energies(thoughts.candidate, config.num_landscapes - 1)
    score = final if thinking.by == "energy" else final - energies(starts, 0)
    # One that diverged is never the best, unless all did.
    best = jnp.argmin(jnp.where(jnp.isnan(score), jnp.inf, score), axis=0)
    candidate, effort, _ = jax.tree.map(lambda x: _pick(x, best), thoughts)
    each = thinking.best_of * (1 if thinking.by == "energy" else 2)
    gradients = thoughts.effort.gradients.sum(axis=0)
    effort = Effort(effort.num_steps, gradients, effort.energies + each)
    return Thought(candidate, effort, jnp.std(final.astype(jnp.float32), axis=0))


def final_energy(
    energy_fn: EnergyFn,
    params: PyTree,
    context: PyTree,
    candidate: PyTree,
    config: RefineConfig,
    normalize: Callable[[PyTree], PyTree],
) -> jax.Array:
    """Energy `[*batch]` of a stored candidate in the last landscape."""
    last = config.num_landscapes - 1
    candidate = _in_landscape(candidate, last, config, normalize)
    return energy_fn(params, context, candidate, jnp.int32(last))


def check_thinking(thinking: Thinking, num_landscapes: int = 1) -> None:
    """Refuses what cannot be done.

    Args:
      thinking: how a prediction is to be refined.
      num_landscapes: of the model; a step is taken in each before any test.

    Raises:
      UserError: naming the value and the rule.
    """
    steps, tolerance, method = thinking.num_steps, thinking.tolerance, thinking.method
    kind = type(method).__name__.lower()
    if steps < 0:
        raise UserError(
            f"num_steps is {steps}, but cannot be negative; 0 takes the trained number"
        )
    if thinking.best_of < 1:
        raise UserError(f"best_of is {thinking.best_of}, but has to be at least 1")
    if tolerance is not None and not tolerance >= 0:
        raise UserError(
            f"tolerance is {tolerance}, but cannot be negative; 0 stops when the "
            "energy no longer falls"
        )
    for name, choices in (("by", ("energy", "drop")), ("landscapes", ("last", "each"))):
        value = getattr(thinking, name)
        if value not in choices:
            raise UserError(
                f"{name} is {value!r}, but has to be one of {', '.join(choices)}"
            )
    if thinking.landscapes == "each" and not steps:
        raise UserError("landscapes is 'each', but no steps are given; give steps")
    if not thinking.step_size >= 0:
        raise UserError(
            f"step_size is {thinking.step_size}, but cannot be negative; below 1 it "
            "multiplies the trained one, from 1 on it replaces it"
        )
    if thinking.step_size and isinstance(method, Adam):
        raise UserError(
            f"step_size is {thinking.step_size}, but adam has its own; give it rate"
        )
    if tolerance is None:
        return
    if isinstance(method, Lower | Mala):
        raise UserError(
            f"tolerance is {tolerance}, but {kind} takes all its steps; leave one out"
        )
    if thinking.landscapes == "each" and num_landscapes > 1:
        raise UserError(
            f"tolerance is {tolerance} and landscapes is 'each', but energies are "
            "compared in the last one only; leave one out"
        )


def _stepping(thinking: Thinking, config: RefineConfig) -> RefineConfig:
    """The config with as many steps, in those landscapes, as are to be taken."""
    num_steps = thinking.num_steps or config.num_steps
    last_only = config.final_landscape_only
    if thinking.landscapes == "each":
        num_steps, last_only = thinking.num_steps * config.num_landscapes, False
    return dataclasses.replace(
        config, num_steps=num_steps, min_steps=0, final_landscape_only=last_only
    )


def _in_landscape(
    candidate: PyTree,
    landscape: int,
    config: RefineConfig,
    normalize: Callable[[PyTree], PyTree],
) -> PyTree:
    """The stored candidate as the energy sees it in a landscape."""
    steps = config.normalize_steps
    if steps == "all" or (steps == "first" and landscape == 0):
        return normalize(candidate)
    return candidate


def _pick(attempts: jax.Array, chosen: jax.Array) -> jax.Array:
    """Of `[attempts, *batch, ...]` the chosen `[*batch]` ones, `[*batch, ...]`."""
    trailing = (1,) * (attempts.ndim - 1 - chosen.ndim)
    index = chosen.reshape((1, *chosen.shape, *trailing))
    return jnp.take_along_axis(attempts, index, axis=0)[0]
