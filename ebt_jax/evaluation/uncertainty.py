"""Whether a model knows when it is wrong.

Each prediction has measures of doubt: the energy of the final candidate in the last
landscape, how little that is below the energy of the initial candidate in the first
one, and, of its distribution, the entropy and one minus the largest probability. A good
measure is high where the likeliest token is not the right one, and where the loss is
high. All numbers are of ranks, but for the calibration error, so the scale of a measure
does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.errors import UserError
from ebt_jax.evaluation.metrics import score
from ebt_jax.interfaces import Batch, Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Thinking

COVERAGES = (0.1, 0.2, 0.5, 0.8, 1.0)  # fractions of the predictions that are answered
_BINS = 15  # of the calibration error
_TENTHS = 10  # groups of predictions with about the same doubt
_POINTS = 20  # of a risk-coverage curve


class Doubts(NamedTuple):
    """Predictions, each with its measures of doubt; all float64 `[predictions]`.

    Attributes:
      nll: nats.
      wrong: 1 where the likeliest token is not the right one, else 0.
      measures: by name; higher is more doubt. What is not a number is infinite doubt.
    """

    nll: np.ndarray
    wrong: np.ndarray
    measures: dict[str, np.ndarray]


def find_doubts(
    objective: Objective,
    params: PyTree,
    batches: Iterable[Mapping[str, ArrayLike]],
    *,
    seed: int,
    thinking: Thinking = AS_TRAINED,
) -> Doubts:
    """Predicts the tokens of some batches, and doubts.

    Args:
      objective: predicts logits `[batch, seq, vocab]`.
      params: its parameters.
      batches: as for `metrics.evaluate`.
      seed: of initial candidates and noise.
      thinking: how predictions are refined.

    Raises:
      UserError: if there is nothing to predict.
    """
    key = jax.random.key(seed)
    found: list[dict[str, np.ndarray]] = []
    for batch in batches:
        scored = np.asarray(batch["weights"]) > 0
        arrays = jax.device_get(_arrays(params, dict(batch), key, objective, thinking))
        found.append({name: value[scored] for name, value in arrays.items()})
    if not sum(len(arrays["nll"]) for arrays in found):
        raise UserError(
            "there is nothing to predict: the data holds no token that is scored; give "
            "it more text"
        )
    joined = {
        name: np.concatenate([arrays[name] for arrays in found]).astype(np.float64)
        for name in found[0]
    }
    joined = {name: np.where(np.isnan(x), np.inf, x) for name, x in joined.items()}
    return Doubts(joined.pop("nll"), joined.pop("wrong"), joined)


def judge(doubts: Doubts) -> dict[str, float]:
    """What measures of doubt are worth.

    Returns:
      `wrong`: share of predictions that are wrong. For each measure `auroc/NAME`: the
      chance that a wrong prediction has more doubt than a right one (0.5: by chance),
      nan if all are wrong, or none. `rank_correlation/NAME`: Spearman's, of doubt and
      loss. `risk/NAME/C`: share of wrong ones among the fraction C with least doubt;
      `risk/NAME`: its mean over all fractions, the area under the risk-coverage curve.
      `calibration_error`: mean distance of the largest probability from the share of
      right ones, in bins of equal width.
    """
    results = {"wrong": float(doubts.wrong.mean())}
    for name, values in doubts.measures.items():
        curve = risk_coverage(values, doubts.wrong)
        results[f"auroc/{name}"] = auroc(values, doubts.wrong)
        results[f"rank_correlation/{name}"] = rank_correlation(values, doubts.nll)
        results[f"risk/{name}"] = float(curve.mean())
        for coverage in COVERAGES:
            place = max(round(coverage * len(curve)), 1) - 1
            results[f"risk/{name}/{coverage}"] = float(curve[place])
    results["calibration_error"] = calibration_error(
        np.clip(1 - doubts.measures["max_probability"], 0, 1), 1 - doubts.wrong
    )
    return results


def doubt_curves(doubts: Doubts) -> dict[str, dict[str, list[float]]]:
    """What a picture of measures of doubt needs.

    Returns:
      For each measure: `coverage` and `risk`, points of the risk-coverage curve; and of
      tenths of the predictions, by doubt, from the least on, `doubt` (its median),
      `nll` (mean) and `wrong` (share). Where there are fewer predictions than that,
      each is a group of its own.
    """
    count = len(doubts.nll)
    coverage = np.arange(1, _POINTS + 1) / _POINTS
    curves = {}
    for name, values in doubts.measures.items():
        order = np.argsort(values, kind="stable")
        groups = np.array_split(order, min(_TENTHS, count))
        places = np.maximum(np.round(coverage * count).astype(int), 1) - 1
        curves[name] = {
            "coverage": coverage.tolist(),
            "risk": risk_coverage(values, doubts.wrong)[places].tolist(),
            "doubt": [float(np.median(values[group])) for group in groups],
            "nll": [float(doubts.nll[group].mean()) for group in groups],
            "wrong": [float(doubts.wrong[group].mean()) for group in groups],
        }
    return curves


def auroc(doubt: np.ndarray, wrong: np.ndarray) -> float:
    """The chance that a wrong prediction has more doubt than a right one.

    A tie counts half. nan if there are only wrong ones, or only right ones.

    Args:
      doubt: `[predictions]`.
      wrong: 1 or 0, `[predictions]`.
    """
    count = wrong.sum()
    pairs = count * (len(wrong) - count)
    if not pairs:
        return float("nan")
    # Mann and Whitney's U, from the ranks of the wrong ones.
    return float((ranks(doubt)[wrong > 0].sum() - count * (count + 1) / 2) / pairs)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; nan if one of the two does not vary."""
    x, y = ranks(x) - (len(x) + 1) / 2, ranks(y) - (len(y) + 1) / 2
    size = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / size) if size else float("nan")


