"""The loss of a diffusion model, and prediction by its sampler.

A batch is what an energy model over images is given, and it is noised alike, so that
the two can be compared image by image: `evaluate` and `predict` start from the noised
image, or from nothing but noise where the whole schedule is noised by.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ebt_jax.diffusion import (
    Predict,
    denoise,
    losses,
    make_process,
    q_sample,
    spaced,
)
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Batch, Denoiser, Metrics, Objective
from ebt_jax.randomness import any_below, fold_in, normal, prediction_keys, uniform
from ebt_jax.refine import PyTree
from ebt_jax.refined_loss import CORRUPTION, training_keys
from ebt_jax.thinking import Thinking


def denoising(model: Denoiser, config: DiffusionConfig) -> Objective:
    """The loss of a model that predicts noise, at any timestep that images get.

    `evaluate` and `predict` take as many passes as `num_steps` says, in each of
    `repeats` applications; 0 is `sampling_steps`.

    Args:
      model: what predicts.
      config: how images are noised, and noise is taken out.

    Raises:
      UserError: if captions are to be weighed that the model cannot do without.
    """
    if config.guidance != 1 and model.unconditional is None:
        raise UserError(
            f"diffusion.guidance is {config.guidance}, but this model has no captions "
            "to weigh, or was trained with all of them; set it to 1, or train with "
            "model.condition 'caption' and a diffusion.caption_dropout above 0"
        )
    process = make_process(config.schedule, config.timesteps)

    def loss(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        image, keys = batch["image"], training_keys(key, batch)
        step = any_below(fold_in(keys, 0), config.noised_steps)
        noise = normal(fold_in(keys, 1), image.shape, image.dtype)
        condition = model.condition(params, batch)
        if condition is not None and model.unconditional is not None:
            left_out = uniform(fold_in(keys, 2), keys.shape, jnp.float32)
            left_out = left_out < config.caption_dropout
            nothing = model.unconditional(params).astype(condition.dtype)
            condition = jnp.where(left_out[:, None], nothing, condition)
        noised = q_sample(process, image, step, noise)
        output = model.predict(params, condition, noised, step)
        each = losses(process, output, image, noised, step, noise)
        tokens = batch["weights"].sum()
        squared, bound = (
            (values * batch["weights"]).sum() / jnp.maximum(tokens, 1.0)
            for values in each
        )
        total = squared + bound
        return total, {
            "loss": total,
            "noise_mse": squared,
            "bound": bound,
            "tokens": tokens,
        }

    def sampled(
        params: PyTree, batch: Batch, key: jax.Array, passes: int
    ) -> tuple[jax.Array, Batch]:
        """Denoised images, and the batch with the noised ones."""
        passes = passes or config.sampling_steps or config.noised_steps
        if passes > config.noised_steps:
            raise UserError(
                f"{passes} passes are asked for, but images are noised by "
                f"{config.noised_steps} timesteps; give at most those"
            )
        keys = prediction_keys(key, batch["index"], None)
        batch = model.corrupt(fold_in(keys, CORRUPTION), batch, False)
        predict = guided(model, params, model.condition(params, batch), config.guidance)
        some = spaced(process, config.noised_steps, passes)
        image = batch["noised"]
        for repeat in range(config.repeats):
            draws = fold_in(keys, repeat) if config.sampler == "ddpm" else None
            image = denoise(some, predict, image, draws, config.clip)
        return image, batch

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        image, batch = sampled(params, batch, key, num_steps)
        seen = {"nll": model.loss(image, batch), **model.measures(image, batch)}
        return {name: values[None] for name, values in seen.items()}

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        return sampled(params, batch, key, thinking.num_steps)[0]

    return Objective(model.init, loss, evaluate, predict, measure=model.measure)


def guided(
    model: Denoiser, params: PyTree, condition: jax.Array | None, weight: float
) -> Predict:
    """What `diffusion.denoise` calls: the model, with classifier-free guidance.

    With noise eps_c predicted for a caption and eps_0 without, it is
    eps_0 + weight (eps_c - eps_0) (Ho & Salimans 2022, arXiv 2207.12598), at the
    caption's variance.

    Args:
      model: what predicts.
      params: its parameters.
      condition: of `Denoiser.condition`.
      weight: of the caption; 1 leaves everything as it is.
    """

    def plain(image: jax.Array, timestep: jax.Array) -> jax.Array:
        return model.predict(params, condition, image, timestep)

    if weight == 1:
        return plain
    assert condition is not None and model.unconditional is not None
    nothing = model.unconditional(params).astype(condition.dtype)
    both = jnp.concatenate([condition, jnp.broadcast_to(nothing, condition.shape)])

    def weighed(image: jax.Array, timestep: jax.Array) -> jax.Array:
        output = model.predict(params, both, jnp.concatenate([image, image]), timestep)
        told, untold = jnp.split(output, 2)
        noise, variance = jnp.split(told, 2, axis=-1)
        without = jnp.split(untold, 2, axis=-1)[0]
        noise = without + weight * (noise - without)
        return jnp.concatenate([noise, variance], axis=-1)

    return weighed
