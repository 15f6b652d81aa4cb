"""One training step: the gradient of an objective, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ebt_jax.interfaces import Batch, Metrics, Objective
from ebt_jax.refine import PyTree
from ebt_jax.training.optim import Schedule
from ebt_jax.training.sharding import batch_sharded, replicated


class TrainState(NamedTuple):
    """All that a run changes, but for its place in the data.

    Attributes:
      params: a plain nested dict of arrays.
      opt_state: of the optimiser.
      step: int32 scalar, updates made. With the seed it determines what is drawn next.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array


def init_state(
    objective: Objective, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first update."""
    params = objective.init(jax.random.fold_in(jax.random.key(seed), 0))
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation: int = 1,
    rates: dict[str, Schedule] | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled training step.

    Args:
      objective: what to minimise.
      optimizer: of `optim.make_optimizer`, or any other.
      seed: of the draws; each step's key follows from it and the step's number.
      accumulation: parts that a batch is split into, one after the other. Gradients and
        metrics are means weighted by each part's `tokens`, so that the split changes
        nothing but what is drawn.
      rates: schedules to report, name -> schedule; metrics `learning_rate/NAME`.
      mesh: of `sharding.make_mesh`; None leaves everything where it is.

    Returns:
      `(state, batch) -> (state, metrics)`. The state is donated: the one passed in is
      gone. The metrics are the objective's, and `gradient_norm` (before clipping),
      `parameter_norm` (after the update).
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        key = jax.random.fold_in(key, state.step)
        gradient, metrics = mean_gradient(
            objective, state.params, batch, key, accumulation
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            **metrics,
            "gradient_norm": optax.tree.norm(gradient),
            "parameter_norm": optax.tree.norm(params),
            **{
                f"learning_rate/{name}": rate(state.step)
                for name, rate in (rates or {}).items()
            },
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(everywhere, batch_sharded(mesh)),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )


def mean_gradient(
    objective: Objective, params: PyTree, batch: Batch, key: jax.Array, parts: int
) -> tuple[PyTree, Metrics]:
    """Gradient and metrics of a batch, taken in parts of equally many sequences.

    Returns:
      The mean gradient and the mean metrics over all tokens; `tokens` is their number.
    """
    differentiate = jax.value_and_grad(objective.loss, has_aux=True)
    if parts == 1:
        (_, metrics), gradient = differentiate(params, batch, key)
        return gradient, metrics

    def split(values: jax.Array) -> jax.Array:
        # Every parts-th sequence: each device splits the sequences it already holds.
        return values.reshape(-1, parts, *values.shape[1:]).swapaxes(0, 1)

    def add(total: PyTree, part: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
        (_, metrics), gradient = differentiate(params, *part)
        tokens = metrics.pop("tokens")
        weighted = jax.tree.map(lambda x: x * tokens, (gradient, metrics))
        return jax.tree.map(jnp.add, total, (*weighted, tokens)), None

    split_batch = jax.tree.map(split, batch)
    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda x: x[0], split_batch)
    (_, metrics), gradient = jax.eval_shape(differentiate, params, first, keys[0])
    tokens = metrics.pop("tokens")
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), (gradient, metrics, tokens)
    )
    (gradient, metrics, tokens), _ = jax.lax.scan(add, zeros, (split_batch, keys))
    count = jnp.maximum(tokens, 1.0)
    gradient, metrics = jax.tree.map(lambda x: x / count, (gradient, metrics))
    return gradient, {**metrics, "tokens": tokens}
