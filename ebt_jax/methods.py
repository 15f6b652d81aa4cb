"""Ways of stepping downhill when predicting: what `Thinking.method` is one of.

With c the candidate, g the gradient of its energy E and a the step size:

========= =================================================================
method    a step
========= =================================================================
Descent   c - a g
Annealed  c - a rate^i g at step i, counting from 0
Momentum  c - a m, where m = g + decay m
Adam      c - rate m / (sqrt(v) + eps), bias-corrected means of g and g^2
Langevin  c - a g, with noise as given in place of the trained one
Lower     c - a g where that lowers E; else a smaller step is tried
Mala      c - a g + sqrt(2 a temperature) noise, accepted so that, by many
          steps, candidates are drawn from exp(-E / temperature)
========= =================================================================

The first four add the noise that the model was trained with, if any, before a step. The
last two compare energies, see `accepting.py`, and take no other noise.
"""

from __future__ import annotations

import dataclasses

import optax

from ebt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Descent:
    """As in training."""


@dataclasses.dataclass(frozen=True)
class Annealed:
    """Step sizes that fall."""

    rate: float = 0.9  # ratio of a step size to the one before; above 0

    def __post_init__(self) -> None:
        require("annealed", "rate", self.rate, self.rate > 0, "above 0")


@dataclasses.dataclass(frozen=True)
class Momentum:
    """A sum of gradients, older ones weighing less."""

    decay: float = 0.9  # weight of the sum so far; in [0, 1)

    def __post_init__(self) -> None:
        require("momentum", "decay", self.decay, 0 <= self.decay < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Adam:
    """Every entry of a candidate moves by about the rate."""

    rate: float = 1.0  # in units of the stored candidate, of text logits; above 0
    decay: float = 0.9  # of the mean of gradients; in [0, 1)
    decay_squares: float = 0.999  # of the mean of their squares; in [0, 1)

    def __post_init__(self) -> None:
        require("adam", "rate", self.rate, self.rate > 0, "above 0")
        for name in ("decay", "decay_squares"):
            value = getattr(self, name)
            require("adam", name, value, 0 <= value < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Langevin:
    """Noise before each step."""

    noise: float = 1.0  # its standard deviation; of video in units of embeddings

    def __post_init__(self) -> None:
        require("langevin", "noise", self.noise, self.noise > 0, "above 0")


@dataclasses.dataclass(frozen=True)
class Lower:
    """Steps that do not lower the energy are not taken."""

    shrink: float = 0.5  # the step size is multiplied by it instead; in (0, 1)

    def __post_init__(self) -> None:
        require("lower", "shrink", self.shrink, 0 < self.shrink < 1, "in (0, 1)")


@dataclasses.dataclass(frozen=True)
class Mala:
    """The Metropolis-adjusted Langevin algorithm."""

    temperature: float = 1.0  # in units of the energy; above 0

    def __post_init__(self) -> None:
        require(
            "mala", "temperature", self.temperature, self.temperature > 0, "above 0"
        )


Method = Descent | Annealed | Momentum | Adam | Langevin | Lower | Mala


def transform_of(method: Method) -> optax.GradientTransformation | None:
    """What `refine` has to do to gradients; None for nothing."""
    if isinstance(method, Annealed):
        return optax.scale_by_schedule(lambda count: method.rate**count)
    if isinstance(method, Momentum):
        return optax.trace(method.decay)
    if isinstance(method, Adam):
        return optax.scale_by_adam(method.decay, method.decay_squares)
    return None


def require(method: str, name: str, value: float, condition: bool, rule: str) -> None:
    """Raises a UserError that names the value and the rule, if not `condition`."""
    if not condition:
        raise UserError(f"{name} of {method} is {value}, but has to be {rule}")
