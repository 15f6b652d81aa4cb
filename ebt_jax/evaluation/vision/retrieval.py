"""Which caption belongs to a picture, by energy.

A picture is scored with its own caption and with those of others: the caption with the
lowest energy is taken. A model that does not look at captions is right by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.errors import UserError
from ebt_jax.interfaces import EnergyModel
from ebt_jax.refine import PyTree

RESAMPLES = 2000  # of the bootstrap
WITHIN = 0.95  # share of resampled accuracies that lie between `low` and `high`


class Retrieval(NamedTuple):
    """How often the right caption was found.

    Attributes:
      accuracy: share of the pictures; captions that tie share a picture.
      low: of the accuracy, by bootstrap over pictures.
      high: of it.
      chance: 1 / choices.
      pictures: how many.
      choices: captions that each was scored with.
    """

    accuracy: float
    low: float
    high: float
    chance: float
    pictures: int
    choices: int


def retrieve(
    model: EnergyModel,
    params: PyTree,
    batches: Iterable[Mapping[str, ArrayLike]],
    *,
    choices: int,
    seed: int,
    landscape: int = 0,
) -> Retrieval:
    """Scores each picture with its caption and with others of the same data.

    Args:
      model: of images, with captions.
      params: its parameters.
      batches: `image`, `caption` `[batch, size]`, `weights` and `index` `[batch]`;
        iterated over twice.
      choices: captions for each picture, at least 2: its own, and others that are not
        the same, drawn by seed and index.
      seed: of the draws.
      landscape: that the energies are of.

    Raises:
      UserError: for fewer than two choices, more than there are different captions, or
        data without captions.
    """
    own, index = _captions(batches)
    different = np.unique(own, axis=0)
    check_choices(choices, len(different))

    @jax.jit
    def energies(params: PyTree, image: jax.Array, captions: jax.Array) -> jax.Array:
        """`[choices, batch]`, by captions `[choices, batch, size]`."""

        def energy(caption: jax.Array) -> jax.Array:
            context = model.encode_context(params, {"image": image, "caption": caption})
            return model.energy(params, context, image, jnp.int32(landscape))

        return jax.lax.map(energy, captions)

    drawn = {
        int(i): _choices(caption, different, choices, seed, int(i))
        for i, caption in zip(index, own, strict=True)
    }
    found = []
    for batch in batches:
        counts = np.asarray(batch["weights"]) > 0
        if not counts.any():
            continue
        # Rows that do not count are scored as the first that does: one compiled shape.
        rows = np.where(counts, np.arange(len(counts)), counts.argmax())
        image, names = (np.asarray(batch[name])[rows] for name in ("image", "index"))
        captions = np.stack([drawn[int(i)] for i in names], axis=1)
        scores = np.asarray(energies(params, jnp.asarray(image), jnp.asarray(captions)))
        found.append(shares(scores)[counts])
    right = np.concatenate(found)
    low, high = bootstrap(right, seed)
    return Retrieval(float(right.mean()), low, high, 1 / choices, len(right), choices)


def check_choices(choices: int, different: int) -> None:
    """Refuses fewer than two choices, and more than there are different captions."""
    if not 2 <= choices <= different:
        raise UserError(
            f"retrieval among {choices} captions is asked for, but there are "
            f"{different} different ones; give a number from 2 to {different}"
        )


def shares(energies: np.ndarray) -> np.ndarray:
    """`[pictures]`: 1 where the first of `[choices, pictures]` is the lowest alone.

    Where several are the lowest, they share the picture; energies that are not finite
    never are.
    """
    energies = np.where(np.isfinite(energies), energies, np.inf)
    lowest = (energies == energies.min(axis=0)) & np.isfinite(energies)
    return lowest[0] / np.maximum(lowest.sum(axis=0), 1)


def bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Between which means of resampled values lie, 95 % of them.

    Args:
      values: `[items]`.
      seed: of the resampling.
    """
    random = np.random.default_rng(seed)
    picked = random.integers(0, len(values), (RESAMPLES, len(values)))
    edges = (50 * (1 - WITHIN), 50 * (1 + WITHIN))
    low, high = np.percentile(values[picked].mean(axis=1), edges)
    return float(low), float(high)


def _captions(
    batches: Iterable[Mapping[str, ArrayLike]],
) -> tuple[np.ndarray, np.ndarray]:
    """Captions `[pictures, size]` that count, and the indices of their pictures."""
    captions, indices = [], []
    for batch in batches:
        if "caption" not in batch:
            raise UserError("retrieval is of captions, but the data has none")
        counts = np.asarray(batch["weights"]) > 0
        captions.append(np.asarray(batch["caption"])[counts])
        indices.append(np.asarray(batch["index"])[counts])
    return np.concatenate(captions), np.concatenate(indices)


def _choices(
    own: np.ndarray, different: np.ndarray, choices: int, seed: int, index: int
) -> np.ndarray:
    """`[choices, size]`: a picture's own caption, then others."""
    others = np.flatnonzero((different != own).any(axis=1))
    picked = np.random.default_rng((seed, index)).choice(
        others, choices - 1, replace=False
    )
    return np.concatenate([own[None], different[picked]])
