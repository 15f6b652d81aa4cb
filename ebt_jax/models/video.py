"""Video as a space to predict in: a candidate is a frame.

A frame is a vector `[frame_size]`: pixels, or what an encoder makes of them. The stored
candidate is the frame itself, so nothing is normalised, and a prediction is scored by
smooth L1 against the next frame. Frames and candidates are embedded by one projection;
Langevin noise is added to embedded candidates, inside the energy (published code).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Batch, EnergyModel, FeedForward
from ebt_jax.models import causal
from ebt_jax.models.cache import caching
from ebt_jax.models.config import ModelConfig
from ebt_jax.randomness import normal
from ebt_jax.refine import Perturbing


def energy_model(config: ModelConfig) -> EnergyModel:
    """The causal energy network over frames.

    Its batches hold `frames` and `targets`, the frames after those, both float32
    `[batch, seq, frame_size]`.
    """

    def initial_candidate(key: jax.Array, batch: Batch) -> jax.Array:
        return normal(key, batch["frames"].shape, jnp.float32)

    def embedded(candidate: jax.Array) -> jax.Array:
        return jnp.zeros((*candidate.shape[:-1], config.width), candidate.dtype)

    def into(context: causal.Context, noise: jax.Array) -> causal.Context:
        return context._replace(noise=noise)

    return EnergyModel(
        init=functools.partial(causal.init, config),
        encode_context=functools.partial(causal.encode_context, config),
        energy=functools.partial(causal.energy, config),
        initial_candidate=initial_candidate,
        normalize=lambda candidate: candidate,
        loss=smooth_l1,
        target=lambda batch: batch["targets"],
        caching=caching(config),
        measure="smooth_l1",
        measures=squared,
        starts={"most_recent": lambda batch: batch["frames"]},
        perturbing=Perturbing(embedded, into),
    )


def transformer_pp(config: ModelConfig) -> FeedForward:
    """Transformer++ over frames: the context stream alone, and a way back to frames."""
    return FeedForward(
        init=functools.partial(causal.init, config),
        predict=functools.partial(causal.predict, config),
        loss=smooth_l1,
        caching=caching(config),
        measure="smooth_l1",
        measures=squared,
    )


def smooth_l1(
    frames: jax.Array, batch: Batch, smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """Mean over a frame of d^2 / 2 where |d| < 1, else |d| - 1/2: `[batch, seq]`.

    Args:
      frames: `[batch, seq, frame_size]`.
      batch: `targets` of the same shape; d is the difference.
      smoothing: 0, as objectives see to it: frames are no distributions.
    """
    del smoothing
    distance = jnp.abs(frames - batch["targets"])
    each = jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5)
    return each.mean(axis=-1)


def squared(frames: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Mean squared errors of frames, `[batch, seq]`."""
    return {"mse": jnp.square(frames - batch["targets"]).mean(axis=-1)}
