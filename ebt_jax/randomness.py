"""Draws that can belong to a prediction instead of a batch.

A scalar key draws for a whole array. An array of keys, one for each prediction, draws
the same numbers for a prediction however predictions are batched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

CPU_GROUP = 2**20  # numbers drawn at a time on a CPU: they stay in its caches


def prediction_keys(
    key: jax.Array, sequence: jax.Array, position: jax.Array | None
) -> jax.Array:
    """Keys that depend on (seed, sequence, position) and not on the batch's layout.

    Args:
      key: scalar key, the seed.
      sequence: integers `[batch]` naming each sequence.
      position: integers `[seq]` or `[batch, seq]`, places in a sequence; None where
        each sequence is one prediction.

    Returns:
      Keys `[batch, seq]`, or `[batch]` without positions.
    """
    fold_each = jax.vmap(jax.random.fold_in)
    rows = fold_each(jnp.broadcast_to(key, sequence.shape), sequence)
    if position is None:
        return rows
    position = jnp.broadcast_to(position, (*sequence.shape, position.shape[-1]))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(rows, position)


def typed(key: jax.Array) -> jax.Array:
    """A typed key, also from the raw `uint32` keys of `jax.random.PRNGKey`."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def fold_in(key: jax.Array, data: int | jax.Array) -> jax.Array:
    """Folds `data` into a key, or into each of an array of keys."""
    return _over(key, lambda k: jax.random.fold_in(k, data))


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard normals of a shape; keys `[*batch]` are a leading part of it."""
    draw = lambda k: jax.random.normal(k, shape[key.ndim :], dtype)
    return _over(key, draw)


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard uniforms of a shape; keys `[*batch]` are a leading part of it."""
    draw = lambda k: jax.random.uniform(k, shape[key.ndim :], dtype)
    return _over(key, draw)


def any_below(key: jax.Array, bound: int) -> jax.Array:
    """One of the integers `0 .. bound - 1` for each key, any as likely."""
    return _over(key, lambda k: jax.random.randint(k, (), 0, bound))


def normal_like(key: jax.Array, tree: PyTree, batch_ndim: int) -> PyTree:
    """Standard normals for each leaf of a tree.

    Args:
      key: a scalar key, or keys `[*batch]`.
      tree: leaves `[*batch, ...]`.
      batch_ndim: number of batch axes.

    Raises:
      ValueError: if `key` has another shape.
    """
    leaves, treedef = jax.tree.flatten(tree)
    batch = leaves[0].shape[:batch_ndim]
    if key.shape not in ((), batch):
        raise ValueError(
            f"key has shape {key.shape}, expected a scalar or one key for each "
            f"prediction, {batch}"
        )
    drawn = [normal(fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(drawn)


def over_predictions(
    function: Callable[..., jax.Array], *arrays: jax.Array
) -> jax.Array:
    """Maps a function of one prediction, which draws, over predictions.

    The same as `jax.vmap(function)(*arrays)`, but on a CPU a few predictions at a time.

    Args:
      function: of one element of each array; returns `[vocab]`.
      arrays: `[predictions, ...]`.
    """
    one = jax.eval_shape(function, *(a[0] for a in arrays))
    group = max(1, CPU_GROUP // one.size)
    if jax.default_backend() != "cpu" or len(arrays[0]) <= group:
        return jax.vmap(function)(*arrays)
    return jax.lax.map(lambda each: function(*each), arrays, batch_size=group)


def _over(keys: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys)
