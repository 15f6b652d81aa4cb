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

from ebt_jax.converging import Converged, refine_until
from ebt_jax.meta_gradient import EnergyFn, PyTree, energy_and_gradient
from ebt_jax.randomness import fold_in, normal_like, typed, uniform
from ebt_jax.refine_config import RefineConfig, Schedule, make_schedule
from ebt_jax.refine_step import (
    Perturbing,
    check_energy,
    energy_space,
    float_dtype,
    perturbed,
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
