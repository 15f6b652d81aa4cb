"""Models together: sums of energies, means of predictions, one after the other.

The energy of a sum is low where all its terms are: a product of experts. A negative
weight takes away what a model wants. All have to predict in the same space, for text
with the same vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax.errors import UserError
from ebt_jax.interfaces import Batch, Caching, EnergyModel, Metrics, Objective
from ebt_jax.refine import EnergyFn, Perturbing, PyTree
from ebt_jax.thinking import Thinking


def compose(energy_fns: Sequence[EnergyFn], weights: Sequence[float]) -> EnergyFn:
    """The weighted sum of energies of one candidate.

    Args:
      energy_fns: what is summed up.
      weights: one for each; a negative one takes an energy away.

    Returns:
      An energy whose params and context are sequences, one entry for each.

    Raises:
      UserError: if there is none, or not one weight for each.
    """
    if not energy_fns or len(energy_fns) != len(weights):
        raise UserError(
            f"there are {len(energy_fns)} energies and {len(weights)} weights, but "
            "there has to be one weight for each, and at least one"
        )

    def energy(
        params: PyTree, context: PyTree, candidate: PyTree, landscape: jax.Array
    ) -> jax.Array:
        terms = zip(weights, energy_fns, params, context, strict=True)
        total, *others = (w * of(p, x, candidate, landscape) for w, of, p, x in terms)
        return sum(others, total)

    return energy


def compose_models(
    models: Sequence[EnergyModel], weights: Sequence[float]
) -> EnergyModel:
    """Models whose energies are summed up, as one.

    Its parameters are `{"members": [those of each model]}`. Initial candidates, the
    energy space and the loss are the first one's. All need the same number of
    landscapes.

    Raises:
      UserError: as `compose`, and when used, if they predict in different spaces.
    """
    energy = compose([model.energy for model in models], weights)
    first = models[0]

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(models))
        return {
            "members": [
                model.init(key) for model, key in zip(models, keys, strict=True)
            ]
        }

    def encode_context(params: PyTree, batch: Batch) -> PyTree:
        pairs = zip(models, params["members"], strict=True)
        return [model.encode_context(p, batch) for model, p in pairs]

    def initial_candidate(key: jax.Array, batch: Batch) -> PyTree:
        check_same_space(models, batch)
        return first.initial_candidate(key, batch)

    cachings = [model.caching for model in models if model.caching is not None]
    return first._replace(
        init=init,
        encode_context=encode_context,
        energy=lambda params, *others: energy(params["members"], *others),
        initial_candidate=initial_candidate,
        caching=_together(cachings) if len(cachings) == len(models) else None,
        categorical=None,
        perturbing=_perturbing_each([model.perturbing for model in models]),
    )


def hybrid(model: EnergyModel, start: Callable[[Batch], PyTree]) -> EnergyModel:
    """A model that refines what another predicts, instead of noise.

    With the energy of a feed-forward model's logits z, refinement starts from its
    prediction softmax(z). Nothing is drawn, so all of several candidates are the same.

    Args:
      model: what refines; it has to be told to start from noise of scale 1.
      start: `(batch) -> candidate`, such as `lambda b: baseline.predict(params, b)`.
    """
    return model._replace(
        initial_candidate=lambda key, batch: start(batch), caching=None
    )


def ensemble(objectives: Sequence[Objective], weights: Sequence[float]) -> Objective:
    """Predicts the weighted mean of what several text models predict.

    Of energy models, feed-forward ones, or both. Its parameters are
    `{"members": [those of each]}`; a candidate is the logarithm of the mean of their
    probabilities `[batch, seq, vocab]`. To evaluate, not to train.

    Args:
      objectives: of the models, of one vocabulary.
      weights: one for each, positive; they are divided by their sum.

    Raises:
      UserError: for no model, or weights that are not one for each, or not positive.
    """
    if not objectives or len(objectives) != len(weights) or min(weights) <= 0:
        raise UserError(
            f"there are {len(objectives)} models and weights {list(weights)}, but "
            "there has to be one positive weight for each, and at least one"
        )

    def init(key: jax.Array) -> PyTree:
        keys = jax.random.split(key, len(objectives))
        pairs = zip(objectives, keys, strict=True)
        return {"members": [objective.init(key) for objective, key in pairs]}

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        logs = []
        for objective, own, weight in zip(
            objectives, params["members"], weights, strict=True
        ):
            logits = objective.predict(own, batch, key, thinking)
            share = jnp.log(weight / sum(weights))
            logs.append(jax.nn.log_softmax(logits) + share)
        shapes = [log.shape for log in logs]
        if len(set(shapes)) > 1:
            raise UserError(
                f"the models predict {', '.join(map(str, shapes))}; an ensemble needs "
                "models of one vocabulary"
            )
        return jax.nn.logsumexp(jnp.stack(logs), axis=0)

    def assess(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> dict[str, jax.Array]:
        log_prob = predict(params, batch, key, thinking)
        index = batch["targets"][..., None]
        return {"nll": -jnp.take_along_axis(log_prob, index, axis=-1)[None, ..., 0]}

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        return assess(params, batch, key, Thinking(num_steps))

    def loss(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        weighted = assess(params, batch, key, Thinking())["nll"][0] * batch["weights"]
        tokens = batch["weights"].sum()
        mean = weighted.sum() / jnp.maximum(tokens, 1.0)
        return mean, {"loss": mean, "nll": mean, "tokens": tokens}

    return Objective(init, loss, evaluate, predict, assess=assess)


def check_same_space(models: Sequence[EnergyModel], batch: Batch) -> None:
    """Refuses models whose candidates for a batch have different shapes.

    Raises:
      UserError: naming both shapes.
    """
    key = jax.random.key(0)
    shapes = [
        jax.tree.map(
            lambda leaf: leaf.shape,
            jax.eval_shape(functools.partial(model.initial_candidate, key), batch),
        )
        for model in models
    ]
    for number, shape in enumerate(shapes[1:], 2):
        if shape != shapes[0]:
            raise UserError(
                f"model 1 predicts candidates {shapes[0]}, but model {number} "
                f"{shape}; compose models of one vocabulary"
            )


def _perturbing_each(perturbings: Sequence[Perturbing | None]) -> Perturbing | None:
    """Noise of its own for each model, where all take it so."""
    each = [perturbing for perturbing in perturbings if perturbing is not None]
    if len(each) < len(perturbings):
        return None

    def into(context: PyTree, noise: PyTree) -> PyTree:
        triples = zip(each, context, noise, strict=True)
        return [perturbing.into(of, n) for perturbing, of, n in triples]

    return Perturbing(lambda z: [perturbing.like(z) for perturbing in each], into)


def _together(cachings: Sequence[Caching]) -> Caching:
    """The caches of several models, one beside the other."""

    def each(name: str) -> Callable[..., list[Any]]:
        functions = [getattr(caching, name) for caching in cachings]

        def call(params: PyTree, *caches: Any) -> list[Any]:
            pairs = zip(functions, params["members"], *caches, strict=True)
            return [function(*arguments) for function, *arguments in pairs]

        return call

    def prepare(params: PyTree) -> PyTree:
        return {**params, "members": each("prepare")(params)}

    def prefill(params: PyTree, tokens: jax.Array, lengths: jax.Array) -> PyTree:
        same = len(cachings)
        return each("prefill")(params, [tokens] * same, [lengths] * same)

    def append(params: PyTree, cache: PyTree, tokens: jax.Array) -> PyTree:
        return each("append")(params, cache, [tokens] * len(cachings))

    return Caching(
        prepare=prepare,
        prefill=prefill,
        append=append,
        following=each("following"),
        length=lambda cache: cachings[0].length(cache[0]),
        newest=lambda cache: cachings[0].newest(cache[0]),
    )
