"""Images as a space to predict in: a candidate is the image itself.

Stored candidate and energy space are the same, `[batch, side, side, channels]`, pixels
in [-1, 1] or latents. A prediction is scored by the smooth L1 distance from the image.
Where images are noised by less than the whole schedule, refinement may start from the
noised one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebt_jax.diffusion import make_process, mean_of_each, q_sample
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.interfaces import Batch, Denoiser, EnergyModel
from ebt_jax.models import bidirectional
from ebt_jax.models.config import ModelConfig
from ebt_jax.randomness import any_below, fold_in, normal
from ebt_jax.refine import PyTree

MEASURE = "smooth_l1"


def energy_model(config: ModelConfig, diffusion: DiffusionConfig) -> EnergyModel:
    """The bidirectional energy network over images."""

    def encode_context(params: PyTree, batch: Batch) -> PyTree:
        condition = bidirectional.condition(config, params, batch)
        assert condition is not None  # an energy network always has one
        return bidirectional.modulations(config, params, condition)

    def energy(
        params: PyTree, context: PyTree, candidate: jax.Array, landscape: jax.Array
    ) -> jax.Array:
        del landscape  # there is one
        return bidirectional.energy_map(config, params, context, candidate).mean(-1)

    def initial_candidate(key: jax.Array, batch: Batch) -> jax.Array:
        return normal(key, (len(batch["weights"]), *image_shape(config)), jnp.float32)

    return EnergyModel(
        init=functools.partial(bidirectional.init, config),
        encode_context=encode_context,
        energy=energy,
        initial_candidate=initial_candidate,
        normalize=lambda candidate: candidate,
        loss=smooth_l1,
        target=lambda batch: batch["image"],
        measure=MEASURE,
        measures=distances,
        starts={"noised": lambda batch: batch["noised"]},
        corrupt=noising(config, diffusion),
    )


def dit(config: ModelConfig, diffusion: DiffusionConfig) -> Denoiser:
    """DiT, which predicts the noise in an image and a variance."""
    captions = config.condition == "caption"
    dropped = captions and diffusion.caption_dropout > 0

    def condition(params: PyTree, batch: Batch) -> jax.Array | None:
        return bidirectional.condition(config, params, batch)

    def predict(
        params: PyTree,
        condition: jax.Array | None,
        noised: jax.Array,
        timestep: jax.Array,
    ) -> jax.Array:
        timed = bidirectional.timed(config, params, timestep, condition)
        modulation = bidirectional.modulations(config, params, timed)
        return bidirectional.noise_and_variance(config, params, modulation, noised)

    return Denoiser(
        init=functools.partial(bidirectional.init, config, null_caption=dropped),
        condition=condition,
        unconditional=(lambda params: params["condition"]["embedding"])
        if dropped
        else None,
        predict=predict,
        loss=smooth_l1,
        measure=MEASURE,
        measures=distances,
        corrupt=noising(config, diffusion),
    )


def features(
    config: ModelConfig, params: PyTree, batch: Batch, image: jax.Array
) -> jax.Array:
    """What a model makes of the patches of clean images, `[batch, patches, dim]`.

    Those after the last block; for DiT at timestep 0.

    Args:
      config: the model's.
      params: its parameters.
      batch: `caption` `[batch, condition_size]` where captions are the condition.
      image: `[batch, side, side, channels]`.
    """
    condition = bidirectional.condition(config, params, batch)
    if config.kind == "dit":
        start = jnp.zeros(1, jnp.int32)
        condition = bidirectional.timed(config, params, start, condition)
    assert condition is not None  # an energy network always has one
    modulation = bidirectional.modulations(config, params, condition)
    return bidirectional.hidden_patches(config, params, modulation, image)


def energy_map(
    config: ModelConfig, params: PyTree, batch: Batch, image: jax.Array
) -> jax.Array:
    """Energies `[batch, rows, columns]` of the patches of images, whose mean is theirs.

    Arguments are those of `features`.
    """
    condition = bidirectional.condition(config, params, batch)
    assert condition is not None  # an energy network always has one
    modulation = bidirectional.modulations(config, params, condition)
    energies = bidirectional.energy_map(config, params, modulation, image)
    side = config.image_size // config.patch
    return energies.reshape(-1, side, side)


def noising(
    config: ModelConfig, diffusion: DiffusionConfig
) -> Callable[[jax.Array, Batch, bool], Batch]:
    """How a batch gets its `noised` images, where it does not bring them.

    Returns:
      `(keys [batch], batch, training) -> batch`. Images are noised up to the last of
      `noised_steps`, in training with `random_level` up to any of them; by the whole
      schedule there is nothing but noise, and no image is needed.
    """
    process = make_process(diffusion.schedule, diffusion.timesteps)

    def corrupt(keys: jax.Array, batch: Batch, training: bool) -> Batch:
        if "noised" in batch:
            return batch
        noise = normal(fold_in(keys, 0), (len(keys), *image_shape(config)), jnp.float32)
        steps = jnp.full(keys.shape, diffusion.noised_steps - 1)
        if training and diffusion.random_level:
            steps = any_below(fold_in(keys, 1), diffusion.noised_steps)
        elif diffusion.noised_steps == diffusion.timesteps:
            return {**batch, "noised": noise}
        return {**batch, "noised": q_sample(process, batch["image"], steps, noise)}

    return corrupt


def smooth_l1(
    candidate: jax.Array, batch: Batch, smoothing: float | jax.Array = 0.0
) -> jax.Array:
    """Smooth L1 distance from the image, `[batch]`, a mean over its numbers.

    Half the square of differences up to 1, beyond that their size less a half.

    Args:
      candidate: `[batch, side, side, channels]`.
      batch: `image`, like candidate.
      smoothing: of labels, of which images have none.
    """
    del smoothing
    size = jnp.abs(candidate - batch["image"])
    return mean_of_each(jnp.where(size < 1, 0.5 * size * size, size - 0.5))


def distances(candidate: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Squared and absolute differences from the image, `[batch]`, means."""
    difference = candidate - batch["image"]
    return {
        "mse": mean_of_each(jnp.square(difference)),
        "l1": mean_of_each(jnp.abs(difference)),
    }


def image_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Side, side and channels."""
    return config.image_size, config.image_size, config.channels
