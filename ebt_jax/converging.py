"""Refinement that ends when an energy stops falling, for each prediction on its own.

A step costs what it is computed for, so rows of a batch that have stopped can be taken
out of the work: once half of them have, the others are gathered into arrays of half the
size, then into an eighth, and so on. Each size is compiled, which is why they are few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ebt_jax.meta_gradient import EnergyFn, PyTree, accumulator, energy_and_gradient
from ebt_jax.randomness import fold_in, normal_like, typed
from ebt_jax.refine_config import RefineConfig, require
from ebt_jax.refine_step import (
    Perturbing,
    check_energy,
    energy_space,
    float_dtype,
    perturbed,
    update,
    where,
)


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


class _Going(NamedTuple):
    """Predictions between two steps, leaves `[*batch, ...]`."""

    stored: PyTree
    state: PyTree  # of the transform
    energy: jax.Array
    count: jax.Array
    running: jax.Array


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
    rows: Callable[[PyTree, jax.Array], PyTree] | None = None,
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
      rows: `(context, index) ->` the context of some rows `[some]` of the batch's first
        axis. With it rows all of whose predictions have stopped leave the work; it
        changes nothing else. Not for `vmap`, which would compute every size.

    Returns:
      See `Converged`.

    Raises:
      ValueError, TypeError: as `refine` does, and for `max_steps` < 1, `tolerance` < 0,
        or `rows` without a key for each prediction where there is noise.
    """
    require(max_steps >= 1, "max_steps", max_steps, "at least 1")
    require(tolerance >= 0, "tolerance", tolerance, "zero or positive")
    batch = check_energy(energy_fn, params, context, candidate)
    noisy = noise_std is not None or config.noise_std > 0
    if noisy and key is None:
        raise ValueError("refine_until has to draw noise but got key=None; pass a key")
    if not noisy:
        key = None
    key = None if key is None else fold_in(typed(key), 2)  # draws what `refine` does
    if rows is not None and key is not None and key.shape != batch:
        raise ValueError(
            f"refine_until has to draw noise for some rows but got a key of shape "
            f"{key.shape}; pass one key for each prediction, {batch}"
        )
    scale = config.noise_std if noise_std is None else noise_std
    candidate = jax.tree.map(jnp.asarray, candidate)
    sizes = jnp.asarray(step_size, float_dtype(candidate))
    gradient_fn = energy_and_gradient(energy_fn, "autodiff")
    last = config.num_landscapes - 1

    def step(
        index: jax.Array,
        landscape: jax.Array,
        going: _Going,
        context: PyTree,
        key: jax.Array | None,
        sizes: jax.Array,
    ) -> _Going:
        """A step of all predictions in `going` that are running."""
        start, around = going.stored, context
        shape = going.running.shape
        if key is not None:
            like = start if perturbing is None else perturbing.like(start)
            normals = normal_like(fold_in(key, index), like, len(shape))
            start, around = perturbed(perturbing, start, context, scale, normals)
        before = energy_space(normalize, config.normalize_steps, start, landscape)
        energy, gradient = gradient_fn(params, around, before, landscape, None)
        falling = (energy < going.energy - tolerance) & jnp.isfinite(energy)
        running = going.running & (falling | ((index <= last) & jnp.isfinite(energy)))
        after, state = update(
            before, gradient, sizes, sizes, config, transform, going.state, shape
        )
        return _Going(
            where(running, after, going.stored),
            where(running.any(), state, going.state),
            jnp.where(running, energy, going.energy),
            going.count + running,
            running,
        )

    shape = jax.eval_shape(energy_fn, params, context, candidate, jnp.int32(0))
    going = _Going(
        candidate,
        None if transform is None else transform.init(candidate),
        jnp.full(batch, jnp.inf, accumulator(shape.dtype)),
        jnp.zeros(batch, jnp.int32),
        jnp.ones(batch, bool),
    )
    height = batch[0] if batch else 1
    narrowing = rows is not None and height > 1

    def goes_on(carry: tuple[jax.Array, _Going]) -> jax.Array:
        index, going = carry
        some = going.running.any()
        if narrowing:  # in the last landscape; before it nothing stops
            some &= (_rows_running(going) > height // 2) | (index <= last)
        return (index < max_steps) & some

    def body(carry: tuple[jax.Array, _Going]) -> tuple[jax.Array, _Going]:
        index, going = carry
        landscape = jnp.minimum(index, last)
        return index + 1, step(index, landscape, going, context, key, sizes)

    def of_few(width: int, carry: tuple[jax.Array, _Going]) -> tuple[jax.Array, _Going]:
        """Steps of so many rows, all that run, until the next size holds those."""
        assert rows is not None
        going = carry[1]
        stopped = ~going.running.reshape(height, -1).any(axis=1)
        chosen = jnp.argsort(stopped, stable=True)[:width]
        few = jax.tree.map(lambda x, by: x[chosen] if by else x, going, by_row)
        around = rows(context, chosen)
        own = None if key is None else key[chosen]
        size = jnp.broadcast_to(sizes, batch)[chosen] if sizes.ndim else sizes

        def body(carry: tuple[jax.Array, _Going]) -> tuple[jax.Array, _Going]:
            index, few = carry
            return index + 1, step(index, jnp.int32(last), few, around, own, size)

        index, few = jax.lax.while_loop(more_than(width // 4), body, (carry[0], few))
        back = lambda x, new, by: x.at[chosen].set(new) if by else new
        return index, jax.tree.map(back, going, few, by_row)

    def more_than(fewest: int) -> Callable[[tuple[jax.Array, _Going]], jax.Array]:
        return lambda carry: (carry[0] < max_steps) & (_rows_running(carry[1]) > fewest)

    carry = jax.lax.while_loop(goes_on, body, (jnp.int32(0), going))
    if narrowing:
        by_row = _by_row(going, transform)
        width = height // 2
        while width:
            narrow = functools.partial(of_few, width)
            carry = jax.lax.cond(more_than(width // 4)(carry), narrow, _as_is, carry)
            width //= 4
    going = carry[1]
    return Converged(going.stored, going.energy, going.count, ~going.running)


def _rows_running(going: _Going) -> jax.Array:
    """How many rows have a prediction that is running."""
    return going.running.reshape(len(going.running), -1).any(axis=1).sum()


def _by_row(going: _Going, transform: optax.GradientTransformation | None) -> _Going:
    """For each leaf whether it has a row for each row of the batch."""
    everything = jax.tree.map(lambda _: True, going)
    if transform is None:
        return everything
    init = transform.init

    def state(more: int) -> PyTree:
        of = lambda x: jax.ShapeDtypeStruct((x.shape[0] + more, *x.shape[1:]), x.dtype)
        return jax.eval_shape(init, jax.tree.map(of, going.stored))

    grows = jax.tree.map(lambda a, b: a.shape != b.shape, state(0), state(1))
    return everything._replace(state=grows)


def _as_is(carry: PyTree) -> PyTree:
    return carry
