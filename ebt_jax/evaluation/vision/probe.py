"""What features tell about labels: a linear probe, and nearest neighbours.

Features `[examples, size]` are standardised by means and standard deviations of the
training examples, so that nothing depends on their scale. Everything is deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ebt_jax.errors import UserError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # of squared weights; one is chosen
HELD_BACK = 5  # one in so many training examples chooses it
STEPS = 200  # of L-BFGS
NEIGHBOURS = 20
AT_ONCE = 256  # tests that neighbours are searched for together
TEMPERATURE = 0.07  # of the neighbours' votes (Wu et al. 2018)
SMALLEST = 1e-6  # deviation of a feature, by its mean, that still says something


class Probe(NamedTuple):
    """A multinomial logistic regression.

    Attributes:
      mean: `[size]`, subtracted from features.
      scale: `[size]`, which they are then multiplied by.
      weights: `[size, classes]`.
      bias: `[classes]`.
      penalty: of squared weights, that it was fitted with.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    penalty: float


def fit_probe(
    features: ArrayLike,
    labels: ArrayLike,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    steps: int = STEPS,
) -> Probe:
    """Fits a linear classifier by L-BFGS.

    It minimises the mean cross-entropy plus penalty / 2 times the squared weights. Of
    several penalties that is taken which does best on every fifth example, fitted
    without them; then all examples are fitted.

    Args:
      features: `[examples, size]`.
      labels: integers `[examples]`, from 0.
      classes: how many there are.
      penalties: at least one.
      steps: of L-BFGS.

    Raises:
      UserError: for fewer than two classes, or fewer examples than classes.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    if classes < 2 or len(labels) < classes:
        raise UserError(
            f"a probe has {len(labels)} labelled examples of {classes} classes, but "
            "needs two classes and an example of each; give it more labelled pictures"
        )
    mean, scale = _standard(features)
    standard = ((features - mean) * scale).astype(np.float32)
    chosen = penalties[0]
    if len(penalties) > 1:
        held_back = np.arange(len(labels)) % HELD_BACK == HELD_BACK - 1
        kept = (standard[~held_back], labels[~held_back])
        losses = []
        for penalty in penalties:
            fitted = _fit(*kept, jnp.float32(penalty), classes, steps)
            loss = _loss(fitted, standard[held_back], labels[held_back], 0.0)
            losses.append(float(loss))
        chosen = penalties[int(np.argmin(losses))]
    weights, bias = _fit(standard, labels, jnp.float32(chosen), classes, steps)
    return Probe(mean, scale, np.asarray(weights), np.asarray(bias), chosen)


def probe_accuracy(
    probe: Probe, features: ArrayLike, labels: ArrayLike, top: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """How often the right class is among the likeliest.

    Args:
      probe: what classifies.
      features: `[examples, size]`.
      labels: `[examples]`.
      top: how many of the likeliest count; those from all classes on are left out.

    Returns:
      `top_1`, `top_5`, ..., shares of the examples.
    """
    standard = (np.asarray(features) - probe.mean) * probe.scale
    scores, labels = standard @ probe.weights + probe.bias, np.asarray(labels)
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    rank = (scores > right).sum(axis=1)  # how many classes are likelier
    classes = scores.shape[1]
    return {f"top_{k}": float((rank < k).mean()) for k in top if k < classes}


def neighbour_accuracy(
    features: ArrayLike,
    labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    neighbours: int = NEIGHBOURS,
) -> float:
    """How often the nearest training examples vote for the right class.

    Nearest is the largest cosine of standardised features; a vote weighs
    exp(cosine / 0.07) (Wu et al. 2018, section 3.4).

    Args:
      features: `[examples, size]`, of training.
      labels: `[examples]`.
      test_features: `[tests, size]`.
      test_labels: `[tests]`.
      neighbours: that vote; all examples where there are fewer.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    mean, scale = _standard(features)

    def unit(x: ArrayLike) -> np.ndarray:
        standard = (np.asarray(x) - mean) * scale
        length = np.linalg.norm(standard, axis=1, keepdims=True)
        return (standard / np.maximum(length, SMALLEST)).astype(np.float32)

    known, asked, classes = (
        unit(features),
        unit(test_features),
        np.eye(labels.max() + 1),
    )
    last = min(neighbours, len(known)) - 1
    found = []
    for first in range(0, len(asked), AT_ONCE):
        cosine = asked[first : first + AT_ONCE] @ known.T
        nearest = np.argpartition(-cosine, last, axis=1)[:, : last + 1]
        weights = np.exp(np.take_along_axis(cosine, nearest, axis=1) / TEMPERATURE)
        votes = (classes[labels[nearest]] * weights[..., None]).sum(axis=1)
        found.append(votes.argmax(axis=1))
    return float((np.concatenate(found) == np.asarray(test_labels)).mean())


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def _fit(
    features: ArrayLike,
    labels: ArrayLike,
    penalty: ArrayLike,
    classes: int,
    steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Weights and bias after so many steps of L-BFGS from zeros."""
    objective = lambda fitted: _loss(fitted, features, labels, penalty)
    solver = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(objective)
    start = (jnp.zeros((jnp.shape(features)[1], classes)), jnp.zeros(classes))

    def step(carry, _):
        fitted, state = carry
        value, gradient = value_and_gradient(fitted, state=state)
        updates, state = solver.update(
            gradient, state, fitted, value=value, grad=gradient, value_fn=objective
        )
        moved = cast(tuple[jax.Array, jax.Array], optax.apply_updates(fitted, updates))
        return (moved, state), None

    carry, _ = jax.lax.scan(step, (start, solver.init(start)), length=steps)
    return carry[0]


def _loss(
    fitted: tuple[jax.Array, jax.Array],
    features: ArrayLike,
    labels: ArrayLike,
    penalty: ArrayLike,
) -> jax.Array:
    weights, bias = fitted
    scores = jnp.asarray(features) @ weights + bias[None]
    entropy = optax.softmax_cross_entropy_with_integer_labels(
        scores, jnp.asarray(labels)
    )
    return entropy.mean() + penalty / 2 * jnp.square(weights).sum()


def _standard(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What standardises features: their means, and one over standard deviations."""
    features = features.astype(np.float64)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    varies = deviation > SMALLEST * np.maximum(abs(mean), SMALLEST)
    return mean, np.where(varies, 1 / np.where(varies, deviation, 1), 0.0)
