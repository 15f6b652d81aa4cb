"""Training on distributions over a vocabulary, as fast as the mathematics allows.

A candidate is z `[vocab]` for each prediction, p = softmax(z) enters the energy through
a table W `[vocab, dim]` as x = p W, and the loss is the cross-entropy of softmax(z).
Inner gradients are then h W^T with h = dE/dx, and a step is

    z' = p - a h W^T,    loss = logsumexp(z') - q . z'

with q the target distribution. Only x and h, `[dim]` wide, pass through the network.
`loss_and_gradient` computes what differentiating `objectives.refined` would compute, in
another order:

* Predictions are independent, so they are refined and differentiated a block at a time;
  nothing `[batch, seq, vocab]` exists beyond a block, and initial noise is drawn inside
  it. Gradients are summed in place.
* A step's start is a constant of the meta-gradient, so a step is differentiated as soon
  as it is taken, from the intermediate results of the inner gradient just computed:
  `jax.linearize` of the energy's full gradient along x, applied to the cotangent of h.
  Nothing is computed twice and one step's intermediate results exist at a time.
* With r = softmax(z') W - q W the cotangent of h is -a r. The next step's x is
  softmax(z') W too, so it is computed once, and the two gradients that W gets through
  softmax(z') are one product: 6 T + 4 products with W in T steps instead of 10 T.

Where only the last step has a loss and nothing learnt precedes it (System 2), all steps
before it are plain forward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ebt_jax.interfaces import Batch, Categorical
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.randomness import fold_in, normal, normal_like, over_predictions
from ebt_jax.refine import PyTree
from ebt_jax.refine_config import Schedule

CPU_BLOCK = 512  # predictions whose activations stay in the caches of a CPU


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
    """

    keys: jax.Array
    schedule: Schedule
    step_size: jax.Array
    factor: jax.Array
    noise_std: jax.Array | None
    candidate: jax.Array | None
    noise: jax.Array | None


def covers(setup: RefineSetup, config: ObjectiveConfig) -> bool:
    """Whether `loss_and_gradient` computes this loss. Everything else is `refine`'s."""
    plain = not (setup.gradient_clamp or setup.absolute_clamp or setup.sharpen)
    plain &= setup.normalize_steps == "all" and not config.contrastive_weight
    if setup.meta_gradient != "rule" or not plain:
        return False
    if config.loss_steps == "all":
        return setup.backprop == "per_step" and not setup.noise_std
    if setup.backprop == "truncated":
        return not (setup.step_size_learnable or setup.noise_learnable)
    return setup.backprop == "per_step" and not setup.noise_learnable


