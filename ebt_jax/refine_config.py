"""What a refinement is told: how to step, how often, in which landscapes."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RefineConfig:
    """How a candidate is refined. Static: part of the compiled program."""

    num_steps: int = 2  # refinement steps; the most, where min_steps is set
    min_steps: int = 0  # fewest steps where their number is drawn; 0: always num_steps
    num_landscapes: int = 1  # energy landscapes; step i uses landscape i
    final_landscape_only: bool = True  # extra steps: in the last one, or in each
    backprop: str = "per_step"  # per_step | truncated | full: see refine.py
    meta_gradient: str = "rule"  # rule | autodiff: see meta_gradient.py
    normalize_steps: str = "all"  # all | first (landscape 0 only) | none
    noise_std: float = 0.0  # Langevin noise, std; of video added to embeddings
    step_size_jitter: float = 1.0  # s: step sizes drawn from U[a/s, a*s] per prediction
    unit_gradient: bool = False  # True: inner gradients are divided by their norm
    gradient_clamp: float = 0.0  # largest |step_size * gradient entry|; 0: no clamp
    absolute_clamp: float = 0.0  # largest |candidate entry| after a step; 0: no clamp
    sharpen: float = 0.0  # divides the candidate by this after a step; 0: does not

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        require(
            0 <= self.min_steps <= self.num_steps,
            "min_steps",
            self.min_steps,
            f"between 0 and num_steps ({self.num_steps})",
        )
        require(
            1 <= self.num_landscapes,
            "num_landscapes",
            self.num_landscapes,
            "at least 1",
        )
        for name, choices in (
            ("backprop", ("per_step", "truncated", "full")),
            ("meta_gradient", ("rule", "autodiff")),
            ("normalize_steps", ("all", "first", "none")),
        ):
            value = getattr(self, name)
            require(value in choices, name, value, f"one of {', '.join(choices)}")
        for name in ("noise_std", "gradient_clamp", "absolute_clamp", "sharpen"):
            value = getattr(self, name)
            require(value >= 0, name, value, "zero or positive")
        require(
            self.step_size_jitter >= 1,
            "step_size_jitter",
            self.step_size_jitter,
            "at least 1 (1 draws nothing)",
        )
        if not self.final_landscape_only:
            for name in ("num_steps", "min_steps"):
                value = getattr(self, name)
                require(
                    value % self.num_landscapes == 0,
                    name,
                    value,
                    f"a multiple of num_landscapes ({self.num_landscapes}) when "
                    "final_landscape_only is False",
                )


class Schedule(NamedTuple):
    """Which landscape each refinement step uses, and how many steps are taken.

    Attributes:
      landscape: int32 `[num_steps]`, the landscape of each step.
      length: how many of them are taken: a Python int, or an int32 scalar where the
        number is drawn; the compiled program is the same for every draw.
    """

    landscape: jax.Array
    length: int | jax.Array


def make_schedule(config: RefineConfig, key: jax.Array | None = None) -> Schedule:
    """The landscapes of the refinement steps.

    Without a key the schedule is the one used in evaluation: the most steps, extra
    steps in the last landscape. With a key, and where `min_steps` is set, the number
    of steps is drawn uniformly, from [min_steps, num_steps] where extra steps go to
    the last landscape, otherwise for each landscape from its equal share of both.

    Args:
      config: `num_steps`, `min_steps`, `num_landscapes`, `final_landscape_only`.
      key: a PRNG key, or None.
    """
    last = config.num_landscapes - 1
    if config.final_landscape_only:
        landscape = jnp.minimum(jnp.arange(config.num_steps), last)
        if key is None or not config.min_steps:
            return Schedule(landscape, config.num_steps)
        length = jax.random.randint(key, (), config.min_steps, config.num_steps + 1)
        return Schedule(landscape, length)
    most = config.num_steps // config.num_landscapes
    if key is None or not config.min_steps:
        if config.min_steps:
            landscape = jnp.minimum(jnp.arange(config.num_steps), last)
            return Schedule(landscape, last + most)
        return Schedule(jnp.arange(config.num_steps) // most, config.num_steps)
    fewest = config.min_steps // config.num_landscapes
    repeats = jax.random.randint(key, (config.num_landscapes,), fewest, most + 1)
    ends = jnp.cumsum(repeats)
    landscape = jnp.searchsorted(ends, jnp.arange(config.num_steps), side="right")
    return Schedule(jnp.minimum(landscape, last).astype(jnp.int32), ends[-1])


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """Raises a ValueError that names the value and the rule, if not `condition`."""
    if not condition:
        raise ValueError(f"{name} is {value!r}, but has to be {rule}")
