"""One block of predictions over a vocabulary: its refinement, loss and gradients.

The mathematics, and why it is done in this order, is explained in `categorical.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.objective_config import (
    ObjectiveConfig,
    RefineSetup,
    falling,
    step_weight,
)
from ebt_jax.randomness import fold_in, normal, normal_like, over_predictions
from ebt_jax.refine import PyTree
from ebt_jax.refine_config import Schedule
from ebt_jax.replay import Recall, kept, recalled


class Plan(NamedTuple):
    """What a refinement draws, or draws from.

    Attributes:
      keys: `[batch, seq]`, one for each prediction.
      schedule: number of steps, and landscapes.
      step_size: the scalar parameter, after its lower bound.
      factor: `[batch, seq]`, by which a prediction's step size is multiplied.
      noise_std: of Langevin noise, or None.
      candidate: initial candidates `[batch, seq, vocab]`; None draws them.
      noise: standard normals `[num_steps, batch, seq, vocab]`; None draws them.
      recall: which predictions begin where others ended, and all final candidates are
        wanted; None if none are.
    """

    keys: jax.Array
    schedule: Schedule
    step_size: jax.Array
    factor: jax.Array
    noise_std: jax.Array | None
    candidate: jax.Array | None
    noise: jax.Array | None
    recall: Recall | None = None


class Block(NamedTuple):
    """Predictions that are refined together, `block` of them.

    Attributes:
      energy: `(network, past, x [block, dim], landscape) -> (sum, energies [block])`.
      network: parameters without the tables.
      table: `[vocab, dim]`.
      dtype: of products with the table.
      each: `[block, ...]`, target, weight, key, factor, and candidate and noise where
        they are given; row and place where candidates are recalled.
    """

    energy: Callable[..., tuple[jax.Array, jax.Array]]
    network: PyTree
    table: jax.Array
    dtype: Any
    each: dict[str, Any]


def train_block(
    block: Block,
    plan: Plan,
    setup: RefineSetup,
    config: ObjectiveConfig,
    pasts: PyTree,
    learnt: PyTree,
    carry: tuple[PyTree, PyTree],
) -> tuple[tuple[PyTree, PyTree], PyTree]:
    """Refines a block and adds its gradients and means to `carry`.

    Args:
      block: the predictions.
      plan: draws.
      setup: how to refine.
      config: what to score.
      pasts: what candidates see, `[landscapes, ...]`.
      learnt: the same, of the landscapes whose contexts get a gradient.
      carry: the sums of `loss_and_gradient`, and those of the cotangents of `learnt`.

    Returns:
      `carry`, with what this block adds, and the final candidates as they are kept,
      leaves `[block, ...]`; None without `plan.recall`.
    """
    table, each, schedule = block.table, block.each, plan.schedule
    sizes = plan.step_size * each["factor"]
    target_rows = table[each["target"]]
    count = schedule.length

    def at(contexts: PyTree, landscape: jax.Array) -> tuple[jax.Array, PyTree]:
        index = jnp.minimum(landscape, len(jax.tree.leaves(contexts)[0]) - 1)
        return index, jax.tree.map(lambda a: a[index], contexts)

    def embed(p: jax.Array) -> jax.Array:
        return _product("nv,vd->nd", p, table, block.dtype)

    def descend(p: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """p - a h W^T, and the norm of the inner gradient."""
        gradient = _product("nd,vd->nv", h, table, block.dtype)
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=-1))
        return p - sizes[:, None] * gradient, norm

    def observe(steps: PyTree, i: Any, energy: Any, norm: Any, loss: Any) -> PyTree:
        seen = {"energy": energy, "gradient_norm": norm, "loss": loss}
        mean = lambda total, values: total.at[i].add(jnp.vdot(each["weight"], values))
        return jax.tree.map(mean, steps, seen)

    def cross_entropy(z: jax.Array, i: Any) -> tuple[jax.Array, jax.Array, Any]:
        """Losses, log normalisers and the smoothing at step i."""
        smoothing = falling(config.label_smoothing, i, count)
        normaliser = jax.nn.logsumexp(z, axis=-1)
        of_target = jnp.take_along_axis(z, each["target"][:, None], axis=-1)[:, 0]
        loss = normaliser - (1 - smoothing) * of_target
        if config.label_smoothing:
            loss = loss - smoothing * z.mean(axis=-1)
        return loss, normaliser, smoothing

    def normalize(z: jax.Array, i: Any) -> jax.Array:
        """softmax, after the Langevin noise of step i where there is any."""
        if plan.noise_std is None:
            return jax.nn.softmax(z)
        if each["noise"] is not None:
            return jax.nn.softmax(z + plan.noise_std * each["noise"][:, i])

        def noisy(z: jax.Array, key: jax.Array) -> jax.Array:
            key = fold_in(fold_in(fold_in(key, 1), 2), i)  # as `refine` draws it
            return jax.nn.softmax(z + plan.noise_std * normal_like(key, z, 0))

        return over_predictions(noisy, z, each["key"])

    def draw(key: jax.Array) -> jax.Array:
        noise = normal(fold_in(key, 0), table.shape[:1], table.dtype)
        return setup.initial_scale * noise

    def initial() -> jax.Array:
        if each["candidate"] is not None:
            return each["candidate"]
        if setup.initial_candidate == "zeros":
            return jnp.zeros((len(sizes), len(table)), table.dtype)
        return over_predictions(draw, each["key"])

    def begin() -> jax.Array:
        """softmax of the initial candidates, where a block of them is drawn."""
        if plan.recall is not None:
            z = recalled(plan.recall, initial(), each["row"], each["place"])
            return normalize(z, 0)
        given = each["candidate"] is not None or setup.initial_candidate == "zeros"
        if given or plan.noise_std is not None:
            return normalize(initial(), 0)
        return over_predictions(lambda key: jax.nn.softmax(draw(key)), each["key"])

    def advance(i: Any, carry: Any) -> Any:
        """A step that is not differentiated."""
        p, steps = carry
        _, past = at(pasts, schedule.landscape[i])
        value_and_grad = jax.value_and_grad(block.energy, argnums=2, has_aux=True)
        x = embed(p)
        (_, energy), h = value_and_grad(block.network, past, x, schedule.landscape[i])
        z, norm = descend(p, h)
        steps = observe(steps, i, energy, norm, cross_entropy(z, i)[0])
        return normalize(z, i + 1), steps

    def learn(i: Any, carry: Any) -> tuple[Any, jax.Array]:
        """A step and its gradients, and the candidates after it."""
        p, x, deferred, learnt_bar, sums = carry
        landscape = schedule.landscape[i]
        index, past = at(learnt, landscape)

        def gradients(x: jax.Array) -> Any:
            return jax.grad(block.energy, argnums=(0, 1, 2), has_aux=True)(
                block.network, past, x, landscape
            )

        ((_, _, h), energy), along = jax.linearize(gradients, x)
        z, norm = descend(p, h)
        loss, normaliser, smoothing = cross_entropy(z, i)
        after = jnp.exp(z - normaliser[:, None])
        after_x = embed(after)

        # The cotangent of z' is `share` (softmax(z') - q), and of its x this times W.
        share = config.reconstruction_weight * each["weight"]
        share = share * step_weight(config, i, count)
        wanted = (1 - smoothing) * target_rows
        if config.label_smoothing:
            wanted = wanted + smoothing * table.mean(axis=0, keepdims=True)
        x_bar = share[:, None] * (after_x - wanted)
        (network_bar, past_bar, x_cotangent), _ = along(-sizes[:, None] * x_bar)

        of_softmax = -(sizes * share)[:, None] * h
        sums = dict(sums)
        sums["steps"] = observe(sums["steps"], i, energy, norm, loss)
        sums["network"] = jax.tree.map(jnp.add, sums["network"], network_bar)
        sums["step_size"] -= jnp.vdot(each["factor"], jnp.sum(x_bar * h, axis=-1))
        sums["table"] = _add_product(
            sums["table"], p, x_cotangent + deferred, block.dtype
        )
        sums["table"] = (
            sums["table"].at[each["target"]].add(-(1 - smoothing) * of_softmax)
        )
        sums["every_entry"] -= smoothing / len(table) * of_softmax.sum(axis=0)
        learnt_bar = jax.tree.map(
            lambda total, bar: total.at[index].add(bar), learnt_bar, past_bar
        )
        return (after, after_x, of_softmax, learnt_bar, sums), z

    sums, learnt_bar = carry
    p = begin()
    if config.loss_steps == "last":
        p, steps = jax.lax.fori_loop(0, count - 1, advance, (p, sums["steps"]))
        x = embed(p)
        state = p, x, jnp.zeros_like(x), learnt_bar, {**sums, "steps": steps}
        state, z = learn(count - 1, state)
        final = None if plan.recall is None else kept(z, plan.recall.config)
    else:
        x = embed(p)
        state = p, x, jnp.zeros_like(x), learnt_bar, sums
        state = jax.lax.fori_loop(0, count, lambda i, s: learn(i, s)[0], state)
        final = None
    p, _, deferred, learnt_bar, sums = state
    table_bar = _add_product(sums["table"], p, deferred, block.dtype)
    return ({**sums, "table": table_bar}, learnt_bar), final


def _product(form: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    precise = jnp.promote_types(dtype, jnp.float32)
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(form, a, b, preferred_element_type=precise)


def _add_product(total: jax.Array, p: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """total + p^T x, `[vocab, dim]`.

    With fewer predictions than features the product would be the largest array there
    is; then it is made and added a piece of the vocabulary at a time.
    """
    product = lambda p: _product("nv,nd->vd", p, x, dtype)
    vocab, dim = total.shape
    pieces = -(-dim // len(p))
    if pieces == 1:
        return total + product(p)
    size = vocab // pieces

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        start = i * size
        more = product(jax.lax.dynamic_slice_in_dim(p, start, size, axis=1))
        more = more + jax.lax.dynamic_slice_in_dim(total, start, size)
        return jax.lax.dynamic_update_slice_in_dim(total, more, start, axis=0)

    total = jax.lax.fori_loop(0, pieces, add, total)
    rest = pieces * size
    return total if rest == vocab else total.at[rest:].add(product(p[:, rest:]))