def loss_and_gradient(
    model: Categorical,
    setup: RefineSetup,
    config: ObjectiveConfig,
    params: PyTree,
    batch: Batch,
    plan: Plan,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], PyTree]:
    """The loss of `objectives.refined` and its gradient. See the module's docstring.

    Args:
      model: the energy network.
      setup: how candidates are refined, `block` of them at a time.
      config: what is scored; `covers(setup, config)` has to hold.
      params: the model's, and `step_size`.
      batch: `targets`, `weights` `[batch, seq]`, and what the model needs.
      plan: draws.

    Returns:
      `((loss, steps), gradient)`. `steps` has weighted means over predictions, `loss`,
      `energy` and `gradient_norm`, `[num_steps]`; 0 for steps that are not taken.
    """
    tables = {name: params[name] for name in model.tables}
    network, pull_network = jax.vjp(
        model.prepare, {name: p for name, p in params.items() if name not in tables}
    )
    (table, token_table), pull_tables = jax.vjp(
        lambda tables: (model.table(tables), model.token_table(tables)), tables
    )
    embedded = token_table[batch["tokens"]].astype(model.dtype or token_table.dtype)
    count, length = batch["weights"].shape
    groups, parts = _layout(count, length, setup.block)
    predictions = {
        "target": batch["targets"],
        "weight": batch["weights"] / jnp.maximum(batch["weights"].sum(), 1.0),
        "key": plan.keys,
        "factor": plan.factor,
        "candidate": plan.candidate,
        "noise": None if plan.noise is None else jnp.moveaxis(plan.noise, 0, 2),
    }
    landscapes = jnp.arange(model.num_contexts)
    learning = landscapes  # those whose contexts get a gradient
    if config.loss_steps == "last" and model.num_contexts > 1:
        learning = plan.schedule.landscape[plan.schedule.length - 1][None]
    sums = {
        "network": jax.tree.map(jnp.zeros_like, network),
        "table": jnp.zeros_like(table),
        "every_entry": jnp.zeros_like(table[0]),
        "step_size": jnp.zeros((), table.dtype),
        "steps": {
            name: jnp.zeros(len(plan.schedule.landscape), table.dtype)
            for name in ("loss", "energy", "gradient_norm")
        },
    }

    def sequences(sums: PyTree, inputs: Any) -> tuple[PyTree, jax.Array]:
        """Encodes some sequences, and trains on all that is predicted from them."""
        batch, embedded, predictions = inputs

        def encode(network: PyTree, embedded: jax.Array, which: jax.Array) -> PyTree:
            one = lambda landscape: model.encode(network, embedded, batch, landscape)
            return jax.vmap(one)(which)

        def encode_learning(network: PyTree, embedded: jax.Array) -> PyTree:
            return encode(network, embedded, learning)

        learnt, pull = jax.vjp(encode_learning, network, embedded)
        pasts = learnt
        if learning is not landscapes:
            pasts = encode(network, embedded, landscapes)

        def places(carry: Any, inputs: Any) -> tuple[Any, None]:
            """Trains on what stands at some places of these sequences."""
            index, predictions = inputs
            shape = predictions["weight"].shape

            def energy(network: PyTree, past: PyTree, x: jax.Array, at: Any) -> Any:
                x = x.reshape(*shape, -1).astype(embedded.dtype)
                energies = model.energy(network, past, batch, index, x, at)
                energies = energies.astype(table.dtype)
                return energies.sum(), energies.reshape(-1)

            flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), predictions)
            block = Block(energy, network, table, embedded.dtype, flat)
            return _train(block, plan, setup, config, pasts, learnt, carry), None

        pieces = _pieces(predictions, length, parts)
        carry = sums, jax.tree.map(jnp.zeros_like, learnt)
        (sums, learnt_bar), _ = jax.lax.scan(places, carry, pieces)
        if parts == 1:
            network_bar, embedded_bar = pull(learnt_bar)
        else:
            # Where memory matters, what `pull` needs is not kept but computed again; in
            # a branch, as XLA would find out otherwise.
            network_bar, embedded_bar = jax.lax.cond(
                predictions["weight"].any(),
                lambda inputs, bar: jax.vjp(encode_learning, *inputs)[1](bar),
                lambda inputs, bar: jax.tree.map(jnp.zeros_like, inputs),
                (network, embedded),
                learnt_bar,
            )
        sums["network"] = jax.tree.map(jnp.add, sums["network"], network_bar)
        return sums, embedded_bar

    # Every groups-th sequence: each device splits the sequences it already holds.
    apart = lambda x: x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1)
    inputs = jax.tree.map(apart, (batch, embedded, predictions))
    sums, embedded_bar = jax.lax.scan(sequences, sums, inputs)
    embedded_bar = embedded_bar.swapaxes(0, 1).reshape(embedded.shape)
    table_bar = sums["table"]
    if config.label_smoothing:
        table_bar = table_bar + sums["every_entry"][None]
    steps = sums["steps"]
    loss = steps["loss"][plan.schedule.length - 1]
    if config.loss_steps == "all":
        loss = steps["loss"].sum() / plan.schedule.length
    # Zeros that wait for the loss: others would be made first, and kept all the while.
    token_bar = jnp.broadcast_to(0 * loss, token_table.shape)
    token_bar = token_bar.at[batch["tokens"]].add(embedded_bar)
    (tables_bar,) = pull_tables((table_bar, token_bar))
    size_bar = sums["step_size"].astype(params["step_size"].dtype)
    (network_bar,) = pull_network(sums["network"])
    gradient = {**network_bar, **tables_bar, "step_size": size_bar}
    return (config.reconstruction_weight * loss, steps), gradient