def risk_coverage(doubt: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Share of wrong ones among the k predictions with least doubt, `[predictions]`.

    Entry k - 1 is for k. Within a tie, each prediction counts as the tie's mean.

    Args:
      doubt: `[predictions]`.
      wrong: 1 or 0, `[predictions]`.
    """
    _, group, counts = np.unique(doubt, return_inverse=True, return_counts=True)
    mean = np.bincount(group, wrong) / counts
    return np.cumsum(mean[np.sort(group)]) / np.arange(1, len(wrong) + 1)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean distance of confidence and share of right ones, over bins of confidence.

    Args:
      confidence: probabilities `[predictions]`.
      right: 1 or 0, `[predictions]`.
    """
    bins = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
    gaps = np.bincount(bins, confidence - right, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(right))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, those of a tie its mean."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def uncertainty_table(results: Mapping[str, float]) -> str:
    """What `judge` found, for people: a line for each measure."""
    names = [name.removeprefix("auroc/") for name in results if "auroc/" in name]
    head = ["doubt", "AUROC", "rank corr.", "mean risk"]
    head += [f"risk at {coverage:.0%}" for coverage in COVERAGES]
    lines = [head]
    for name in names:
        keys = [f"auroc/{name}", f"rank_correlation/{name}", f"risk/{name}"]
        keys += [f"risk/{name}/{coverage}" for coverage in COVERAGES]
        lines.append([name, *(f"{results[key]:.4f}" for key in keys)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    rows.append(
        f"{results['wrong']:.1%} of the likeliest tokens are wrong; calibration error "
        f"of the largest probability {results['calibration_error']:.4f}"
    )
    return "\n".join(rows)


@functools.partial(jax.jit, static_argnames=("objective", "thinking"))
def _arrays(
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    objective: Objective,
    thinking: Thinking,
) -> dict[str, jax.Array]:
    """Loss and doubts of the predictions of a batch, `[batch, seq]` each."""
    found = score(objective, params, batch, key, thinking)
    logits = objective.predict(params, batch, key, thinking).astype(jnp.float32)
    log_probability = jax.nn.log_softmax(logits)
    probability = jnp.exp(log_probability)
    arrays = {
        "nll": found["nll"][-1],
        "wrong": jnp.argmax(logits, axis=-1) != batch["targets"],
    }
    if "energy" in found:
        arrays["energy"] = found["energy"][-1]
        arrays["energy_drop"] = found["energy"][-1] - found["energy"][0]
    arrays["entropy"] = -(probability * log_probability).sum(axis=-1)
    arrays["max_probability"] = 1 - probability.max(axis=-1)
    return arrays
