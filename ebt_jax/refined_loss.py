"""The loss of refined candidates in training, with replay and without.

Plainly it is `refine` and a sum; where `categorical.py` knows a faster way to the same
numbers, that is taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax import replay as buffer
from ebt_jax.categorical import covers, loss_and_gradient
from ebt_jax.categorical_block import Plan
from ebt_jax.interfaces import Batch, Draws, EnergyModel, Metrics, Replaying
from ebt_jax.meta_gradient import with_gradient
from ebt_jax.objective_config import (
    ObjectiveConfig,
    RefineSetup,
    falling,
    total_loss,
)
from ebt_jax.randomness import fold_in, typed, uniform
from ebt_jax.refine import (
    PyTree,
    Schedule,
    Step,
    energy_and_norm,
    make_schedule,
    refine,
)
from ebt_jax.replay import Recall, Replay, ReplayConfig

CORRUPTION = 2  # folded into a prediction's key for what is drawn of its input

# (params, batch, key, keys, draws, recall) -> (loss, metrics, final candidates as kept)
Score = Callable[..., tuple[jax.Array, Metrics, PyTree]]


def make_score(
    model: EnergyModel,
    setup: RefineSetup,
    config: ObjectiveConfig,
    sizes: Callable[[PyTree], dict[str, Any]],
    initial: Callable[[jax.Array, Batch, PyTree, PyTree], PyTree],
) -> Score:
    """What `make_loss` and `make_replaying` have in common.

    Args:
      model: whose candidates are refined.
      setup: how, and what is learnt.
      config: what is scored.
      sizes: parameters -> `step_size` and `noise_std`, constant where not learnt.
      initial: keys, batch, params, context -> initial candidates.
    """

    def score(
        params: PyTree,
        batch: Batch,
        key: jax.Array,
        keys: jax.Array,
        draws: Draws,
        recall: Recall | None,
    ) -> tuple[jax.Array, Metrics, PyTree]:
        schedule = draws.schedule
        if schedule is None:
            schedule = make_schedule(setup, fold_in(key, 0))
        fast = model.categorical is not None and covers(setup, config)
        fast &= recall is None or config.loss_steps == "last"
        way = quickly if fast else plainly
        total, steps = way(params, batch, keys, schedule, draws, recall)
        last = schedule.length - 1
        losses, energies, norms = (
            steps[name] for name in ("loss", "energy", "gradient_norm")
        )
        metrics = {
            "loss": total,
            model.measure: losses[last],
            f"{model.measure}_first_step": losses[0],
            "energy_first": energies[0],
            "energy_last": energies[last],
            "energy_gap": energies[0] - energies[last],
            "gradient_norm_first": norms[0],
            "gradient_norm_last": norms[last],
            "refine_steps": jnp.float32(schedule.length),
            "step_size": params["step_size"],
            "tokens": batch["weights"].sum(),
        }
        if setup.initial_candidate == "amortised":
            metrics[f"{model.measure}_start"] = steps["start"]
        if setup.noise_std:
            metrics["noise_std"] = params["noise_std"]
        if config.contrastive_weight:
            metrics["contrastive"] = steps["contrastive"]
        return total, metrics, None if recall is None else steps["kept"]

    def plainly(
        params: PyTree,
        batch: Batch,
        keys: jax.Array,
        schedule: Schedule,
        draws: Draws,
        recall: Recall | None,
    ) -> tuple[jax.Array, Metrics]:
        """The loss and its parts at each step, by `refine`."""
        candidate = draws.candidate
        if model.corrupt is not None:
            batch = model.corrupt(fold_in(keys, CORRUPTION), batch, True)
        context = model.encode_context(params, batch)
        if candidate is None:
            candidate = initial(fold_in(keys, 0), batch, params, context)
        start = candidate
        if recall is not None:
            candidate = buffer.recalled(recall, candidate)
        tokens = jnp.maximum(batch["weights"].sum(), 1.0)

        def mean(values: jax.Array) -> jax.Array:
            return (values * batch["weights"]).sum() / tokens

        def observe(step: Step) -> dict[str, jax.Array]:
            smoothing = falling(config.label_smoothing, step.index, schedule.length)
            seen = jax.tree.map(mean, energy_and_norm(step))
            seen["loss"] = mean(model.loss(step.after, batch, smoothing))
            if config.contrastive_weight:
                seen["live_energy"] = step.energy
            return seen

        final, steps = refine(
            model.energy,
            params,
            context,
            candidate,
            config=setup,
            key=fold_in(keys, 1),
            normalize=model.normalize,
            observe=observe,
            schedule=schedule,
            noise=draws.noise,
            jitter=draws.jitter,
            perturbing=model.perturbing,
            **sizes(params),
        )
        last = schedule.length - 1
        total = total_loss(config, steps["loss"], schedule.length)
        if setup.initial_candidate == "amortised":
            # The start is scored like one step more, or nothing would train it.
            steps["start"] = mean(model.loss(start, batch, 0.0))
            total = (steps["start"] + schedule.length * total) / (schedule.length + 1)
        total = config.reconstruction_weight * total
        if config.contrastive_weight:
            target = model.energy(
                params, context, model.target(batch), schedule.landscape[last]
            )
            margin = target - steps["live_energy"][last]
            steps["contrastive"] = mean(jax.nn.softplus(margin))
            total = total + config.contrastive_weight * steps["contrastive"]
        if recall is not None:
            steps["kept"] = buffer.kept(jax.lax.stop_gradient(final), recall.config)
        return total, steps

    def quickly(
        params: PyTree,
        batch: Batch,
        keys: jax.Array,
        schedule: Schedule,
        draws: Draws,
        recall: Recall | None,
    ) -> tuple[jax.Array, Metrics]:
        """The same from `categorical.py`, which finds the gradient as it goes."""
        categorical = model.categorical
        assert categorical is not None  # the caller has looked
        most, factor = setup.step_size_jitter, jnp.ones(keys.shape, jnp.float32)
        if most > 1:
            jitter = draws.jitter
            if jitter is None:
                jitter = uniform(fold_in(fold_in(keys, 1), 1), keys.shape, jnp.float32)
            factor = 1 / most + jitter * (most - 1 / most)

        def both(params: PyTree) -> Any:
            plan = Plan(
                keys=keys,
                schedule=schedule,
                factor=factor,
                candidate=draws.candidate,
                noise=draws.noise,
                recall=recall,
                **sizes(params),
            )
            result, gradient = loss_and_gradient(
                categorical, setup, config, params, batch, plan
            )
            slope = jax.grad(lambda params: sizes(params)["step_size"])(params)
            gradient["step_size"] *= slope["step_size"]
            return result, gradient

        return with_gradient(both, params)

    return score


def make_loss(score: Score) -> Callable[..., tuple[jax.Array, Metrics]]:
    """`Objective.loss`, which takes `Draws` besides.

    Args:
      score: of `make_score`.
    """

    def loss(
        params: PyTree, batch: Batch, key: jax.Array, draws: Draws | None = None
    ) -> tuple[jax.Array, Metrics]:
        draws = Draws() if draws is None else draws
        keys = training_keys(fold_in(key, 1), batch)
        return score(params, batch, key, keys, draws, None)[:2]

    return loss


def make_replaying(
    score: Score, model: EnergyModel, config: ReplayConfig, sequences: PyTree
) -> Replaying:
    """The loss of a batch together with sequences that are replayed.

    `Draws` given to it are those of the batch and, behind them, the replayed ones.

    Args:
      score: of `make_score`.
      model: of the candidates.
      config: what is kept, and how much of it replayed.
      sequences: shapes `[batch, ...]` of what is kept of a batch.
    """

    def empty() -> Replay:
        candidate = jax.eval_shape(
            model.initial_candidate, jax.random.key(0), sequences
        )
        return buffer.empty(config, sequences, candidate)

    def loss(
        params: PyTree,
        batch: Batch,
        key: jax.Array,
        replay: Replay,
        draws: Draws | None = None,
    ) -> tuple[jax.Array, tuple[Metrics, Replay]]:
        draws = Draws() if draws is None else draws
        fresh = len(batch["weights"])
        places = batch["row"] if "row" in batch else jnp.arange(fresh)
        # Of several devices each samples for itself: its first sequence is its own.
        rows = buffer.sample(
            replay, fold_in(fold_in(key, 2), places[0]), config.count(fresh)
        )
        old = buffer.sequences(replay, rows)
        both = {
            name: jnp.concatenate([batch[name], items]) for name, items in old.items()
        }
        own = {"weights": old["weights"], "row": places[: len(rows)]}
        keys = jnp.concatenate(
            [
                training_keys(fold_in(key, 1), batch),
                training_keys(fold_in(key, 3), own),
            ]
        )
        nobody = jnp.full(fresh, buffer.NONE, rows.dtype)
        recall = Recall(config, replay.candidate, jnp.concatenate([nobody, rows]))
        total, metrics, kept = score(params, both, key, keys, draws, recall)
        share = old["weights"].sum() / jnp.maximum(metrics["tokens"], 1.0)
        metrics["replayed"] = share
        kept = jax.tree.map(lambda x: x[:fresh], kept)
        return total, (metrics, buffer.push(replay, batch, kept))

    return Replaying(empty, loss)


def training_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """A key for each prediction, by its place in the batch.

    Those of `jax.random.split(key, [*batch])`, of which a device that holds a part of
    the batch makes its own.

    Args:
      key: of the step.
      batch: `weights` `[*batch]`, and `row` `[batch]` of a part.
    """
    count, *rest = batch["weights"].shape
    rows = batch["row"] if "row" in batch else jnp.arange(count)
    inner = jnp.arange(math.prod(rest)).reshape(rest)
    places = rows.reshape(-1, *(1 for _ in rest)) * inner.size + inner[None]
    draw = functools.partial(jax.random.fold_in, typed(key))
    return jax.vmap(draw)(places.reshape(-1)).reshape(places.shape)
