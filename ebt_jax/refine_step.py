"""The pieces of a refinement step, for every way of taking several."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ebt_jax.meta_gradient import EnergyFn, PyTree
from ebt_jax.refine_config import RefineConfig

UNIT_EPS = 1e-12  # added to the square of a norm that is divided by


class Perturbing(NamedTuple):
    """How noise enters an energy, where it is not added to the stored candidate.

    Attributes:
      like: `(candidate) ->` a tree with the noise's shapes, leaves `[*batch, ...]`.
      into: `(context, noise) ->` the context of a step, which holds its noise, already
        times its standard deviation. Without it a context holds none.
    """

    like: Callable[[PyTree], PyTree]
    into: Callable[[PyTree, PyTree], PyTree]


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


def update(
    before: PyTree,
    gradient: PyTree,
    sizes: jax.Array,
    base: jax.Array,
    config: RefineConfig,
    transform: optax.GradientTransformation | None,
    state: PyTree,
    batch: tuple[int, ...],
) -> tuple[PyTree, PyTree]:
    """One descent step from `before`: unit, clamp, transform, step, clip, sharpen."""

    def expand(size, leaf):
        shape = (1,) * (len(batch) - size.ndim) + size.shape
        return size.reshape(shape + (1,) * (leaf.ndim - len(batch)))

    if config.unit_gradient:
        axes = lambda g: tuple(range(len(batch), g.ndim))
        square = sum(
            jnp.sum(jnp.square(g), axis=axes(g)) for g in jax.tree.leaves(gradient)
        )
        # A norm of 0 has a derivative, too; gradients far below 1e-6 stay short.
        inverse = jax.lax.rsqrt(square + UNIT_EPS)
        gradient = jax.tree.map(lambda g: g * expand(inverse, g), gradient)
    if config.gradient_clamp:
        gradient = jax.tree.map(
            lambda g: jnp.clip(
                g,
                -config.gradient_clamp / expand(base, g),
                config.gradient_clamp / expand(base, g),
            ),
            gradient,
        )
    if transform is not None:
        gradient, state = transform.update(gradient, state, before)
    after = jax.tree.map(lambda c, g: c - expand(sizes, c) * g, before, gradient)
    if config.absolute_clamp:
        limit = config.absolute_clamp
        after = jax.tree.map(lambda z: jnp.clip(z, -limit, limit), after)
    if config.sharpen:
        after = jax.tree.map(lambda z: z / config.sharpen, after)
    return after, state


def energy_space(
    normalize: Callable[[PyTree], PyTree] | None,
    steps: str,
    stored: PyTree,
    landscape: jax.Array,
) -> PyTree:
    """The stored candidate as the energy sees it, by `config.normalize_steps`."""
    if normalize is None or steps == "none":
        return stored
    if steps == "all":
        return normalize(stored)
    return where(landscape == 0, normalize(stored), stored)


def check_energy(
    energy_fn: EnergyFn, params: PyTree, context: PyTree, candidate: PyTree
) -> tuple[int, ...]:
    """Checks candidate and energy before any numerics; returns the batch shape."""
    leaves = jax.tree.leaves(candidate)
    if not leaves:
        raise ValueError("candidate is an empty pytree; it needs at least one array")
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"candidate has dtype {jnp.result_type(leaf)}, but refinement needs "
                "gradients; pass floating-point arrays"
            )
    energy = jax.eval_shape(energy_fn, params, context, candidate, jnp.int32(0))
    if not isinstance(energy, jax.ShapeDtypeStruct):
        raise TypeError(
            f"energy_fn returned {type(energy).__name__}, expected an array of energies"
        )
    if not jnp.issubdtype(energy.dtype, jnp.floating):
        raise TypeError(f"energy_fn returned dtype {energy.dtype}, expected a float")
    for leaf in leaves:
        shape = jnp.shape(leaf)
        if shape[: energy.ndim] != energy.shape:
            raise ValueError(
                f"energy_fn returned shape {energy.shape}, expected a leading part of "
                f"the candidate's shape {shape}, e.g. {shape[:-1]}"
            )
    return energy.shape


def where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Leaf-wise `jnp.where`, the condition broadcast from the leading axes."""

    def choose(a, b):
        extra = (1,) * (jnp.ndim(a) - jnp.ndim(condition))
        return jnp.where(jnp.reshape(condition, condition.shape + extra), a, b)

    return jax.tree.map(choose, new, old)


def float_dtype(tree: PyTree) -> jnp.dtype:
    """The dtype that all leaves fit in."""
    return jnp.result_type(*jax.tree.leaves(tree))
