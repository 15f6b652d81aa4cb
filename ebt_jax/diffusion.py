"""Noising images, and diffusion models that take the noise out again.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    abar_t = prod(1 - beta_s, s <= t)

(Ho et al. 2020, arXiv 2006.11239). A model predicts eps, and with it, between two
bounds, the variance of a step back (Nichol & Dhariwal 2021, arXiv 2102.09672), trained
by the squared error of eps and the variational bound. DDPM goes back step by step with
that variance, DDIM (Song et al. 2021, arXiv 2010.02502) without noise; both may leave
steps out. Nothing here knows of a network. Arrays are `[batch, ...]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.randomness import fold_in, normal

MAX_BETA = 0.999
LEVELS = 255  # steps between the levels that a pixel has, -1 to 1

# (noised [batch, ...], timestep [1]) -> [batch, ..., 2 channels]: the noise, and where
# the logarithm of the variance lies between its bounds, -1 to 1.
Predict = Callable[[jax.Array, jax.Array], jax.Array]


class Process(NamedTuple):
    """A noise schedule, float64 on the host, `[steps]`.

    Attributes:
      beta: variance that a step adds.
      kept: abar, the share of the image's variance that is left after a step.
      before: abar before it.
      timestep: what a model calls a step; not 0, 1, 2, ... where some are left out.
    """

    beta: np.ndarray
    kept: np.ndarray
    before: np.ndarray
    timestep: np.ndarray

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.beta)

    @property
    def variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0)."""
        return self.beta * (1 - self.before) / (1 - self.kept)

    @property
    def log_variance_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of the least and the most variance of a step back.

        The first step's least is 0 and that of the second taken for it, if there is
        one.
        """
        least = self.variance
        least = np.append(least[1:2] if self.steps > 1 else self.beta, least[1:])
        return np.log(least), np.log(self.beta)


def make_process(schedule: str, timesteps: int) -> Process:
    """A whole schedule.

    Args:
      schedule: `linear`, beta from 1e-4 to 0.02 over 1000 timesteps, and in proportion
        more of fewer; or `cosine`, abar = cos(pi / 2 (t + 0.008) / 1.008)^2.
      timesteps: how many.

    Raises:
      ValueError: for another schedule.
    """
    if schedule == "linear":
        beta = np.linspace(1e-4, 0.02, timesteps) * 1000 / timesteps
    elif schedule == "cosine":
        time = np.arange(timesteps + 1) / timesteps
        kept = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = 1 - kept[1:] / kept[:-1]
    else:
        raise ValueError(f"schedule is {schedule!r}, but has to be linear or cosine")
    beta = np.minimum(beta, MAX_BETA)
    kept = np.cumprod(1 - beta)
    return Process(beta, kept, np.append(1.0, kept[:-1]), np.arange(timesteps))


def spaced(process: Process, noised_steps: int, passes: int) -> Process:
    """A process of fewer steps, from the same noised image to the same clean one.

    Args:
      process: a whole schedule.
      noised_steps: steps that an image is noised by.
      passes: how many of them are left, evenly spaced, the last one among them.

    Raises:
      ValueError: if there are not so many.
    """
    if not 1 <= passes <= noised_steps <= process.steps:
        raise ValueError(
            f"passes is {passes}, but images are noised by {noised_steps} steps of "
            f"{process.steps}; give at least 1 and at most all of them"
        )
    last = noised_steps - 1
    used = np.round(np.linspace(last if passes == 1 else 0, last, passes)).astype(int)
    kept = process.kept[used]
    before = np.append(1.0, kept[:-1])
    return Process(1 - kept / before, kept, before, process.timestep[used])


def q_sample(
    process: Process, image: jax.Array, step: jax.Array, noise: jax.Array
) -> jax.Array:
    """Images noised up to a step.

    Args:
      process: the schedule.
      image: `[batch, ...]`.
      step: integers `[batch]`.
      noise: standard normals like image.
    """
    kept = _at(process.kept, step, image)
    return jnp.sqrt(kept) * image + jnp.sqrt(1 - kept) * noise


def losses(
    process: Process,
    output: jax.Array,
    image: jax.Array,
    noised: jax.Array,
    step: jax.Array,
    noise: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Squared error of the noise, and the variational bound.

    Args:
      process: the schedule.
      output: of the model, `[batch, ..., 2 channels]`.
      image: `[batch, ..., channels]`.
      noised: of `q_sample`.
      step: integers `[batch]`.
      noise: standard normals that are in it.

    Returns:
      `[batch]` each, means over an image: the squared error, and the bound in bits per
      number, whose gradient is that of the variance alone. It is KL(q(x_{t-1} | x_t,
      x_0) || p(x_{t-1} | x_t)), or at the first step the negative log-likelihood of
      the pixel's level.
    """
    predicted, between = jnp.split(output, 2, axis=-1)
    squared = jnp.square(predicted - noise)
    clean = clean_image(process, jax.lax.stop_gradient(predicted), noised, step)
    mean = posterior_mean(process, clean, noised, step)
    log_variance = learnt_log_variance(process, between, step)
    true_mean = posterior_mean(process, image, noised, step)
    true = _at(process.log_variance_bounds[0], step, image)
    divergence = 0.5 * (
        log_variance
        - true
        - 1
        + jnp.exp(true - log_variance)
        + jnp.square(true_mean - mean) * jnp.exp(-log_variance)
    )
    surprise = -level_log_likelihood(image, mean, 0.5 * log_variance)
    bound = jnp.where(_like(step, image) == 0, surprise, divergence)
    return mean_of_each(squared), mean_of_each(bound) / math.log(2)


