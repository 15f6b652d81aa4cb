"""The replay buffer of System 2: a pytree, and pure functions of it.

The buffer keeps sequences together with the stored candidates z that refinement ended
at. A part of each batch is taken from it: refinement of those begins where it ended
before, so that the energy learns what more steps than were taken in training lead to.
As in the published code

* items are sampled uniformly and without replacement, as many as there are of those
  wanted, and refined and scored like all others;
* first in, first out: of a batch only what was fresh is kept, in place of what has been
  there longest, so that a candidate is refined at most twice.

Each item is one row of every array. There is no place where the buffer begins, so it
may be cut into shares along its first axis, and put together again: then each device
samples from and writes to the share that it holds, and nothing is sent.

A candidate over V entries can be kept in less than 4 V bytes, see `ReplayConfig`:
`bfloat16` rounds it to 8 bits of mantissa, as fine as 2^-8 of each entry; `top_k` keeps
its k largest entries, and of all others one number, the logarithm of the mean of their
exponentials. So softmax of what is restored gives each of those k, and all others
together, the probability they had; which of the others is likelier is lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Batch = dict[str, jax.Array]

NONE = -1  # in place of an item's row, where there is no item
EMPTY = jnp.iinfo(jnp.int32).max  # age of a row that holds no item


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """How much is kept, how, and how much of it is replayed."""

    capacity: int = 0  # sequences kept, over all devices; 0: no replay
    fraction: float = 0.5  # replayed sequences beside a batch's, for each of those
    dtype: str = "float32"  # float32 | bfloat16, of kept candidates
    top_k: int = 0  # entries kept of each candidate, the largest; 0: all

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise ValueError(
                f"capacity is {self.capacity}, but has to be positive, or 0 for no "
                "replay"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction is {self.fraction}, but has to be in (0, 1]; for no replay "
                "set capacity to 0"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"dtype is {self.dtype!r}, but has to be one of float32, bfloat16"
            )
        if self.top_k < 0:
            raise ValueError(
                f"top_k is {self.top_k}, but has to be positive, or 0 for all entries"
            )

    def count(self, rows: int) -> int:
        """Sequences replayed beside so many fresh ones."""
        return int(rows * self.fraction)


class Replay(NamedTuple):
    """What is kept; every array is `[capacity, ...]`.

    Attributes:
      batch: of the sequences, what a model needs of a batch.
      candidate: their final candidates, as `kept` makes them.
      age: int32 `[capacity]`, items that came later into the same share; `EMPTY` where
        there is none.
    """

    batch: Batch
    candidate: PyTree
    age: jax.Array


class TopK(NamedTuple):
    """The largest entries of candidates.

    Attributes:
      values: `[..., k]`.
      indices: int32 `[..., k]`.
      rest: `[...]`, log of the mean of exp of all other entries.
    """

    values: jax.Array
    indices: jax.Array
    rest: jax.Array


class Recall(NamedTuple):
    """Which predictions begin where others ended.

    Attributes:
      config: how candidates are kept.
      candidate: of a `Replay`.
      rows: int32 `[batch]`, of the buffer, by sequence; `NONE` for fresh ones.
    """

    config: ReplayConfig
    candidate: PyTree
    rows: jax.Array


def empty(config: ReplayConfig, batch: PyTree, candidate: PyTree) -> Replay:
    """A buffer that holds nothing.

    Args:
      config: its capacity and form.
      batch: shapes `[batch, ...]` of what is kept of sequences, any number of them.
      candidate: shapes of their candidates, leaves `[batch, ..., entries]`.
    """
    form = jax.eval_shape(lambda z: kept(z, config), candidate)
    rows = lambda s: jnp.zeros((config.capacity, *s.shape[1:]), s.dtype)
    age = jnp.full(config.capacity, EMPTY, jnp.int32)
    return Replay(jax.tree.map(rows, batch), jax.tree.map(rows, form), age)


def sample(replay: Replay, key: jax.Array, count: int) -> jax.Array:
    """Rows `[count]` of items, all different; `NONE` where there are not so many.

    Args:
      replay: to sample from.
      key: of the draw.
      count: at most the capacity.
    """
    order = jax.random.uniform(key, replay.age.shape)
    order = jnp.where(replay.age == EMPTY, 2.0, order)  # after all there are
    _, rows = jax.lax.top_k(-order, count)
    return jnp.where(replay.age[rows] == EMPTY, NONE, rows)


def sequences(replay: Replay, rows: jax.Array) -> Batch:
    """The sequences in rows `[count]`; those of `NONE` weigh nothing."""
    batch = jax.tree.map(lambda x: x[rows], replay.batch)
    weights = batch["weights"]
    there = (rows != NONE).reshape(-1, *(1 for _ in weights.shape[1:]))
    return {**batch, "weights": jnp.where(there, weights, 0)}


def recalled(recall: Recall, candidate: PyTree, *at: jax.Array) -> PyTree:
    """Candidates, those of fresh sequences as they are and the others from the buffer.

    Args:
      recall: see there.
      candidate: initial candidates, leaves `[*index, ...]`.
      *at: arrays of the same shape `[*index]`, rows of the buffer and, behind these,
        places in the sequences. None for whole sequences: leaves `[batch, ...]`.
    """
    index = at or (recall.rows,)
    found = jax.tree.map(lambda x: x[index], recall.candidate)
    found = restored(found, recall.config, candidate)
    fresh = index[0] == NONE

    def choose(z: jax.Array, old: jax.Array) -> jax.Array:
        shape = fresh.shape + (1,) * (z.ndim - fresh.ndim)
        return jnp.where(fresh.reshape(shape), z, old)

    return jax.tree.map(choose, candidate, found)


def push(replay: Replay, batch: Batch, candidate: PyTree) -> Replay:
    """Keeps items in place of as many that have been there longest.

    An item whose candidate is not finite empties its row: it would spoil the update
    that replays it.

    Args:
      replay: with a capacity of at least as many.
      batch: `[batch, ...]`, at least what is kept of it.
      candidate: of `kept`, leaves `[batch, ...]`.
    """
    count = len(batch["weights"])
    age = jnp.where(replay.age == EMPTY, EMPTY, replay.age + count)
    _, rows = jax.lax.top_k(age, count)
    finite = jnp.ones(count, bool)
    for leaf in jax.tree.leaves(candidate):
        finite &= jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
    new = jnp.where(finite, jnp.arange(count - 1, -1, -1), EMPTY)
    put = lambda old, items: old.at[rows].set(items, unique_indices=True)
    return Replay(
        {name: put(old, batch[name]) for name, old in replay.batch.items()},
        jax.tree.map(put, replay.candidate, candidate),
        put(age, new),
    )


def kept(candidate: PyTree, config: ReplayConfig) -> PyTree:
    """Candidates in the form they are kept in. See the module's docstring.

    Args:
      candidate: leaves `[..., entries]`.
      config: the form.

    Raises:
      ValueError: at trace time, if there are no more than `top_k` entries.
    """

    def keep(z: jax.Array) -> Any:
        if not config.top_k:
            return z.astype(config.dtype)
        others = z.shape[-1] - config.top_k
        if others < 1:
            raise ValueError(
                f"top_k is {config.top_k}, but candidates have {z.shape[-1]} entries; "
                "set it to 0 to keep all of them"
            )
        values, indices = jax.lax.top_k(z, config.top_k)
        left = jnp.put_along_axis(z, indices, -jnp.inf, axis=-1, inplace=False)
        rest = jax.nn.logsumexp(left, axis=-1) - jnp.log(others)
        return TopK(values.astype(config.dtype), indices, rest.astype(config.dtype))

    return jax.tree.map(keep, candidate)


def restored(candidate: PyTree, config: ReplayConfig, like: PyTree) -> PyTree:
    """The inverse of `kept`, but for what that leaves out.

    Args:
      candidate: of `kept`.
      config: the form.
      like: arrays of the shapes and dtypes to restore, leaves `[..., entries]`.
    """

    def restore(z: jax.Array, found: Any) -> jax.Array:
        if not config.top_k:
            return found.astype(z.dtype)
        rest = jnp.broadcast_to(found.rest[..., None], z.shape).astype(z.dtype)
        values = found.values.astype(z.dtype)
        return jnp.put_along_axis(rest, found.indices, values, axis=-1, inplace=False)

    return jax.tree.map(restore, like, candidate)
