"""What happens inside a prediction: candidates, energies, and the landscape around it.

Pure functions of a batch, for models of tokens: a stored candidate holds logits. All
start and draw as `Objective.evaluate` does, so a prediction that is looked at here is
the one that is scored there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Batch, EnergyModel, FeedForward
from ebt_jax.objective_config import MIN_STEP_SIZE, RefineSetup
from ebt_jax.randomness import fold_in, prediction_keys
from ebt_jax.refine import (
    PyTree,
    Refined,
    Step,
    energy_and_norm,
    make_schedule,
    refine,
)
from ebt_jax.thinking import final_energy

MARGIN = 0.25  # of a slice around its three candidates, as a fraction of its size
SMALLEST = 1e-6  # distance of candidates that still gives a direction


class Trace(NamedTuple):
    """Predictions of a batch, candidate by candidate.

    Row 0 is the initial candidate, row i the one after step i. A feed-forward model has
    one row, its prediction, and no energies.

    Attributes:
      nll: `[steps + 1, batch, seq]`, nats.
      top: int32 `[steps + 1, batch, seq, k]`, the likeliest entries, likeliest first.
      probability: `[steps + 1, batch, seq, k]`, of those.
      energy: `[steps + 1, batch, seq]`, each in the landscape of the step that starts
        at the candidate, that of the final one in the last landscape; or None.
      gradient_norm: `[steps, batch, seq]`, at the candidate that a step starts from; or
        None.
    """

    nll: jax.Array
    top: jax.Array
    probability: jax.Array
    energy: jax.Array | None
    gradient_norm: jax.Array | None


class Slice(NamedTuple):
    """Energies on a plane through initial, final and right candidate of predictions.

    Points are `(x, y)`, Euclidean distances in energy space: the initial candidate is
    the origin, the final one lies on the x axis, the target (all mass on the right
    token) in the upper half. Away from the three a point may be no distribution.

    Attributes:
      x: `[points, batch, seq]`, columns of the grid.
      y: `[points, batch, seq]`, rows of the grid.
      energy: `[points, points, batch, seq]`, by row and column, in the last landscape.
      path: `[steps + 1, batch, seq, 2]`, every candidate's foot on the plane.
      off: `[steps + 1, batch, seq]`, how far each is from the plane.
      target: `[batch, seq, 2]`.
      target_energy: `[batch, seq]`.
    """

    x: jax.Array
    y: jax.Array
    energy: jax.Array
    path: jax.Array
    off: jax.Array
    target: jax.Array
    target_energy: jax.Array


def trace(
    model: EnergyModel,
    setup: RefineSetup,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    *,
    num_steps: int = 0,
    top: int = 5,
) -> Trace:
    """Refines every prediction and records each candidate.

    Args:
      model: of tokens.
      setup: how it was trained to refine.
      params: of the objective: the model's, `step_size`, `noise_std`.
      batch: `tokens`, `targets`, `weights` `[batch, seq]`, `index` `[batch]`.
      key: the seed of `Objective.evaluate`.
      num_steps: refinement steps; 0 for the trained number.
      top: likeliest entries recorded, at least 1 and at most the vocabulary.
    """
    context, initial, how = _start(model, setup, params, batch, key, num_steps)

    def seen(stored: jax.Array) -> dict[str, jax.Array]:
        probability, entries = jax.lax.top_k(jax.nn.softmax(stored), top)
        nll = model.loss(stored, batch)
        return {"nll": nll, "top": entries, "probability": probability}

    def observe(step: Step) -> dict[str, jax.Array]:
        return energy_and_norm(step) | seen(step.after)

    stored, steps = refine(
        model.energy, params, context, initial, observe=observe, **how
    )
    rows = {
        name: jnp.concatenate([value[None], steps[name]])
        for name, value in seen(initial).items()
    }
    final = final_energy(
        model.energy, params, context, stored, how["config"], model.normalize
    )
    energy = jnp.concatenate([steps["energy"], final[None]])
    return Trace(**rows, energy=energy, gradient_norm=steps["gradient_norm"])


def trace_feed_forward(
    model: FeedForward, params: PyTree, batch: Batch, *, top: int = 5
) -> Trace:
    """`trace` of a model that predicts in one pass.

    Args:
      model: of tokens.
      params: its parameters.
      batch: as for `trace`.
      top: likeliest entries recorded.
    """
    logits = model.predict(params, batch)
    probability, entries = jax.lax.top_k(jax.nn.softmax(logits), top)
    nll = model.loss(logits, batch)
    return Trace(nll[None], entries[None], probability[None], None, None)


def landscape_slice(
    model: EnergyModel,
    setup: RefineSetup,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    *,
    num_steps: int = 0,
    points: int = 25,
) -> Slice:
    """Energies on the plane through where a refinement starts, ends and should end.

    Costs about `points ** 2` energies of the whole batch, one after the other.

    Args:
      model: of tokens.
      setup: how it was trained to refine.
      params: of the objective.
      batch: as for `trace`.
      key: as for `trace`.
      num_steps: refinement steps; 0 for the trained number.
      points: rows and columns of the grid.
    """
    context, initial, how = _start(model, setup, params, batch, key, num_steps)
    config = how["config"]
    last = config.num_landscapes - 1

    def refined(observe: Callable[[Step], PyTree], steps: int) -> Refined:
        settings = how | {"config": dataclasses.replace(config, num_steps=steps)}
        return refine(
            model.energy, params, context, initial, observe=observe, **settings
        )

    first = refined(lambda step: step.before, 1).trajectory[0]
    final = refined(lambda step: None, config.num_steps).candidate
    steps = config.normalize_steps
    if steps == "all" or (steps == "first" and last == 0):
        final = model.normalize(final)
    target = model.target(batch)

    along, length = _direction(final - first)
    aside = target - first
    across, height = _direction(aside - _dot(aside, along)[..., None] * along)

    def foot(candidate: jax.Array) -> dict[str, jax.Array]:
        """Where a candidate stands in the plane, and how far from it."""
        offset = candidate - first
        x, y = _dot(offset, along), _dot(offset, across)
        rest = offset - x[..., None] * along - y[..., None] * across
        return {
            "path": jnp.stack([x, y], axis=-1),
            "off": jnp.linalg.norm(rest, axis=-1),
        }

    # A second refinement, the same as the first: nothing but two numbers of each
    # candidate is kept, however large the vocabulary.
    way = refined(lambda step: foot(step.before), config.num_steps).trajectory
    way = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), way, foot(final))
    corner = foot(target)["path"]

    left = jnp.minimum(corner[..., 0], 0.0)
    right = jnp.maximum(corner[..., 0], length)
    size = jnp.maximum(right - left, height)
    x = _framed(left, right, size, points)
    y = _framed(jnp.zeros_like(height), height, size, points)
    energy_of = functools.partial(model.energy, params, context)
    landscape = jnp.int32(last)

    def energies(row: jax.Array) -> jax.Array:
        def energy(column: jax.Array) -> jax.Array:
            offset = column[..., None] * along + row[..., None] * across
            return energy_of(first + offset, landscape)

        return jax.lax.map(energy, x)

    return Slice(
        x=x,
        y=y,
        energy=jax.lax.map(energies, y),
        target=corner,
        target_energy=energy_of(target, landscape),
        **way,
    )


def _start(
    model: EnergyModel,
    setup: RefineSetup,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    num_steps: int,
) -> tuple[PyTree, jax.Array, dict[str, Any]]:
    """Context, stored initial candidate, and what else `refine` needs, as to evaluate.

    `tests/evaluation/test_analysis.py` holds this against `Objective.evaluate`.
    """
    keys = prediction_keys(key, batch["index"], jnp.arange(batch["weights"].shape[1]))
    scale = setup.initial_scale if setup.initial_candidate == "noise" else 0.0
    config = dataclasses.replace(
        setup,
        num_steps=num_steps or make_schedule(setup).length,
        min_steps=0,
        final_landscape_only=True,
        step_size_jitter=1.0,
        backprop="per_step",
    )
    how = {
        "config": config,
        "key": fold_in(keys, 1),
        "normalize": model.normalize,
        "step_size": jnp.maximum(params["step_size"], MIN_STEP_SIZE),
        "noise_std": params["noise_std"] if setup.noise_std else None,
    }
    candidate = scale * model.initial_candidate(fold_in(keys, 0), batch)
    return model.encode_context(params, batch), candidate, how


def _direction(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors of `[..., n]`, zero where there is none, and lengths `[...]`."""
    length = jnp.linalg.norm(vector, axis=-1)
    unit = vector / jnp.maximum(length, SMALLEST)[..., None]
    return jnp.where(length[..., None] > SMALLEST, unit, 0.0), length


def _framed(low: jax.Array, high: jax.Array, size: jax.Array, points: int) -> jax.Array:
    """`[points, ...]` from below low to above high, and over half of size at least."""
    missing = jnp.maximum(size / 2 - (high - low), 0.0)
    margin = MARGIN * jnp.maximum(high - low, SMALLEST) + missing / 2
    return jnp.linspace(low - margin, high + margin, points)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(axis=-1)
