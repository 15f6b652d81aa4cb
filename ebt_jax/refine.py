"""Refinement: predict by gradient descent on a candidate, inside one `lax.scan`.

An energy-based model scores a candidate prediction in a context and predicts by
lowering that score (Gladstone et al. 2025, arXiv 2507.02092, algorithm 1). With
stored candidate z, energy-space candidate c, standard normals eps and step size a,

    c_i     = normalize(z_i + noise_std * eps_i)
    g_i     = d sum(E(params, context, c_i, landscape_i)) / d c_i
    z_{i+1} = c_i - a * g_i

The gradient is taken at c, after normalisation, and the update starts from c. This
is what the published code computes; its text says "with respect to the logits".

Training differentiates through these steps. `RefineConfig.backprop` says how far:

=========== ===================================== ==============================
backprop    constants of the meta-gradient        what is left to differentiate
=========== ===================================== ==============================
per_step    z_i, before every step                each step alone: its inner
                                                  gradient, step size and noise
truncated   g_i of all steps but the last         the last inner gradient, and
                                                  z, step sizes and noise of all
full        nothing                               everything
=========== ===================================== ==============================

Each differentiates an inner gradient: `meta_gradient.py` says how, and what
`meta_gradient="rule"` and `"autodiff"` choose between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ebt_jax.meta_gradient import EnergyFn, PyTree, accumulator, energy_and_gradient
from ebt_jax.randomness import fold_in, normal_like, typed, uniform
from ebt_jax.refine_config import RefineConfig, Schedule, make_schedule, require
from ebt_jax.refine_step import (
    check_energy,
    energy_space,
    float_dtype,
    update,
    where,
)

__all__ = [
    "Converged",
    "EnergyFn",
    "Perturbing",
    "PyTree",
    "RefineConfig",
    "Refined",
    "Schedule",
    "Step",
    "energy_and_norm",
    "make_schedule",
    "refine",
    "refine_until",
]


class Step(NamedTuple):
    """One refinement step, as shown to `observe`.

    Attributes:
      index: int32 scalar, 0 for the first step.
      landscape: int32 scalar.
      is_last: bool scalar, whether no step follows.
      before: the normalised candidate c_i, at which energy and gradient are taken.
      after: the stored candidate z_{i+1}.
      energy: `[*batch]`, E at `before`.
      gradient: dE/dc at `before`, as the energy gives it (not clamped).
    """

    index: jax.Array
    landscape: jax.Array
    is_last: jax.Array
    before: PyTree
    after: PyTree
    energy: jax.Array
    gradient: PyTree


class Refined(NamedTuple):
    """What `refine` returns.

    Attributes:
      candidate: the stored candidate after the last step, not normalised.
      trajectory: what `observe` returned, stacked over steps `[num_steps, ...]`; zeros
        for steps that were not taken.
    """

    candidate: PyTree
    trajectory: PyTree


class Converged(NamedTuple):
    """What `refine_until` returns.

    Attributes:
      candidate: the stored candidate of each prediction when it stopped.
      energy: `[*batch]`, the last energy each prediction was evaluated at.
      num_steps: int32 `[*batch]`, updates each prediction took.
      converged: bool `[*batch]`, False where `max_steps` ended it.
    """

    candidate: PyTree
    energy: jax.Array
    num_steps: jax.Array
    converged: jax.Array


class Perturbing(NamedTuple):
    """How noise enters an energy, where it is not added to the stored candidate.

    Attributes:
      like: `(candidate) ->` a tree with the noise's shapes, leaves `[*batch, ...]`.
      into: `(context, noise) ->` the context of a step, which holds its noise, already
        times its standard deviation. Without it a context holds none.
    """

    like: Callable[[PyTree], PyTree]
    into: Callable[[PyTree, PyTree], PyTree]


def energy_and_norm(step: Step) -> dict[str, jax.Array]:
    """The default observation: constants `energy` and `gradient_norm`, `[*batch]`."""
    squares = [
        jnp.sum(jnp.square(g), axis=tuple(range(step.energy.ndim, g.ndim)))
        for g in jax.tree.leaves(step.gradient)
    ]
    norm = jnp.sqrt(sum(squares[1:], squares[0]))
    return jax.lax.stop_gradient({"energy": step.energy, "gradient_norm": norm})


def refine(
    energy_fn: EnergyFn,
    params: PyTree,
    context: PyTree,
    candidate: PyTree,
    *,
    step_size: ArrayLike,
    config: RefineConfig,
    key: jax.Array | None = None,
    noise: PyTree | None = None,
    normalize: Callable[[PyTree], PyTree] | None = None,
    transform: optax.GradientTransformation | None = None,
    observe: Callable[[Step], PyTree] | None = None,
    noise_std: ArrayLike | None = None,
    jitter: jax.Array | None = None,
    schedule: Schedule | None = None,
    perturbing: Perturbing | None = None,
) -> Refined:
    """Refines a candidate by gradient descent on its energy.

    Args:
      energy_fn: see `EnergyFn`.
      params: passed to `energy_fn`; differentiable.
      context: passed to `energy_fn`; differentiable.
      candidate: the initial candidate, any pytree of float leaves `[*batch, ...]`.
      step_size: positive scalar, or an array broadcastable to the energies; a learnt
        parameter, hence differentiable.
      config: see `RefineConfig`.
      key: PRNG key for whatever is drawn: noise, step-size jitter, number of steps.
        A scalar key, or keys `[*batch]`, one for each prediction: then no draw depends
        on how predictions are batched, and the number of steps is not drawn.
      noise: standard normals in place of drawn ones, leaves `[num_steps, *batch, ...]`.
      normalize: maps a stored candidate to energy space, e.g. softmax; default
        identity.
      transform: an Optax transformation of the inner gradient. It maps gradients to
        the direction that is subtracted: compose `scale_by_*` pieces, which keep the
        sign, not whole optimisers such as `optax.adam`, which flip it.
      observe: what to record of each step; called inside the scan. A loss computed
        here is differentiable and costs no stacked candidates.
      noise_std: learnt standard deviation, in place of `config.noise_std`.
      jitter: standard uniforms `[*batch]` in place of drawn ones.
      schedule: in place of the one that `config` and `key` give.
      perturbing: where noise goes instead of to the candidate.

    Returns:
      See `Refined`.

    Raises:
      ValueError, TypeError: at trace time, if the energy's shape is not a leading part
        of the candidate's, a dtype is not floating, or something has to be drawn and
        there is no key.
    """
    batch = check_energy(energy_fn, params, context, candidate)
    observe = energy_and_norm if observe is None else observe
    noisy = noise_std is not None or config.noise_std > 0
    jittered = jitter is not None or config.step_size_jitter > 1
    if key is None and (noisy and noise is None or jittered and jitter is None):
        what = "noise" if noisy and noise is None else "a step-size jitter"
        raise ValueError(f"refine has to draw {what} but got key=None; pass a PRNG key")
    keys: list[Any] = [None] * 3
    if key is not None:
        keys = [fold_in(typed(key), i) for i in range(3)]
    if schedule is None:
        shared = key is not None and not keys[0].ndim
        schedule = make_schedule(config, keys[0] if shared else None)
    scale = config.noise_std if noise_std is None else noise_std
    base = jnp.asarray(step_size, float_dtype(candidate))
    sizes = base
    if jittered:
        if jitter is None:
            jitter = uniform(keys[1], batch, base.dtype)
        low, high = base / config.step_size_jitter, base * config.step_size_jitter
        sizes = low + jitter * (high - low)

    gradient_fn = energy_and_gradient(energy_fn, config.meta_gradient)
    num_steps = schedule.landscape.shape[0]
    # Steps that are not taken come first, so that the last one is always the same.
    skipped = num_steps - schedule.length
    all_taken = isinstance(skipped, int) and skipped == 0

    def step(carry, slot, constant_gradient):
        stored, transform_state = carry
        index = slot - skipped
        taken = None if all_taken else index >= 0
        landscape = schedule.landscape[index]
        start = stored
        if config.backprop == "per_step":
            start, transform_state = jax.lax.stop_gradient((stored, transform_state))
        around = context
        if noisy:
            like = start if perturbing is None else perturbing.like(start)
            normals = (
                normal_like(fold_in(keys[2], index), like, len(batch))
                if noise is None
                else jax.tree.map(lambda n: n[index], noise)
            )
            start, around = perturbed(perturbing, start, context, scale, normals)
        before = energy_space(normalize, config.normalize_steps, start, landscape)
        energy, gradient = gradient_fn(params, around, before, landscape, taken)
        if constant_gradient:
            gradient = jax.lax.stop_gradient(gradient)
        after, state = update(
            before, gradient, sizes, base, config, transform, transform_state, batch
        )
        is_last = slot == num_steps - 1
        seen = observe(Step(index, landscape, is_last, before, after, energy, gradient))
        if taken is not None:
            after, state = where(taken, (after, state), (stored, transform_state))
            seen = where(taken, seen, jax.tree.map(jnp.zeros_like, seen))
        return (after, state), seen

    carry = (
        jax.tree.map(jnp.asarray, candidate),
        None if transform is None else transform.init(candidate),
    )
    slots = jnp.arange(num_steps)
    if config.backprop == "truncated":
        carry, early = jax.lax.scan(
            lambda carry, slot: step(carry, slot, True), carry, slots[:-1]
        )
        carry, last = step(carry, slots[-1], False)
        trajectory = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b[None]]), early, last
        )
    else:
        carry, trajectory = jax.lax.scan(
            lambda carry, slot: step(carry, slot, False), carry, slots
        )
    if not all_taken:
        trajectory = jax.tree.map(lambda t: jnp.roll(t, -skipped, axis=0), trajectory)
    return Refined(carry[0], trajectory)


def perturbed(
    perturbing: Perturbing | None,
    candidate: PyTree,
    context: PyTree,
    scale: ArrayLike,
    normals: PyTree,
) -> tuple[PyTree, PyTree]:
    """Candidate and context of a step, with its noise in one of them."""
    if perturbing is None:
        return jax.tree.map(lambda z, n: z + scale * n, candidate, normals), context
    return candidate, perturbing.into(
        context, jax.tree.map(lambda n: scale * n, normals)
    )


def refine_until(
    energy_fn: EnergyFn,
    params: PyTree,
    context: PyTree,
    candidate: PyTree,
    *,
    step_size: ArrayLike,
    config: RefineConfig,
    max_steps: int,
    tolerance: float = 0.0,
    key: jax.Array | None = None,
    normalize: Callable[[PyTree], PyTree] | None = None,
    transform: optax.GradientTransformation | None = None,
    noise_std: ArrayLike | None = None,
    perturbing: Perturbing | None = None,
) -> Converged:
    """Refines each prediction until its energy stops falling. Forward only.

    A prediction stops when E(c_i) >= E(c_{i-1}) - tolerance, or is not finite, and
    keeps the stored candidate z_i that gave c_i. Energies of different landscapes are
    not comparable, so the test starts with the second step in the last landscape.

    Args:
      energy_fn: see `EnergyFn`.
      params: passed to `energy_fn`.
      context: passed to `energy_fn`.
      candidate: the initial candidate, leaves `[*batch, ...]`.
      step_size: positive scalar, or an array broadcastable to the energies.
      config: clamps, noise and landscapes; `num_steps`, `min_steps`, `backprop` and
        `step_size_jitter` have no part in it.
      max_steps: the most updates of a prediction.
      tolerance: by how much an energy has to fall, in units of the energy.
      key: PRNG key, scalar or `[*batch]`, where there is noise: that of `refine`.
      normalize: as in `refine`.
      transform: as in `refine`.
      noise_std: as in `refine`.
      perturbing: as in `refine`.

    Returns:
      See `Converged`.

    Raises:
      ValueError, TypeError: as `refine` does, and for `max_steps` < 1 or
        `tolerance` < 0.
    """
    require(max_steps >= 1, "max_steps", max_steps, "at least 1")
    require(tolerance >= 0, "tolerance", tolerance, "zero or positive")
    batch = check_energy(energy_fn, params, context, candidate)
    noisy = noise_std is not None or config.noise_std > 0
    if noisy and key is None:
        raise ValueError("refine_until has to draw noise but got key=None; pass a key")
    key = None if key is None else fold_in(typed(key), 2)  # draws what `refine` does
    scale = config.noise_std if noise_std is None else noise_std
    candidate = jax.tree.map(jnp.asarray, candidate)
    base = jnp.asarray(step_size, float_dtype(candidate))
    gradient_fn = energy_and_gradient(energy_fn, "autodiff")
    last = config.num_landscapes - 1

    def unfinished(carry):
        index, _, _, _, _, running = carry
        return (index < max_steps) & running.any()

    def step(carry):
        index, stored, state, previous, count, running = carry
        landscape = jnp.minimum(index, last)
        start, around = stored, context
        if key is not None and noisy:
            like = start if perturbing is None else perturbing.like(start)
            normals = normal_like(fold_in(key, index), like, len(batch))
            start, around = perturbed(perturbing, start, context, scale, normals)
        before = energy_space(normalize, config.normalize_steps, start, landscape)
        energy, gradient = gradient_fn(params, around, before, landscape, None)
        falling = (energy < previous - tolerance) & jnp.isfinite(energy)
        running &= falling | ((index <= last) & jnp.isfinite(energy))
        after, new_state = update(
            before, gradient, base, base, config, transform, state, batch
        )
        stored = where(running, after, stored)
        state = where(running.any(), new_state, state)
        previous = jnp.where(running, energy, previous)
        return index + 1, stored, state, previous, count + running, running

    shape = jax.eval_shape(energy_fn, params, context, candidate, jnp.int32(0))
    carry = (
        jnp.int32(0),
        candidate,
        None if transform is None else transform.init(candidate),
        jnp.full(batch, jnp.inf, accumulator(shape.dtype)),
        jnp.zeros(batch, jnp.int32),
        jnp.ones(batch, bool),
    )
    _, stored, _, energy, count, running = jax.lax.while_loop(unfinished, step, carry)
    return Converged(stored, energy, count, ~running)
