"""The loss of a model that predicts again and again from what it made before.

Each of its passes is scored, as the steps of a refinement are, and after training there
may be more of them. There is no energy, so nothing tells which prediction to trust.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Batch, Metrics, Objective, Recurrent
from ebt_jax.objective_config import ObjectiveConfig, falling
from ebt_jax.refine import PyTree
from ebt_jax.thinking import Thinking


def iterated(model: Recurrent, config: ObjectiveConfig) -> Objective:
    """The loss of the passes of a recurrent model, through all of which it is trained.

    `evaluate` and `predict` take as many passes as `num_steps` says; 0 is the trained
    number. Nothing is drawn.

    Args:
      model: what predicts.
      config: `loss_steps` and `label_smoothing`, of passes in place of steps.
    """
    trained = model.iterations

    def loss(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # nothing is drawn
        tokens = batch["weights"].sum()

        def mean(index: jax.Array, candidate: PyTree) -> jax.Array:
            smoothing = falling(config.label_smoothing, index, trained)
            losses = model.loss(candidate, batch, smoothing)
            return (losses * batch["weights"]).sum() / jnp.maximum(tokens, 1.0)

        candidates = model.iterate(params, batch, trained)
        each = jax.vmap(mean)(jnp.arange(trained), candidates)
        total = each.mean() if config.loss_steps == "all" else each[-1]
        return total, {
            "loss": total,
            model.measure: each[-1],
            f"{model.measure}_first_step": each[0],
            "tokens": tokens,
        }

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        del key
        candidates = model.iterate(params, batch, num_steps or trained)

        def judged(candidate: PyTree) -> dict[str, jax.Array]:
            seen = {} if model.measures is None else model.measures(candidate, batch)
            return {"nll": model.loss(candidate, batch, 0.0), **seen}

        return jax.vmap(judged)(candidates)

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        del key
        candidates = model.iterate(params, batch, thinking.num_steps or trained)
        return jax.tree.map(lambda stacked: stacked[-1], candidates)

    return Objective(model.init, loss, evaluate, predict, measure=model.measure)