def clean_image(
    process: Process, noise: jax.Array, noised: jax.Array, step: jax.Array
) -> jax.Array:
    """x_0 by a prediction of the noise."""
    kept = _at(process.kept, step, noised)
    return (noised - jnp.sqrt(1 - kept) * noise) / jnp.sqrt(kept)


def noise_in(
    process: Process, clean: jax.Array, noised: jax.Array, step: jax.Array
) -> jax.Array:
    """The noise that leads from x_0 to x_t."""
    kept = _at(process.kept, step, noised)
    return (noised - jnp.sqrt(kept) * clean) / jnp.sqrt(1 - kept)


def posterior_mean(
    process: Process, clean: jax.Array, noised: jax.Array, step: jax.Array
) -> jax.Array:
    """Mean of q(x_{t-1} | x_t, x_0)."""
    beta, kept, before = process.beta, process.kept, process.before
    of_clean = _at(beta * np.sqrt(before) / (1 - kept), step, clean)
    of_noised = _at((1 - before) * np.sqrt(1 - beta) / (1 - kept), step, clean)
    return of_clean * clean + of_noised * noised


def learnt_log_variance(
    process: Process, between: jax.Array, step: jax.Array
) -> jax.Array:
    """Logarithm of a step's variance, by where it lies between its bounds, -1 to 1."""
    least, most = (_at(bound, step, between) for bound in process.log_variance_bounds)
    share = (between + 1) / 2
    return share * most + (1 - share) * least


def level_log_likelihood(
    image: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
    """Logarithm of a normal distribution's mass around a pixel's level."""
    centered, inverse = image - mean, jnp.exp(-log_scale)
    above = _normal_cdf(inverse * (centered + 1 / LEVELS))
    below = _normal_cdf(inverse * (centered - 1 / LEVELS))
    mass = jnp.where(image < -0.999, above, above - below)
    mass = jnp.where(image > 0.999, 1 - below, mass)
    return jnp.log(jnp.maximum(mass, 1e-12))


def denoise(
    process: Process,
    predict: Predict,
    noised: jax.Array,
    keys: jax.Array | None = None,
    clip: bool = False,
) -> jax.Array:
    """Goes all the way back, from the last step of a process.

    Args:
      process: of as many steps as there are to be passes, see `spaced`.
      predict: the model.
      noised: `[batch, ...]`, images that stand at its last step.
      keys: `[batch]` for DDPM; None for DDIM, which draws nothing.
      clip: whether predictions of the clean image are kept in [-1, 1].
    """

    def back(image: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        steps = step[None]
        output = predict(image, jnp.asarray(process.timestep)[steps])
        noise, between = jnp.split(output, 2, axis=-1)
        clean = clean_image(process, noise, image, steps)
        if clip:
            clean = jnp.clip(clean, -1, 1)
            noise = noise_in(process, clean, image, steps)
        if keys is None:
            before = _at(process.before, steps, image)
            return jnp.sqrt(before) * clean + jnp.sqrt(1 - before) * noise, None
        mean = posterior_mean(process, clean, image, steps)
        log_variance = learnt_log_variance(process, between, steps)
        drawn = normal(fold_in(keys, step), image.shape, image.dtype)
        drawn = jnp.where(step > 0, drawn, 0)
        return mean + jnp.exp(0.5 * log_variance) * drawn, None

    return jax.lax.scan(back, noised, jnp.arange(process.steps)[::-1])[0]


def mean_of_each(values: jax.Array) -> jax.Array:
    """Means `[batch]` over all axes but the first."""
    return values.mean(axis=tuple(range(1, values.ndim)))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The usual approximation by tanh."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _at(table: np.ndarray, step: jax.Array, image: jax.Array) -> jax.Array:
    """Entries of a table, that multiply images."""
    return _like(jnp.asarray(table, image.dtype)[step], image)


def _like(values: jax.Array, image: jax.Array) -> jax.Array:
    return values.reshape(-1, *(1 for _ in image.shape[1:]))
