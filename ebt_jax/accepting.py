"""Refinement that compares energies and takes some steps only.

`methods.Lower` takes those that lower the energy, so no energy ever rises within a
landscape. It tries the step of training, c - a g. Where that fails, it starts from the
stored candidate z and not from c = normalize(z), with ever smaller steps: z - s a g
tends to z, as c - s a g does not, and where normalize is a softmax, whose Jacobian is
positive semi-definite, it lowers the energy once s is small.

`methods.Mala` takes them at random such that detailed balance holds: with proposal
z' = m(z) + sqrt(2 a t) n, m(z) the end of a plain step from z, the density

    exp(-E(normalize(z)) / t)

is kept (Roberts & Tweedie 1996). Energies of different landscapes are not comparable:
where the landscape changes, the candidate's energy is taken anew. That, and one
evaluation for each proposal, is what a prediction costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ebt_jax.meta_gradient import EnergyFn, PyTree, energy_and_gradient
from ebt_jax.methods import Lower, Mala
from ebt_jax.randomness import fold_in, normal_like, typed, uniform
from ebt_jax.refine_config import RefineConfig, make_schedule
from ebt_jax.refine_step import check_energy, energy_space, float_dtype, update, where


class Accepted(NamedTuple):
    """What `refine_accepting` returns.

    Attributes:
      candidate: the stored candidate, not normalised.
      energy: `[steps, *batch]`, of the candidate after each step, in its landscape.
      accepted: bool `[steps, *batch]`, whether the step was taken.
      gradients: evaluations of energy and gradient that each prediction took.
    """

    candidate: PyTree
    energy: jax.Array
    accepted: jax.Array
    gradients: int


class _Point(NamedTuple):
    """A stored candidate, where it is in energy space, and what is known there."""

    stored: PyTree
    before: PyTree
    energy: jax.Array
    gradient: PyTree


def refine_accepting(
    energy_fn: EnergyFn,
    params: PyTree,
    context: PyTree,
    candidate: PyTree,
    *,
    method: Lower | Mala,
    step_size: ArrayLike,
    config: RefineConfig,
    key: jax.Array | None = None,
    normalize: Callable[[PyTree], PyTree] | None = None,
) -> Accepted:
    """Refines a candidate by steps that have to be accepted. Forward only.

    Args:
      energy_fn: see `EnergyFn`.
      params: passed to `energy_fn`.
      context: passed to `energy_fn`.
      candidate: the initial candidate, leaves `[*batch, ...]`.
      method: which steps are accepted.
      step_size: positive scalar, or an array broadcastable to the energies.
      config: steps, landscapes and clamps; its noise and jitter have no part in it.
      key: PRNG key, scalar or `[*batch]`, for `Mala`.
      normalize: as in `refine`.

    Raises:
      ValueError, TypeError: at trace time, as `refine` does.
    """
    batch = check_energy(energy_fn, params, context, candidate)
    candidate = jax.tree.map(jnp.asarray, candidate)
    if isinstance(method, Mala) and key is None:
        raise ValueError("refine_accepting has to draw noise but got key=None")
    key = None if key is None else typed(key)
    base = jnp.asarray(step_size, float_dtype(candidate))
    gradient_fn = energy_and_gradient(energy_fn, "autodiff")
    landscapes = make_schedule(config).landscape
    anew = jnp.concatenate([jnp.ones(1, bool), landscapes[1:] != landscapes[:-1]])

    def expand(value: jax.Array, leaf: jax.Array) -> jax.Array:
        shape = (1,) * (len(batch) - value.ndim) + value.shape
        return value.reshape(shape + (1,) * (leaf.ndim - len(batch)))

    def evaluate(stored: PyTree, landscape: jax.Array) -> _Point:
        before = energy_space(normalize, config.normalize_steps, stored, landscape)
        return _Point(
            stored,
            before,
            *gradient_fn(params, context, before, landscape, None),
        )

    def downhill(start: PyTree, point: _Point, scale: ArrayLike = 1.0) -> PyTree:
        sizes = jnp.asarray(scale) * base
        after, _ = update(start, point.gradient, sizes, base, config, None, None, batch)
        return after

    def log_density(noisy: PyTree, mean: PyTree) -> jax.Array:
        """Of a proposal, but for a constant, `[*batch]`."""
        assert isinstance(method, Mala)
        total = jnp.zeros(batch, float_dtype(candidate))
        for x, m in zip(jax.tree.leaves(noisy), jax.tree.leaves(mean), strict=True):
            scaled = jnp.square(x - m) / expand(4 * base * method.temperature, x)
            total -= scaled.sum(axis=tuple(range(len(batch), x.ndim)))
        return total

    def lower(point: _Point, scale: jax.Array, landscape: jax.Array, index: jax.Array):
        assert isinstance(method, Lower)
        start = where(scale == 1, point.before, point.stored)
        proposed = evaluate(downhill(start, point, scale), landscape)
        accepted = proposed.energy < point.energy
        scale = jnp.where(accepted, scale, method.shrink * scale)
        return proposed, accepted, scale

    def mala(point: _Point, scale: jax.Array, landscape: jax.Array, index: jax.Array):
        assert isinstance(method, Mala) and key is not None
        mean = downhill(point.before, point)
        normals = normal_like(fold_in(fold_in(key, 2), index), mean, len(batch))
        std = jnp.sqrt(2 * base * method.temperature)
        stored = jax.tree.map(lambda m, n: m + expand(std, m) * n, mean, normals)
        proposed = evaluate(stored, landscape)
        back = log_density(point.stored, downhill(proposed.before, proposed))
        ratio = (point.energy - proposed.energy) / method.temperature
        ratio += back - log_density(stored, mean)
        chance = uniform(fold_in(fold_in(key, 3), index), batch, ratio.dtype)
        return proposed, jnp.log(chance) < ratio, scale

    propose = lower if isinstance(method, Lower) else mala

    def step(carry, inputs):
        point, scale = carry
        index, landscape, changed = inputs
        point = jax.lax.cond(
            changed,
            lambda point: evaluate(point.stored, landscape),
            lambda point: point,
            point,
        )
        proposed, accepted, scale = propose(point, scale, landscape, index)
        point = where(accepted, proposed, point)
        return (point, scale), (point.energy, accepted)

    shapes = jax.eval_shape(evaluate, candidate, jnp.int32(0))
    nowhere = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry = nowhere._replace(stored=candidate), jnp.ones(batch, base.dtype)
    inputs = jnp.arange(len(landscapes)), landscapes, anew
    (point, _), (energies, accepted) = jax.lax.scan(step, carry, inputs)
    steps, last = config.num_steps, config.num_landscapes - 1
    return Accepted(point.stored, energies, accepted, steps + min(steps, last + 1))
