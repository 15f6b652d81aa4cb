"""Thinking: how much refinement a prediction gets once a model is trained.

Longer, until the energy no longer falls, or the best of several attempts: each is a
way of calling `refine` and `refine_until`. What a prediction draws belongs to its key,
so nothing here depends on how predictions are batched. Forward only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ebt_jax.randomness import fold_in
from ebt_jax.refine import EnergyFn, PyTree, RefineConfig, refine, refine_until


class Thinking(NamedTuple):
    """How a prediction is refined. Static: part of the compiled program.

    Attributes:
      num_steps: refinement steps, or the most of them where there is a tolerance; 0
        for the trained number.
      best_of: candidates for each prediction, from initial noise of their own; the one
        with the lowest energy in the last landscape is taken.
      tolerance: a prediction stops when its energy falls by no more than this, in units
        of the energy, see `refine_until`; None takes all steps.
    """

    num_steps: int = 0
    best_of: int = 1
    tolerance: float | None = None


AS_TRAINED = Thinking()


class Thought(NamedTuple):
    """A refined prediction.

    Attributes:
      candidate: the stored candidate, leaves `[*batch, ...]`, not normalised.
      num_steps: int32 `[*batch]`, refinement steps that it took.
    """

    candidate: PyTree
    num_steps: jax.Array


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
) -> Thought:
    """Predicts by refinement.

    The first of several candidates is the one that there is with `best_of` 1.

    Args:
      energy_fn: see `EnergyFn`.
      params: passed to `energy_fn`.
      context: passed to `energy_fn`; all candidates of a prediction share it.
      keys: PRNG keys `[*batch]`, one for each prediction.
      initial: `(keys) -> candidate`, what refinement starts from.
      thinking: how much.
      step_size: as in `refine`.
      config: as in `refine`; its `num_steps` is the trained number.
      normalize: as in `refine`.
      noise_std: as in `refine`.

    Raises:
      ValueError: at trace time, if there would be no candidate, no step, or a negative
        tolerance.
    """
    if thinking.best_of < 1:
        raise ValueError(f"best_of is {thinking.best_of}, but has to be at least 1")
    num_steps = thinking.num_steps or config.num_steps

    def attempt(keys: jax.Array) -> Thought:
        start, key = initial(fold_in(keys, 0)), fold_in(keys, 1)
        if thinking.tolerance is None:
            candidate, _ = refine(
                energy_fn,
                params,
                context,
                start,
                step_size=step_size,
                config=dataclasses.replace(config, num_steps=num_steps),
                key=key,
                normalize=normalize,
                observe=lambda step: None,
                noise_std=noise_std,
            )
            return Thought(candidate, jnp.full(keys.shape, num_steps))
        candidate, _, taken, _ = refine_until(
            energy_fn,
            params,
            context,
            start,
            step_size=step_size,
            config=config,
            max_steps=num_steps,
            tolerance=thinking.tolerance,
            key=key,
            normalize=normalize,
            noise_std=noise_std,
        )
        return Thought(candidate, taken)

    if thinking.best_of == 1:
        return attempt(keys)
    # 0 and 1 are what the first candidate itself folds into its keys.
    others = [fold_in(keys, i) for i in range(2, thinking.best_of + 1)]
    thoughts = jax.vmap(attempt)(jnp.stack([keys, *others]))
    energies = jax.vmap(
        lambda candidate: final_energy(
            energy_fn, params, context, candidate, config, normalize
        )
    )(thoughts.candidate)
    # One that diverged is never the best, unless all did.
    lowest = jnp.argmin(jnp.where(jnp.isnan(energies), jnp.inf, energies), axis=0)
    return jax.tree.map(lambda x: _pick(x, lowest), thoughts)


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
    steps = config.normalize_steps
    if steps == "all" or (steps == "first" and last == 0):
        candidate = normalize(candidate)
    return energy_fn(params, context, candidate, jnp.int32(last))


def _pick(attempts: jax.Array, chosen: jax.Array) -> jax.Array:
    """Of `[attempts, *batch, ...]` the chosen `[*batch]` ones, `[*batch, ...]`."""
    trailing = (1,) * (attempts.ndim - 1 - chosen.ndim)
    index = chosen.reshape((1, *chosen.shape, *trailing))
    return jnp.take_along_axis(attempts, index, axis=0)[0]
