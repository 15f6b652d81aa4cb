"""Whether a model tells a true continuation from a corrupted one.

Half of each sequence is given. What follows it is scored as it is and corrupted, some
times in each of three ways: tokens replaced at random, words in another order, the
second half of another sequence. The energy of a token that is there needs no
refinement, see `likelihood.energy_of_targets`; its likelihood needs a prediction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.errors import UserError
from ebt_jax.evaluation.metrics import score
from ebt_jax.evaluation.tasks.likelihood import EnergyOfTargets
from ebt_jax.interfaces import Batch, Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Thinking

KINDS = ("replaced", "shuffled", "other")
REPLACED = 0.1  # fraction of the tokens of a continuation
RESAMPLES = 1000  # of the bootstrap
INTERVAL = 95.0  # percent

NumpyBatch = dict[str, np.ndarray]
Place = Callable[[Iterable[NumpyBatch]], Iterable[Mapping[str, ArrayLike]]]


class Variants(NamedTuple):
    """Sequences as they are, and corrupted.

    Attributes:
      ids: int32 `[1 + kinds * times, sequences, tokens]`; first as they are, then
        `times` of each kind in `KINDS`.
      given: tokens at the start of each that are not scored.
      times: corruptions of each kind.
    """

    ids: np.ndarray
    given: int
    times: int


def verify(
    objective: Objective,
    params: PyTree,
    sequences: np.ndarray,
    *,
    energy: EnergyOfTargets | None,
    starts: np.ndarray,
    times: int,
    batch_size: int,
    seed: int,
    thinking: Thinking = AS_TRAINED,
    place: Place = lambda batches: batches,
) -> dict[str, float]:
    """How often the true continuation is the better one.

    Args:
      objective: predicts logits `[batch, seq, vocab]`.
      params: its parameters.
      sequences: token ids `[sequences, tokens]`, see `whole_sequences`.
      energy: energies of tokens that are there; None of a model without energies.
      starts: bool `[vocab]`, which tokens begin a word, see `word_starts`.
      times: corruptions of each kind and sequence, at least 1.
      batch_size: sequences at once; changes no result.
      seed: of corruptions, initial candidates, noise, and the bootstrap.
      thinking: how predictions are refined, for the likelihood.
      place: puts batches on devices.

    Returns:
      `sequences`, `corruptions` of each kind, and for each MEASURE (`nll`; where there
      are energies, `energy` and `excess_energy`: by how much it is above that of the
      model's own prediction) `MEASURE`: the share of corruptions whose mean over the
      continuation is above that of the true one, where a tie counts half; `/low` and
      `/high`: its bootstrap interval of 95 % over sequences; and the same for each
      kind, `MEASURE/KIND`.

    Raises:
      UserError: for fewer than two sequences, or too short ones.
    """
    variants = corrupt(sequences, starts, times, seed)
    key = jax.random.key(seed)
    found: list[dict[str, np.ndarray]] = []
    for batch in place(_batches(variants, batch_size)):
        scores = _scores(params, dict(batch), key, objective, energy, thinking)
        found.append(jax.device_get(scores))
    count = variants.ids.shape[0] * variants.ids.shape[1]
    results = {
        "sequences": float(variants.ids.shape[1]),
        "corruptions": float(times),
    }
    for name in found[0]:
        means = np.concatenate([scores[name] for scores in found])[:count]
        results |= _accuracies(name, means.reshape(variants.ids.shape[:2]), seed)
    return results


def whole_sequences(batches: Iterable[Mapping[str, ArrayLike]]) -> np.ndarray:
    """Token ids `[sequences, tokens]` of those sequences that are scored throughout.

    Args:
      batches: `tokens`, `targets`, `weights` `[batch, seq]`.

    Raises:
      UserError: if there are fewer than two.
    """
    found = []
    for batch in batches:
        tokens, targets, weights = (
            np.asarray(batch[name]) for name in ("tokens", "targets", "weights")
        )
        ids = np.concatenate([tokens[:, :1], targets], axis=1)
        found.append(ids[(weights > 0).all(axis=1)])
    count = sum(map(len, found))
    if count < 2:
        raise UserError(
            f"verification compares sequences without padding, and there are {count}; "
            "give it more text, or --packing=concat"
        )
    return np.concatenate(found)


def word_starts(texts: Sequence[str]) -> np.ndarray:
    """Which tokens begin a word, and bring the space before it: bool `[vocab]`.

    Args:
      texts: of all tokens of a vocabulary.
    """
    return np.array([text[:1].isspace() for text in texts])


def corrupt(
    sequences: np.ndarray, starts: np.ndarray, times: int, seed: int
) -> Variants:
    """The sequences, and their second halves corrupted.

    What is drawn depends on the seed and the place of a sequence alone.

    Args:
      sequences: token ids `[sequences, tokens]`.
      starts: see `word_starts`.
      times: corruptions of each kind.
      seed: of what is drawn.

    Raises:
      UserError: for fewer than two sequences, or sequences of fewer than 4 tokens.
    """
    count, length = sequences.shape
    if count < 2 or length < 4:
        raise UserError(
            f"verification has {count} sequences of {length} tokens, but needs 2 of at "
            "least 4; give it more text, or a model with a longer context"
        )
    given = length // 2
    ids = np.repeat(sequences[None], 1 + len(KINDS) * times, axis=0).astype(np.int32)
    for place in range(count):
        rng = np.random.default_rng([seed, place])
        for time in range(times):
            replaced, shuffled, other = (
                ids[1 + kind * times + time, place, given:]
                for kind in range(len(KINDS))
            )
            replaced[:] = _replaced(replaced, len(starts), rng)
            shuffled[:] = _shuffled(shuffled, starts, rng)
            another = (place + rng.integers(1, count)) % count
            other[:] = sequences[another, given:]
    return Variants(ids, given, times)


def verification_table(results: Mapping[str, float]) -> str:
    """What `verify` found, for people: a line for each measure."""
    names = [name for name in ("energy", "excess_energy", "nll") if name in results]
    lines = [["true one better, by", "all", *KINDS]]
    for name in names:
        lines.append([name, *(_with_interval(results, k) for k in _keys(name))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    rows.append(
        f"of {results['corruptions']:.0f} corruptions of each kind of "
        f"{results['sequences']:.0f} sequences; 95 % intervals over sequences"
    )
    return "\n".join(rows)


def _keys(name: str) -> list[str]:
    return [name, *(f"{name}/{kind}" for kind in KINDS)]


def _with_interval(results: Mapping[str, float], key: str) -> str:
    low, high = results[f"{key}/low"], results[f"{key}/high"]
    return f"{results[key]:.1%} ({low:.1%} to {high:.1%})"


def _replaced(ids: np.ndarray, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """With some tokens, at least one, replaced by others."""
    ids = ids.copy()
    count = max(1, round(REPLACED * len(ids)))
    places = rng.choice(len(ids), count, replace=False)
    ids[places] = (ids[places] + rng.integers(1, vocab, count)) % vocab
    return ids


def _shuffled(
    ids: np.ndarray, starts: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """With its words in another order; its tokens, where there are not two words.

    The rest of a word that began before stays where it is.
    """
    begins = np.flatnonzero(starts[ids])
    if len(begins) < 2:
        return rng.permutation(ids)
    rest, *words = np.split(ids, begins)
    order = rng.permutation(len(words))
    return np.concatenate([rest, *(words[i] for i in order)])


def _batches(variants: Variants, batch_size: int) -> Iterator[NumpyBatch]:
    """All variants of all sequences, in order; the last batch is filled up.

    A sequence has the same index, thus the same draws, in all its variants.
    """
    times, count, length = variants.ids.shape
    rows = variants.ids.reshape(-1, length)
    missing = -len(rows) % batch_size
    rows = np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)])
    index = np.resize(np.tile(np.arange(count), times), len(rows)).astype(np.int32)
    weights = np.zeros((batch_size, length - 1), np.float32)
    weights[:, variants.given - 1 :] = 1.0
    for start in range(0, len(rows), batch_size):
        ids = rows[start : start + batch_size]
        yield {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "weights": weights,
            "index": index[start : start + batch_size],
        }


def _accuracies(name: str, means: np.ndarray, seed: int) -> dict[str, float]:
    """Of means `[1 + kinds * times, sequences]`, nan counting as the worst."""
    means = np.where(np.isnan(means), np.inf, means).astype(np.float64)
    true, corrupted = means[0], means[1:]
    better = (corrupted > true) + (corrupted == true) / 2
    by_kind = better.reshape(len(KINDS), -1, len(true)).mean(axis=1)
    found: dict[str, float] = {}
    draws = np.random.default_rng(seed).integers(0, len(true), (RESAMPLES, len(true)))
    shares = [by_kind.mean(axis=0), *by_kind]
    for key, share in zip(_keys(name), shares, strict=True):
        resampled = share[draws].mean(axis=1)
        low, high = np.percentile(resampled, [50 - INTERVAL / 2, 50 + INTERVAL / 2])
        found |= {
            key: float(share.mean()),
            f"{key}/low": float(low),
            f"{key}/high": float(high),
        }
    return found


@functools.partial(jax.jit, static_argnames=("objective", "energy", "thinking"))
def _scores(
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    objective: Objective,
    energy: EnergyOfTargets | None,
    thinking: Thinking,
) -> dict[str, jax.Array]:
    """Means over the continuation, `[batch]` each."""
    weights = batch["weights"]
    mean = lambda x: (x.astype(jnp.float32) * weights).sum(1) / weights.sum(1)
    arrays = score(objective, params, batch, key, thinking)
    found = {"nll": mean(arrays["nll"][-1])}
    if energy is not None:
        energies = energy(params, batch)
        found["energy"] = mean(energies)
        found["excess_energy"] = mean(energies - arrays["energy"][-1])
    return found
