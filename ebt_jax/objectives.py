"""Meta-losses: what is minimised with respect to the parameters.

Each makes an `Objective` (see `interfaces.py`) of a model: `refined` of an energy
model, `feed_forward` of one that predicts in one pass.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax.errors import UserError
from ebt_jax.interfaces import (
    Batch,
    Caching,
    Decoder,
    EnergyModel,
    FeedForward,
    Metrics,
    Objective,
)
from ebt_jax.objective_config import (
    MIN_STEP_SIZE,
    ObjectiveConfig,
    RefineSetup,
)
from ebt_jax.randomness import fold_in, prediction_keys
from ebt_jax.refine import (
    PyTree,
    RefineConfig,
    Step,
    energy_and_norm,
    make_schedule,
    refine,
)
from ebt_jax.refined_loss import CORRUPTION, make_loss, make_replaying, make_score
from ebt_jax.replay import ReplayConfig
from ebt_jax.thinking import Effort, Thinking, Thought, final_energy, think


def refined(
    model: EnergyModel,
    setup: RefineSetup,
    config: ObjectiveConfig,
    replay: ReplayConfig | None = None,
    sequences: PyTree = None,
) -> Objective:
    """The loss of refined candidates (paper, algorithm 1), with its options.

    Parameters are the model's, `step_size` and `noise_std`. A learnt step size is kept
    at or above 1e-4. Label smoothing at step i of N is s (N-1-i) / (N-1). The
    contrastive term is the cross-entropy of [-E(target), -E(candidate before the last
    update)] with label 0, in the last landscape.

    Args:
      model: whose candidates are refined.
      setup: how.
      config: what is scored.
      replay: what is kept of candidates, and replayed; None or no capacity: nothing.
      sequences: shapes `[batch, ...]` of what a replay keeps of a batch.
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

    starts = ["noise", "zeros", *model.starts]
    starts += ["amortised"] if model.guess is not None else []
    if setup.initial_candidate not in starts:
        raise UserError(
            f"refine.initial_candidate is {setup.initial_candidate!r}, but of this "
            f"model there are {', '.join(starts)}"
        )

    def initial(
        key: jax.Array, batch: Batch, params: PyTree, context: PyTree
    ) -> PyTree:
        if setup.initial_candidate == "amortised" and model.guess is not None:
            return model.guess(params, context)
        if setup.initial_candidate in model.starts:
            return model.starts[setup.initial_candidate](batch)
        candidate = model.initial_candidate(key, batch)
        scale = setup.initial_scale if setup.initial_candidate == "noise" else 0.0
        return jax.tree.map(lambda z: scale * z, candidate)

    score = make_score(model, setup, config, sizes, initial)
    replaying = None
    if replay is not None and replay.capacity:
        replaying = make_replaying(score, model, replay, sequences)

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

    def evaluated_batch(key: jax.Array, batch: Batch) -> tuple[jax.Array, Batch]:
        """A key for each prediction, and the batch with what is drawn of its input."""
        keys = prediction_keys(key, batch["index"], _positions(batch))
        if model.corrupt is not None:
            # 0 and 1 are what initial candidates and noise fold in.
            batch = model.corrupt(fold_in(keys, CORRUPTION), batch, False)
        return keys, batch

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        keys, batch = evaluated_batch(key, batch)

        def observe(step: Step) -> dict[str, jax.Array]:
            seen = {**energy_and_norm(step), "nll": model.loss(step.after, batch)}
            return seen | _measures(model, step.after, batch)

        context = model.encode_context(params, batch)
        config = evaluated(num_steps)
        candidate, trajectory = refine(
            model.energy,
            params,
            context,
            initial(fold_in(keys, 0), batch, params, context),
            config=config,
            key=fold_in(keys, 1),
            normalize=model.normalize,
            observe=observe,
            perturbing=model.perturbing,
            **sizes(params),
        )
        final = final_energy(
            model.energy, params, context, candidate, config, model.normalize
        )
        energy = jnp.concatenate([trajectory["energy"], final[None]])
        return {**trajectory, "energy": energy}

    def thought(
        params: PyTree,
        context: PyTree,
        batch: Batch,
        keys: jax.Array,
        how: Thinking,
        rows: Callable[[PyTree, jax.Array], PyTree] | None = None,
    ) -> Thought:
        """Starts and draws as `evaluate` does."""
        return think(
            model.energy,
            params,
            context,
            keys,
            initial=lambda keys: initial(keys, batch, params, context),
            thinking=how,
            config=evaluated(0),
            normalize=model.normalize,
            rows=rows,
            perturbing=model.perturbing,
            **sizes(params),
        )

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        keys, batch = evaluated_batch(key, batch)
        context = model.encode_context(params, batch)
        return thought(params, context, batch, keys, thinking).candidate

    def assess(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> dict[str, jax.Array]:
        keys, batch = evaluated_batch(key, batch)
        context = model.encode_context(params, batch)
        made = thought(params, context, batch, keys, thinking)
        config = evaluated(0)
        first = initial(fold_in(keys, 0), batch, params, context)
        if config.normalize_steps != "none":
            first = model.normalize(first)
        final = final_energy(
            model.energy, params, context, made.candidate, config, model.normalize
        )
        before = model.energy(params, context, first, jnp.int32(0))
        return {
            **made.effort._asdict(),
            "nll": model.loss(made.candidate, batch)[None],
            **{
                name: values[None]
                for name, values in _measures(model, made.candidate, batch).items()
            },
            "energy": jnp.stack([before, final]),
            "spread": made.spread,
        }

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
        batch = caching.newest(cache)
        following = thought(params, context, batch, keys, thinking, caching.rows)
        return jax.tree.map(lambda x: x[:, 0], following)

    def predict_at(
        caching: Caching,
        params: PyTree,
        cache: PyTree,
        marks: PyTree,
        index: jax.Array,
        key: jax.Array,
        thinking: Thinking,
    ) -> Thought:
        rewinding = caching.rewinding
        assert rewinding is not None and rewinding.following is not None
        context = rewinding.following(params, cache, marks)
        last = rewinding.lengths(marks).T - 1
        keys = prediction_keys(key, index, last)
        batch = rewinding.newest(marks)
        return thought(params, context, batch, keys, thinking, caching.rows)

    decoder = _decoder(model.caching, predict_next, predict_at)
    return Objective(
        init,
        make_loss(score),
        evaluate,
        predict,
        decoder,
        assess,
        replaying=replaying,
        measure=model.measure,
    )


def feed_forward(model: FeedForward, config: ObjectiveConfig) -> Objective:
    """The loss of a model that predicts in one pass, such as Transformer++."""

    def loss(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # nothing is drawn
        losses = model.loss(model.predict(params, batch), batch, config.label_smoothing)
        tokens = batch["weights"].sum()
        mean = (losses * batch["weights"]).sum() / jnp.maximum(tokens, 1.0)
        return mean, {"loss": mean, model.measure: mean, "tokens": tokens}

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        del key, num_steps  # one pass, nothing drawn
        predicted = model.predict(params, batch)
        measures = {"nll": model.loss(predicted, batch)}
        measures |= _measures(model, predicted, batch)
        return {name: values[None] for name, values in measures.items()}

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
        none = jnp.zeros(index.shape, jnp.int32)
        return Thought(predicted, Effort(none, none, none), none.astype(jnp.float32))

    decoder = _decoder(model.caching, predict_next)
    return Objective(
        model.init, loss, evaluate, predict, decoder, measure=model.measure
    )


def _decoder(
    caching: Caching | None,
    predict_next: Callable[..., Thought],
    predict_at: Callable[..., Thought] | None = None,
) -> Decoder | None:
    if caching is None:
        return None
    rewinding = caching.rewinding
    ahead = None
    if predict_at is not None and rewinding is not None:
        ahead = functools.partial(predict_at, caching)
    return Decoder(
        caching.prepare,
        caching.prefill,
        functools.partial(predict_next, caching),
        caching.append,
        rewinding,
        ahead,
    )


def _measures(
    model: EnergyModel | FeedForward, candidate: PyTree, batch: Batch
) -> dict[str, jax.Array]:
    """What is evaluated besides the loss, `[*batch]` each."""
    return {} if model.measures is None else model.measures(candidate, batch)


def _positions(batch: Batch) -> jax.Array | None:
    """Places `[seq]` of a batch's predictions; None where each is a sequence."""
    weights = batch["weights"]
    return None if weights.ndim == 1 else jnp.arange(weights.shape[1])
