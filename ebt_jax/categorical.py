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

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax.categorical_block import Block, Plan, train_block
from ebt_jax.interfaces import Batch, Categorical
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup, total_loss
from ebt_jax.refine import PyTree

CPU_BLOCK = 512  # predictions whose activations stay in the caches of a CPU


def covers(setup: RefineSetup, config: ObjectiveConfig) -> bool:
    """Whether `loss_and_gradient` computes this loss. Everything else is `refine`'s."""
    plain = not (setup.gradient_clamp or setup.absolute_clamp or setup.sharpen)
    plain &= setup.normalize_steps == "all" and not config.contrastive_weight
    plain &= not setup.unit_gradient and setup.initial_candidate != "amortised"
    if setup.meta_gradient != "rule" or not plain:
        return False
    if config.loss_steps != "last":
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
      `energy` and `gradient_norm`, `[num_steps]`; 0 for steps that are not taken. With
      `plan.recall`, for which only the last step may be scored, it has the final
      candidates, too: `kept`, leaves `[batch, seq, ...]`.
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
    if plan.recall is not None:
        each = jnp.broadcast_to
        predictions["row"] = each(plan.recall.rows[:, None], (count, length))
        predictions["place"] = each(jnp.arange(length), (count, length))
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

    def sequences(sums: PyTree, inputs: Any) -> tuple[PyTree, Any]:
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

        def places(carry: Any, inputs: Any) -> tuple[Any, PyTree]:
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
            carry, kept = train_block(block, plan, setup, config, pasts, learnt, carry)
            return carry, jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), kept)

        pieces = _pieces(predictions, length, parts)
        carry = sums, jax.tree.map(jnp.zeros_like, learnt)
        (sums, learnt_bar), kept = jax.lax.scan(places, carry, pieces)
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
        return sums, (embedded_bar, jax.tree.map(partial(_whole, length), kept))

    # Every groups-th sequence: each device splits the sequences it already holds.
    apart = lambda x: x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1)
    inputs = jax.tree.map(apart, (batch, embedded, predictions))
    sums, of_each = jax.lax.scan(sequences, sums, inputs)
    together = lambda x: x.swapaxes(0, 1).reshape(count, *x.shape[2:])
    embedded_bar, kept = jax.tree.map(together, of_each)
    table_bar = sums["table"]
    if config.label_smoothing:
        table_bar = table_bar + sums["every_entry"][None]
    steps = sums["steps"]
    loss = total_loss(config, steps["loss"], plan.schedule.length)
    # Zeros that wait for the loss: others would be made first, and kept all the while.
    token_bar = jnp.broadcast_to(0 * loss, token_table.shape)
    token_bar = token_bar.at[batch["tokens"]].add(embedded_bar)
    (tables_bar,) = pull_tables((table_bar, token_bar))
    size_bar = sums["step_size"].astype(params["step_size"].dtype)
    (network_bar,) = pull_network(sums["network"])
    gradient = {**network_bar, **tables_bar, "step_size": size_bar}
    if kept is not None:
        steps = {**steps, "kept": kept}
    return (config.reconstruction_weight * loss, steps), gradient


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


def _whole(length: int, pieces: jax.Array) -> jax.Array:
    """`[sequences, length, ...]` of `[parts, sequences, places, ...]`."""
    x = jnp.moveaxis(pieces, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
