"""One training step: the gradient of an objective, and what becomes of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ebt_jax.interfaces import Batch, Metrics, Objective
from ebt_jax.refine import PyTree
from ebt_jax.training import guard
from ebt_jax.training.optim import Schedule
from ebt_jax.training.sharding import (
    BATCH_AXES,
    parameter_specs,
    replicated,
    state_shardings,
    without_batch_axes,
)


class TrainState(NamedTuple):
    """All that a run changes, but for its place in the data.

    Attributes:
      params: a plain nested dict of arrays.
      opt_state: of the optimiser.
      step: int32 scalar, updates made or left out. With the seed it determines what is
        drawn next.
      guard: what is known of the updates so far.
      replay: what is kept of earlier batches, `[capacity, ...]`; empty where the
        objective replays nothing.
    """

    params: PyTree
    opt_state: PyTree
    step: jax.Array
    guard: guard.Guard
    replay: PyTree = ()


def saved_form(state: TrainState) -> dict[str, PyTree]:
    """A state as checkpoints hold it: its fields by name, but for an empty buffer.

    So checkpoints from before there was one, and of runs without it, are the same.
    """
    fields = state._asdict()
    if not jax.tree.leaves(state.replay):
        del fields["replay"]
    return fields


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled training step and the key of a run: `(state, batch) -> ...`.

    The key is an argument of what is compiled and no constant in it, so that runs that
    differ in their seed alone share one program, in a process and in JAX's cache.

    Attributes:
      compiled: `(state, batch, key) -> (state, metrics)`, of `jax.jit`; donates the
        state.
      key: of the run.
    """

    compiled: Any
    key: jax.Array

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """See `make_step`."""
        return self.compiled(state, batch, self.key)

    def trace(self, state: PyTree, batch: PyTree) -> Any:
        """What `jax.jit` traces for states and batches, or shapes of them."""
        return self.compiled.trace(state, batch, self.key)

    def lower(self, state: PyTree, batch: PyTree) -> Any:
        """What `jax.jit` lowers for states and batches, or shapes of them."""
        return self.compiled.lower(state, batch, self.key)


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array,
) -> TrainState:
    """The state before the first update.

    Args:
      objective: what is going to be minimised.
      optimizer: of `optim.make_optimizer`, or any other.
      seed: of the run, or `jax.random.key` of it: an argument of what is compiled, so
        that a program is made once for all seeds.
    """
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    params = objective.init(jax.random.fold_in(key, 0))
    replay = objective.replaying.empty() if objective.replaying else ()
    return TrainState(
        params, optimizer.init(params), jnp.int32(0), guard.new_guard(), replay
    )


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation: int = 1,
    rates: dict[str, Schedule] | None = None,
    mesh: Mesh | None = None,
    spike_factor: float = 0.0,
) -> TrainStep:
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
      spike_factor: see `guard`.

    Returns:
      `(state, batch) -> (state, metrics)`. The state is donated: the one passed in is
      gone. The metrics are the objective's, and `gradient_norm` (before clipping),
      `parameter_norm` (after the update) and those of `guard.numbers`.
    """

    def step(
        state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
        gradient, metrics, replay = gradient_of(
            state.params, batch, key, replay=state.replay
        )
        norm = optax.tree.norm(gradient)
        good, after = guard.judge(state.guard, metrics["loss"], norm, spike_factor)

        def update() -> tuple[PyTree, PyTree]:
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params
            )
            return optax.apply_updates(state.params, updates), opt_state

        # Choosing between new and old arrays would keep both; a branch works in place.
        params, opt_state = jax.lax.cond(
            good, update, lambda: (state.params, state.opt_state)
        )
        metrics = {
            **metrics,
            "gradient_norm": norm,
            "parameter_norm": optax.tree.norm(params),
            **guard.numbers(after),
            # The optimiser counts the updates that were made.
            **{
                f"learning_rate/{name}": rate(state.guard.made)
                for name, rate in (rates or {}).items()
            },
        }
        made = state.step + 1
        return TrainState(params, opt_state, made, after, replay), metrics

    key = jax.random.key(seed)
    if mesh is None:
        gradient_of = functools.partial(mean_gradient, objective, parts=accumulation)
        return TrainStep(jax.jit(step, donate_argnums=0), key)
    gradient_of = functools.partial(
        global_mean_gradient, objective, mesh=mesh, parts=accumulation
    )
    state = jax.eval_shape(lambda key: init_state(objective, optimizer, key), key)
    placed = (state_shardings(state, mesh), replicated(mesh))
    return TrainStep(jax.jit(step, out_shardings=placed, donate_argnums=0), key)


def global_mean_gradient(
    objective: Objective,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    mesh: Mesh,
    parts: int,
    replay: PyTree = (),
) -> tuple[PyTree, Metrics, PyTree]:
    """`mean_gradient` over the devices of a mesh, and equal to that of one device.

    Without `seq` and `model` each device works alone on the sequences it holds.
    Parameters are gathered once before that, and gradients are summed once after it, to
    where their part of a parameter lives: the traffic of a step grows neither with
    refinement steps nor with accumulation. With them, the compiler splits the work.

    With a replay buffer it is not that of one device: each keeps and replays what it
    refined itself, in its share of the buffer.

    Args:
      objective: what to differentiate.
      params: split as `parameter_specs` says.
      batch: `[batch, ...]`, split over the batch's axes.
      key: of the draws.
      mesh: of `sharding.make_mesh`.
      parts: accumulation.
      replay: split over the batch's axes.
    """
    specs = parameter_specs(params, mesh)
    batch = {**batch, "row": jnp.arange(len(batch["weights"]))}
    if mesh.shape["seq"] * mesh.shape["model"] > 1:
        constrain = lambda x, spec: _constrain(x, spec, mesh)
        whole = jax.tree.map(constrain, params, specs)
        gradient, metrics, replay = mean_gradient(
            objective, whole, batch, key, parts, replay
        )
        return jax.tree.map(constrain, gradient, specs), metrics, replay

    def local(params: PyTree, batch: Batch, key: jax.Array, replay: PyTree) -> Any:
        whole = jax.tree.map(_gather, params, specs)
        gradient, metrics, replay = mean_gradient(
            objective, whole, batch, key, parts, replay
        )
        tokens = metrics.pop("tokens")
        total = jax.lax.psum(tokens, BATCH_AXES)
        share = tokens / jnp.maximum(total, 1.0)
        gradient = jax.tree.map(lambda g, s: _scatter(g * share, s), gradient, specs)
        metrics = {name: share * value for name, value in metrics.items()}
        metrics = {**jax.lax.psum(metrics, BATCH_AXES), "tokens": total}
        return gradient, metrics, replay

    of_batch = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, of_batch, PartitionSpec(), of_batch),
        out_specs=(specs, PartitionSpec(), of_batch),
        check_vma=False,
    )(params, batch, key, replay)


def _constrain(x: jax.Array, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """A parameter or gradient, whole along the batch's axes, for the compiler."""
    sharding = NamedSharding(mesh, without_batch_axes(spec))
    return jax.lax.with_sharding_constraint(x, sharding)


