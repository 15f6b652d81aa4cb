"""Text as a space to predict in: a candidate is a distribution over the vocabulary.

The stored candidate z `[batch, seq, vocab]` holds logits, energies are taken at
p = softmax(z), and a prediction is scored by the cross-entropy of log_softmax(z).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Batch, Categorical, EnergyModel, FeedForward
from ebt_jax.models import causal, ends, streams
from ebt_jax.models.cache import caching
from ebt_jax.models.config import ModelConfig
from ebt_jax.randomness import normal
from ebt_jax.refine import PyTree


def energy_model(config: ModelConfig) -> EnergyModel:
    """The causal energy network over tokens."""

    def initial_candidate(key: jax.Array, batch: Batch) -> jax.Array:
        shape = (*batch["tokens"].shape, config.vocab_size)
        return normal(key, shape, jnp.float32)

    def target(batch: Batch) -> jax.Array:
        return jax.nn.one_hot(batch["targets"], config.vocab_size)

    return EnergyModel(
        init=functools.partial(causal.init, config),
        encode_context=functools.partial(causal.encode_context, config),
        energy=functools.partial(causal.energy, config),
        initial_candidate=initial_candidate,
        normalize=jax.nn.softmax,
        loss=cross_entropy,
        target=target,
        categorical=_categorical(config),
        caching=caching(config),
        guess=(
            functools.partial(causal.first_guess, config)
            if config.candidate_input == "final"
            else None
        ),
    )


def _categorical(config: ModelConfig) -> Categorical:
    depends = streams.depends_on_landscape(config)

    def encode(
        params: PyTree, embedded: jax.Array, batch: Batch, landscape: jax.Array
    ) -> PyTree:
        which = landscape if depends else None
        return causal.encode_embedded(config, params, embedded, batch, which)

    def energy(
        params: PyTree,
        past: PyTree,
        batch: Batch,
        index: jax.Array,
        x: jax.Array,
        landscape: jax.Array,
    ) -> jax.Array:
        past, anchor = past
        x = x if anchor is None else x + anchor[:, index]
        places = causal.candidate_places(config, batch, index)
        return causal.energy_of_embedded(config, params, past, places, x, landscape)

    return Categorical(
        tables=("embed",) if config.tied_embedding else ("embed", "candidate_embed"),
        table=functools.partial(ends.candidate_table, config),
        prepare=functools.partial(streams.with_blocks_apart, config),
        token_table=lambda params: params["embed"]["embedding"],
        dtype=jnp.bfloat16 if config.dtype == "bfloat16" else None,
        encode=encode,
        energy=energy,
        num_contexts=config.num_landscapes if depends else 1,
    )


def transformer_pp(config: ModelConfig) -> FeedForward:
    """Transformer++: the context stream alone, and an output matrix."""
    return FeedForward(
        init=functools.partial(causal.init, config),
        predict=functools.partial(causal.predict, config),
        loss=cross_entropy,
        caching=caching(config),
    )


def cross_entropy(
    logits: jax.Array, batch: Batch, smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """Negative log-likelihood in nats, `[batch, seq]`.

    Args:
      logits: `[batch, seq, vocab]`.
      batch: `targets` `[batch, seq]`.
      smoothing: mass that is spread evenly over the vocabulary.
    """
    log_prob = jax.nn.log_softmax(logits)
    index = batch["targets"][..., None]
    nll = -jnp.take_along_axis(log_prob, index, axis=-1)[..., 0]
    if isinstance(smoothing, float) and smoothing == 0:
        return nll
    return (1 - smoothing) * nll - smoothing * log_prob.mean(axis=-1)
