"""Scores of rows of tokens: likelihood, energies, whether the likeliest was right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.evaluation.metrics import score
from ebt_jax.evaluation.tasks.rows import Row, batches
from ebt_jax.interfaces import Batch, EnergyModel, Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Thinking

EnergyOfTargets = Callable[[PyTree, Batch], jax.Array]


class Scorer(NamedTuple):
    """What scores rows. Static: part of the compiled program.

    Attributes:
      objective: what predicts.
      thinking: how much a prediction is refined.
      energy: `(params, batch) -> [batch, seq]`, see `energy_of_targets`; None where
        there are no energies, or none are wanted.
      likeliest: whether to find if each token of the answer is the likeliest one.
      kinds: how many kinds of tokens there are, see `Row.kinds`; 0 for none.
    """

    objective: Objective
    thinking: Thinking = AS_TRAINED
    energy: EnergyOfTargets | None = None
    likeliest: bool = False
    kinds: int = 0


class Scores(NamedTuple):
    """Sums over tokens of a row, or of several; float64.

    Attributes:
      nll: after each refinement step, nats, `[steps]`.
      answer_nll: the same of the answer alone, `[steps]`.
      tokens: scored.
      answer_tokens: of them those of the answer.
      bytes: UTF-8 bytes of the scored tokens.
      answer_bytes: of those of the answer.
      energy: of the answer's tokens, nan where none was asked for.
      excess: by how much that is above the energy of the model's own predictions.
      wrong: tokens of the answer that are not the likeliest ones, after each step if
        the objective measures `right` (see `rightness`), else at the end, `[steps]`;
        nan where that was not asked for.
      gradients: evaluations of an energy and its gradient, nan where there is none.
      kinds: of each kind of token how many there are, how many are the likeliest ones,
        their nll, and refinement steps (nan without any), `[kinds, 4]`.
    """

    nll: np.ndarray
    answer_nll: np.ndarray
    tokens: float
    answer_tokens: float
    bytes: float
    answer_bytes: float
    energy: float
    excess: float
    wrong: np.ndarray
    gradients: float
    kinds: np.ndarray


def energy_of_targets(model: EnergyModel, num_landscapes: int) -> EnergyOfTargets:
    """The energies of the tokens that are there, in the last landscape.

    An energy model judges a text without refining anything: the lower E(context,
    token) is, the better the token fits.
    """

    def energy(params: PyTree, batch: Batch) -> jax.Array:
        context = model.encode_context(params, batch)
        last = jnp.int32(num_landscapes - 1)
        return model.energy(params, context, model.target(batch), last)

    return energy


def rightness(logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """For `measures` of a model of text: 1 where the target is the likeliest token."""
    right = jnp.argmax(logits, axis=-1) == batch["targets"]
    return {"right": right.astype(jnp.float32)}


def score_rows(
    scorer: Scorer,
    params: PyTree,
    rows: Sequence[Row],
    *,
    batch_size: int,
    context: int,
    pad_id: int,
    token_bytes: np.ndarray,
    seed: int,
    on_done: Callable[[int], object] = lambda count: None,
) -> list[Scores]:
    """Scores rows; neither their order nor the batch size changes what one gets.

    Args:
      scorer: how.
      params: of its objective.
      rows: at least one.
      batch_size: rows at once.
      context: of the model.
      pad_id: fills up rows.
      token_bytes: UTF-8 bytes of each token, `[vocab]`.
      seed: of initial candidates and noise.
      on_done: called with the number of rows that have been scored.
    """
    key = jax.random.key(seed)
    scores: dict[int, Scores] = {}
    for places, batch in batches(rows, batch_size, context, pad_id):
        sums = jax.device_get(_sums(params, batch, key, scorer))
        for place, number in enumerate(places):
            scores[number] = _of_row(
                rows[number], sums, place, token_bytes, scorer.kinds
            )
        on_done(len(places))
    return [scores[number] for number in range(len(rows))]


def add(scores: Sequence[Scores]) -> Scores:
    """The sum of the scores of several rows."""
    return Scores(*(np.sum(field, axis=0) for field in zip(*scores, strict=True)))


def _of_row(
    row: Row,
    sums: dict[str, np.ndarray],
    place: int,
    token_bytes: np.ndarray,
    kinds: int,
) -> Scores:
    def of(name: str) -> np.ndarray | float:
        if name not in sums:
            return float("nan")
        return np.asarray(sums[name][..., place], np.float64)

    sizes = token_bytes[row.tokens]
    by_kind = np.zeros((kinds, 4))
    if kinds and row.kinds is not None:
        own = np.where(np.arange(len(row.kinds)) < row.scored, -1, row.kinds)[1:]
        each = sums["each"][:, place, : len(own)].T.astype(np.float64)
        np.add.at(by_kind, own[own >= 0], each[own >= 0])
    return Scores(
        nll=np.asarray(of("nll")),
        answer_nll=np.asarray(of("answer_nll")),
        tokens=float(len(row.tokens) - row.scored),
        answer_tokens=float(len(row.tokens) - row.answer),
        bytes=float(sizes[row.scored :].sum()),
        answer_bytes=float(sizes[row.answer :].sum()),
        energy=float(of("energy")),
        excess=float(of("excess")),
        wrong=np.atleast_1d(of("wrong")),
        gradients=float(of("gradients")),
        kinds=by_kind,
    )


@functools.partial(jax.jit, static_argnames=("scorer",))
def _sums(
    params: PyTree, batch: Batch, key: jax.Array, scorer: Scorer
) -> dict[str, jax.Array]:
    """Sums over the tokens of each row, `[batch]` or for each step `[steps, batch]`.

    Where kinds are told apart also what `Scores.kinds` adds up, `[4, batch, seq]`.
    """
    arrays = score(scorer.objective, params, batch, key, scorer.thinking)

    def total(values: jax.Array, mask: jax.Array) -> jax.Array:
        # `where`, because padding may hold anything, and 0 * nan is nan.
        mask = jnp.broadcast_to(mask > 0, values.shape)
        return jnp.where(mask, values.astype(jnp.float32), 0.0).sum(axis=-1)

    answer = batch["answer"]
    sums = {
        "nll": total(arrays["nll"], batch["weights"][None]),
        "answer_nll": total(arrays["nll"], answer[None]),
    }
    if "gradients" in arrays:
        sums["gradients"] = total(arrays["gradients"], batch["weights"])
    if scorer.energy is not None:
        energy = scorer.energy(params, batch)
        sums["energy"] = total(energy, answer)
        sums["excess"] = total(energy - arrays["energy"][-1], answer)
    if scorer.likeliest:
        if "right" not in arrays:
            logits = scorer.objective.predict(params, batch, key, scorer.thinking)
            arrays |= {"right": rightness(logits, batch)["right"][None]}
        sums["wrong"] = total(1 - arrays["right"], answer[None])
    if scorer.kinds:
        last = arrays["nll"][-1].astype(jnp.float32)
        steps = arrays["num_steps"] if "num_steps" in arrays else jnp.nan * last
        sums["each"] = jnp.stack([1 + 0 * last, arrays["right"][-1], last, steps])
    return sums