def _gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A parameter, whole along the batch's axes."""
    for dimension, axis in enumerate(spec):
        if axis is not None:
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x


def _scatter(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The sum over devices of a gradient, split as the parameter is."""
    for dimension, axis in enumerate(spec):
        if axis is not None:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(axis for axis in BATCH_AXES if axis not in spec))


def mean_gradient(
    objective: Objective,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    parts: int,
    replay: PyTree = (),
) -> tuple[PyTree, Metrics, PyTree]:
    """Gradient and metrics of a batch, taken in parts of equally many sequences.

    Args:
      objective: what to differentiate.
      params: its parameters.
      batch: `[batch, ...]`; with `row` `[batch]` where this is a part of a larger one.
      key: of the draws.
      parts: accumulation. A part may replay what an earlier one led to.
      replay: the objective's buffer; empty where it has none.

    Returns:
      The mean gradient and the mean metrics over all tokens, of which `tokens` is the
      number, and the new buffer.
    """
    differentiate = functools.partial(_gradient, objective)
    if parts == 1:
        return differentiate(params, batch, key, replay)

    def split(values: jax.Array) -> jax.Array:
        # Every parts-th sequence: each device splits the sequences it already holds.
        return values.reshape(-1, parts, *values.shape[1:]).swapaxes(0, 1)

    def add(carry: PyTree, part: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
        total, replay = carry
        gradient, metrics, replay = differentiate(params, *part, replay)
        tokens = metrics.pop("tokens")
        weighted = jax.tree.map(lambda x: x * tokens, (gradient, metrics))
        return (jax.tree.map(jnp.add, total, (*weighted, tokens)), replay), None

    rows = batch["row"] if "row" in batch else jnp.arange(len(batch["weights"]))
    split_batch = jax.tree.map(split, {**batch, "row": rows // parts})
    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda x: x[0], split_batch)
    gradient, metrics, _ = jax.eval_shape(differentiate, params, first, keys[0], replay)
    tokens = metrics.pop("tokens")
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), (gradient, metrics, tokens)
    )
    (sums, replay), _ = jax.lax.scan(add, (zeros, replay), (split_batch, keys))
    gradient, metrics, tokens = sums
    count = jnp.maximum(tokens, 1.0)
    gradient, metrics = jax.tree.map(lambda x: x / count, (gradient, metrics))
    return gradient, {**metrics, "tokens": tokens}, replay


def _gradient(
    objective: Objective, params: PyTree, batch: Batch, key: jax.Array, replay: PyTree
) -> tuple[PyTree, Metrics, PyTree]:
    """Gradient and metrics of a whole batch, and the new buffer where there is one."""
    if objective.replaying is None:
        differentiate = jax.value_and_grad(objective.loss, has_aux=True)
        (_, metrics), gradient = differentiate(params, batch, key)
        return gradient, metrics, replay
    differentiate = jax.value_and_grad(objective.replaying.loss, has_aux=True)
    (_, (metrics, replay)), gradient = differentiate(params, batch, key, replay)
    return gradient, metrics, replay