class Block(NamedTuple):
    """Predictions that are refined together, `block` of them.

    Attributes:
      energy: `(network, past, x [block, dim], landscape) -> (sum, energies [block])`.
      network: parameters without the tables.
      table: `[vocab, dim]`.
      dtype: of products with the table.
      each: `[block, ...]`, target, weight, key, factor, and candidate and noise where
        they are given.
    """

    energy: Callable[..., tuple[jax.Array, jax.Array]]
    network: PyTree
    table: jax.Array
    dtype: Any
    each: dict[str, Any]


def _train(
    block: Block,
    plan: Plan,
    setup: RefineSetup,
    config: ObjectiveConfig,
    pasts: PyTree,
    learnt: PyTree,
    carry: tuple[PyTree, PyTree],
) -> tuple[PyTree, PyTree]:
    """Refines a block and adds its gradients and means to `carry`.

    Args:
      block: the predictions.
      plan: draws.
      setup: how to refine.
      config: what to score.
      pasts: what candidates see, `[landscapes, ...]`.
      learnt: the same, of the landscapes whose contexts get a gradient.
      carry: the sums of `loss_and_gradient`, and those of the cotangents of `learnt`.
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

    def begin() -> jax.Array:
        """softmax of the initial candidates, where a block of them is drawn."""
        if each["candidate"] is not None:
            return normalize(each["candidate"], 0)
        if setup.initial_candidate == "zeros":
            return normalize(jnp.zeros((len(sizes), len(table)), table.dtype), 0)

        def draw(key: jax.Array) -> jax.Array:
            noise = normal(fold_in(key, 0), table.shape[:1], table.dtype)
            z = setup.initial_scale * noise
            return jax.nn.softmax(z) if plan.noise_std is None else z

        drawn = over_predictions(draw, each["key"])
        return drawn if plan.noise_std is None else normalize(drawn, 0)

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

    def learn(i: Any, carry: Any) -> Any:
        """A step and its gradients."""
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
        if config.loss_steps == "all":
            share = share / count
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
        return after, after_x, of_softmax, learnt_bar, sums

    sums, learnt_bar = carry
    p = begin()
    if config.loss_steps == "last":
        p, steps = jax.lax.fori_loop(0, count - 1, advance, (p, sums["steps"]))
        x = embed(p)
        state = p, x, jnp.zeros_like(x), learnt_bar, {**sums, "steps": steps}
        state = learn(count - 1, state)
    else:
        x = embed(p)
        state = p, x, jnp.zeros_like(x), learnt_bar, sums
        state = jax.lax.fori_loop(0, count, learn, state)
    p, _, deferred, learnt_bar, sums = state
    table_bar = _add_product(sums["table"], p, deferred, block.dtype)
    return {**sums, "table": table_bar}, learnt_bar


def falling(start: float, index: ArrayLike, length: ArrayLike) -> ArrayLike:
    """Label smoothing: start (N-1-i) / (N-1) at step i of N, and 0 where N is 1."""
    if not start:
        return 0.0
    span = jnp.maximum(jnp.asarray(length) - 1, 1)
    return start * jnp.maximum(length - 1 - jnp.asarray(index), 0) / span


def _layout(count: int, length: int, block: int) -> tuple[int, int]:
    """Parts that sequences, and places of a sequence, are taken in.

    Args:
      count: sequences.
      length: places of each.
      block: predictions at a time, at most, but for one of each sequence; 0: default.
    """
    if not block:
        block = CPU_BLOCK if jax.default_backend() == "cpu" else count * length
    fewest = min(count, -(-count * length // block))
    groups = next(n for n in range(fewest, count + 1) if count % n == 0)
    return groups, -(-length // block)


def _pieces(predictions: PyTree, length: int, parts: int) -> tuple[jax.Array, PyTree]:
    """Places `[parts, places]` and what belongs to them `[parts, sequences, places]`.

    The last part is filled up with predictions that weigh nothing.
    """
    index = jnp.arange(parts * -(-length // parts)).reshape(parts, -1)
    inside = jnp.minimum(index, length - 1)
    pieces = jax.tree.map(lambda x: jnp.moveaxis(x[:, inside], 1, 0), predictions)
    weight = jnp.where((index < length)[:, None], pieces["weight"], 0)
    return inside, {**pieces, "weight": weight}


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
