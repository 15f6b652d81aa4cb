"""What an objective is told: how to refine and from where, what to learn and score."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ebt_jax.refine_config import RefineConfig

MIN_STEP_SIZE = 1e-4  # learnt step sizes are kept at or above this (published code)
# What refinement starts from: the frame before, the noised image, and what the context
# alone suggests are the last three.
STARTS = ("noise", "zeros", "most_recent", "noised", "amortised")


@dataclasses.dataclass(frozen=True)
class RefineSetup(RefineConfig):
    """A refinement together with what it starts from and what of it is learnt."""

    step_size: float = 5.0  # initial step size (alpha)
    step_size_learnable: bool = True  # False: stays as it is
    noise_learnable: bool = False  # True: noise_std is the initial value of a parameter
    initial_candidate: str = "noise"  # noise | zeros | most_recent | noised | amortised
    initial_scale: float = 1.0  # standard deviation of the initial noise
    block: int = 0  # predictions trained on at a time; 0: 512 on a CPU, else all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step_size >= MIN_STEP_SIZE:
            raise ValueError(
                f"step_size is {self.step_size}, but has to be at least {MIN_STEP_SIZE}"
            )
        if self.initial_candidate not in STARTS:
            raise ValueError(
                f"initial_candidate is {self.initial_candidate!r}, but has to be one "
                f"of {', '.join(STARTS)}"
            )
        if not self.initial_scale >= 0:
            raise ValueError(
                f"initial_scale is {self.initial_scale}, but cannot be negative"
            )
        if self.block < 0:
            raise ValueError(
                f"block is {self.block}, but has to be positive, or 0 for the default"
            )
        if self.noise_learnable and not self.noise_std:
            raise ValueError(
                "noise_learnable is True, but noise_std is 0; give its initial value"
            )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What of a refinement is scored, and how."""

    loss_steps: str = "all"  # all: mean over steps | last | rising: weights 1, 2, 3 ...
    reconstruction_weight: float = 1.0  # weight of the refined candidate's loss
    label_smoothing: float = 0.0  # at the first step; falls to 0 at the last
    contrastive_weight: float = 0.0  # weight of E(target) against E(candidate)

    def __post_init__(self) -> None:
        if self.loss_steps not in ("all", "last", "rising"):
            raise ValueError(
                f"loss_steps is {self.loss_steps!r}, but has to be one of all, last, "
                "rising"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but has to be in [0, 1)"
            )


def system_2(
    step_size: float, noise_std: float, num_steps: int = 3
) -> tuple[RefineSetup, ObjectiveConfig]:
    """The published System 2; its replay buffer is `replay.ReplayConfig`.

    It is for thinking longer than in training: one landscape, and all steps lead to a
    last one, which alone is scored and has its inner gradient differentiated.

    Args:
      step_size: fixed; drawn for each prediction from [step_size / 2, 2 step_size].
      noise_std: of Langevin noise.
      num_steps: the most; one less is as likely.
    """
    refine = RefineSetup(
        num_steps=num_steps,
        min_steps=max(num_steps - 1, 1),
        num_landscapes=1,
        backprop="truncated",
        noise_std=noise_std,
        step_size_jitter=2.0,
        step_size=step_size,
        step_size_learnable=False,
    )
    return refine, ObjectiveConfig(loss_steps="last")


def step_weight(
    config: ObjectiveConfig, index: ArrayLike, length: ArrayLike
) -> jax.Array:
    """What the loss after step i of N weighs; the weights of all steps sum to 1.

    Args:
      config: `loss_steps`.
      index: i, counted from 0; an array of them gives an array.
      length: N.
    """
    i, n = jnp.asarray(index), jnp.asarray(length)
    if config.loss_steps == "last":
        return jnp.where(i == n - 1, 1.0, 0.0)
    if config.loss_steps == "all":
        return jnp.where(i < n, 1.0 / n, 0.0)
    return jnp.where(i < n, 2 * (i + 1) / (n * (n + 1)), 0.0)


def total_loss(
    config: ObjectiveConfig, losses: jax.Array, length: ArrayLike
) -> jax.Array:
    """What the losses `[num_steps]` after each step, of which N count, come to."""
    return jnp.vdot(losses, step_weight(config, jnp.arange(len(losses)), length))


def falling(start: float, index: ArrayLike, length: ArrayLike) -> ArrayLike:
    """Label smoothing: start (N-1-i) / (N-1) at step i of N, and 0 where N is 1."""
    if not start:
        return 0.0
    span = jnp.maximum(jnp.asarray(length) - 1, 1)
    return start * jnp.maximum(length - 1 - jnp.asarray(index), 0) / span
