"""Meta-losses: what is minimised with respect to the parameters.

Each makes an `Objective` (see `interfaces.py`) of a model: `refined` of an energy
model, `feed_forward` of one that predicts in one pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax.categorical import covers, loss_and_gradient
from ebt_jax.categorical_block import Plan
from ebt_jax.interfaces import (
    Batch,
    Caching,
    Decoder,
    Draws,
    EnergyModel,
    FeedForward,
    Metrics,
    Objective,
)
from ebt_jax.meta_gradient import with_gradient
from ebt_jax.objective_config import (
    MIN_STEP_SIZE,
    ObjectiveConfig,
    RefineSetup,
    falling,
)
from ebt_jax.randomness import fold_in, prediction_keys, typed, uniform
from ebt_jax.refine import (
    PyTree,
    RefineConfig,
    Schedule,
    Step,
    energy_and_norm,
    make_schedule,
    refine,
)
from ebt_jax.thinking import Thinking, Thought, final_energy, think


def refined(
    model: EnergyModel, setup: RefineSetup, config: ObjectiveConfig
) -> Objective:
    """The loss of refined candidates (paper, algorithm 1), with its options.

    Parameters are the model's, `step_size` and `noise_std`. A learnt step size is kept
    at or above 1e-4. Label smoothing at step i of N is s (N-1-i) / (N-1). The
    contrastive term is the cross-entropy of [-E(target), -E(candidate before the last
    update)] with label 0, in the last landscape.
    """

    def init(key: jax.Array) -> PyTree:
        return {
            **model.init(key),
            "step_size": jnp.float32(setup.step_size),
            "noise_std": jnp.float32(setup.noise_std),
        }

    def sizes(params: PyTree) -> dict[str, Any]:
        step_size = jnp.maximum(params["step_size"], MIN_STEP_SIZE)
        noise_std = params["noise_std"] if setup.noise_std else None
        if not setup.step_size_learnable:
            step_size = jax.lax.stop_gradient(step_size)
        if not setup.noise_learnable:
            noise_std = jax.lax.stop_gradient(noise_std)
        return {"step_size": step_size, "noise_std": noise_std}

    def initial(key: jax.Array, batch: Batch) -> PyTree:
        candidate = model.initial_candidate(key, batch)
        scale = setup.initial_scale if setup.initial_candidate == "noise" else 0.0
        return jax.tree.map(lambda z: scale * z, candidate)

    def loss(
        params: PyTree, batch: Batch, key: jax.Array, draws: Draws | None = None
    ) -> tuple[jax.Array, Metrics]:
        draws = Draws() if draws is None else draws
        schedule = draws.schedule
        if schedule is None:
            schedule = make_schedule(setup, fold_in(key, 0))
        keys = _training_keys(fold_in(key, 1), batch)
        if model.categorical is not None and covers(setup, config):
            total, steps = quickly(params, batch, keys, schedule, draws)
        else:
            total, steps = plainly(params, batch, keys, schedule, draws)
        last = schedule.length - 1
        losses, energies, norms = (
            steps[name] for name in ("loss", "energy", "gradient_norm")
        )
        metrics = {
            "loss": total,
            "nll": losses[last],
            "nll_first_step": losses[0],
            "energy_first": energies[0],
            "energy_last": energies[last],
            "energy_gap": energies[0] - energies[last],
            "gradient_norm_first": norms[0],
            "gradient_norm_last": norms[last],
            "refine_steps": jnp.float32(schedule.length),
            "step_size": params["step_size"],
            "tokens": batch["weights"].sum(),
        }
        if setup.noise_std:
            metrics["noise_std"] = params["noise_std"]
        if config.contrastive_weight:
            metrics["contrastive"] = steps["contrastive"]
        return total, metrics

    def plainly(
        params: PyTree, batch: Batch, keys: jax.Array, schedule: Schedule, draws: Draws
    ) -> tuple[jax.Array, Metrics]:
        """The loss and its parts at each step, by `refine`."""
        candidate = draws.candidate
        if candidate is None:
            candidate = initial(fold_in(keys, 0), batch)
        context = model.encode_context(params, batch)
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

        _, steps = refine(
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
            **sizes(params),
        )
        last = schedule.length - 1
        total = steps["loss"][last]
        if config.loss_steps == "all":
            total = steps["loss"].sum() / schedule.length
        total = config.reconstruction_weight * total
        if config.contrastive_weight:
            target = model.energy(
                params, context, model.target(batch), schedule.landscape[last]
            )
            margin = target - steps["live_energy"][last]
            steps["contrastive"] = mean(jax.nn.softplus(margin))
            total = total + config.contrastive_weight * steps["contrastive"]
        return total, steps

    def quickly(
        params: PyTree, batch: Batch, keys: jax.Array, schedule: Schedule, draws: Draws
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
                **sizes(params),
            )
            result, gradient = loss_and_gradient(
                categorical, setup, config, params, batch, plan
            )
            slope = jax.grad(lambda params: sizes(params)["step_size"])(params)
            gradient["step_size"] *= slope["step_size"]
            return result, gradient

        return with_gradient(both, params)

    def evaluated(num_steps: int) -> RefineConfig:
        """Refinement as in evaluation: nothing depends on how a batch is laid out."""
        return dataclasses.replace(
            setup,
            num_steps=num_steps or make_schedule(setup).length,
            min_steps=0,
            final_landscape_only=True,
            step_size_jitter=1.0,
            backprop="per_step",
        )

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        def observe(step: Step) -> dict[str, jax.Array]:
            return {**energy_and_norm(step), "nll": model.loss(step.after, batch)}

        context = model.encode_context(params, batch)
        keys = prediction_keys(key, batch["index"], _positions(batch))
        config = evaluated(num_steps)
        candidate, trajectory = refine(
            model.energy,
            params,
            context,
            initial(fold_in(keys, 0), batch),
            config=config,
            key=fold_in(keys, 1),
            normalize=model.normalize,
            observe=observe,
            **sizes(params),
        )
        final = final_energy(
            model.energy, params, context, candidate, config, model.normalize
        )
        energy = jnp.concatenate([trajectory["energy"], final[None]])
        return {**trajectory, "energy": energy}

    def thought(
        params: PyTree, context: PyTree, batch: Batch, keys: jax.Array, how: Thinking
    ) -> Thought:
        """Starts and draws as `evaluate` does."""
        return think(
            model.energy,
            params,
            context,
            keys,
            initial=lambda keys: initial(keys, batch),
            thinking=how,
            config=evaluated(0),
            normalize=model.normalize,
            **sizes(params),
        )

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        context = model.encode_context(params, batch)
        keys = prediction_keys(key, batch["index"], _positions(batch))
        return thought(params, context, batch, keys, thinking).candidate

    def predict_next(
        caching: Caching,
        params: PyTree,
        cache: PyTree,
        index: jax.Array,
        key: jax.Array,
        thinking: Thinking,
    ) -> Thought:
        context = caching.following(params, cache)
        last = caching.length(cache)[:, None] - 1
        keys = prediction_keys(key, index, last)
        following = thought(params, context, {"tokens": last}, keys, thinking)
        return jax.tree.map(lambda x: x[:, 0], following)

    decoder = _decoder(model.caching, predict_next)
    return Objective(init, loss, evaluate, predict, decoder)


def feed_forward(model: FeedForward, config: ObjectiveConfig) -> Objective:
    """The loss of a model that predicts in one pass, such as Transformer++."""

    def loss(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # nothing is drawn
        losses = model.loss(model.predict(params, batch), batch, config.label_smoothing)
        tokens = batch["weights"].sum()
        mean = (losses * batch["weights"]).sum() / jnp.maximum(tokens, 1.0)
        return mean, {"loss": mean, "nll": mean, "tokens": tokens}

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        del key, num_steps  # one pass, nothing drawn
        return {"nll": model.loss(model.predict(params, batch), batch)[None]}

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        del key, thinking
        return model.predict(params, batch)

    def predict_next(
        caching: Caching,
        params: PyTree,
        cache: PyTree,
        index: jax.Array,
        key: jax.Array,
        thinking: Thinking,
    ) -> Thought:
        del key, thinking
        predicted = jax.tree.map(lambda y: y[:, 0], caching.following(params, cache))
        return Thought(predicted, jnp.zeros(index.shape, jnp.int32))

    decoder = _decoder(model.caching, predict_next)
    return Objective(model.init, loss, evaluate, predict, decoder)


def _decoder(
    caching: Caching | None, predict_next: Callable[..., Thought]
) -> Decoder | None:
    if caching is None:
        return None
    predict = functools.partial(predict_next, caching)
    return Decoder(caching.prepare, caching.prefill, predict, caching.append)


def _training_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """A key for each prediction, by its place in the batch.

    Those of `jax.random.split(key, [*batch])`, of which a device that holds a part of
    the batch makes its own.
    """
    count, *rest = batch["weights"].shape
    rows = batch["row"] if "row" in batch else jnp.arange(count)
    inner = jnp.arange(math.prod(rest)).reshape(rest)
    places = rows.reshape(-1, *(1 for _ in rest)) * inner.size + inner[None]
    draw = functools.partial(jax.random.fold_in, typed(key))
    return jax.vmap(draw)(places.reshape(-1)).reshape(places.shape)


def _positions(batch: Batch) -> jax.Array:
    """Places `[seq]` of a batch's predictions."""
    return jnp.arange(batch["weights"].shape[1])
