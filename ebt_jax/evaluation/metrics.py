"""How well an objective predicts, in numbers that do not depend on the batch size.

Every batch is reduced to a few sums on the device; the sums of all batches are added
up in float64 on the host, and only then divided. So perplexity is
exp(total nll / total tokens), never a mean of the perplexities of batches.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ebt_jax.errors import UserError
from ebt_jax.interfaces import Batch, Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Effort, Thinking, check_thinking

# What results call the parts of an `Effort`.
EFFORT = {
    "refinement_steps": "num_steps",
    "energy_gradients": "gradients",
    "energy_evaluations": "energies",
}


def evaluate(
    objective: Objective,
    params: PyTree,
    batches: Iterable[Mapping[str, ArrayLike]],
    *,
    seed: int,
    thinking: Thinking = AS_TRAINED,
    progress: bool = False,
) -> dict[str, float]:
    """Scores every prediction of some batches.

    Args:
      objective: what predicts.
      params: its parameters.
      batches: dicts of arrays of one shape: the model's inputs, `weights`
        `[batch, seq]` (0: not scored), `index` `[batch]`, and, where bits per byte are
        wanted, `bytes` `[batch, seq]`, the byte length of each target.
      seed: of initial candidates and noise.
      thinking: how predictions are refined.
      progress: True to count batches on stderr.

    Returns:
      Of text `nll` after the last step (nats per token) and `perplexity`; else the
      objective's `measure`, such as `smooth_l1`, what else it measures, such as `mse`,
      and with that `psnr` (dB, of numbers in [-1, 1]). `tokens` (what was scored, also
      frames or images), `sequences`, and `bits_per_byte` where the batches have
      `bytes`. Of a refinement also `nll/step_i` (after step i, counting from 1),
      `gradient_norm/step_i`, `energy_before` (initial candidate), `energy_after`
      (final candidate in the last landscape), `energy_gap` (before - after),
      `energy_rose` (share of predictions whose energy rose), and per prediction
      `refinement_steps`, `energy_gradients` and `energy_evaluations`, see `Effort`.
      What is found after step i is there where thinking is nothing but a number of
      steps; where it is more, there may be `energy_spread`, see `Thought`. What is not
      finite is reported as it is.

    Raises:
      UserError: if nothing is scored, or for thinking that cannot be.
    """
    check_thinking(thinking)
    key = jax.random.key(seed)
    totals: dict[str, np.ndarray] = {}
    pending = None
    for count, batch in enumerate(batches, 1):
        # The device works on this batch while the host adds up the one before.
        sums = _batch_sums(params, dict(batch), key, objective, thinking)
        totals = _add(totals, pending)
        pending = sums
        if progress:
            print(f"\revaluated {count} batches", end="", file=sys.stderr, flush=True)
    if progress:
        print(file=sys.stderr)
    totals = _add(totals, pending)
    if not totals or not totals["tokens"]:
        raise UserError(
            "there is nothing to evaluate: the data holds no token that is scored; "
            "give it more text"
        )
    return _ratios(totals, objective.measure)


def psnr(mse: ArrayLike) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, of a mean squared error in [-1, 1]."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(4 / np.asarray(mse, np.float64))


def score(
    objective: Objective,
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    thinking: Thinking,
) -> dict[str, jax.Array]:
    """What `evaluate` gives where thinking is a number of steps, else `assess`.

    Where there are energies, what a prediction took is there in both, `[*batch]`.
    """
    if thinking != Thinking(thinking.num_steps) and objective.assess is not None:
        return objective.assess(params, batch, key, thinking)
    arrays = objective.evaluate(params, batch, key, thinking.num_steps)
    if "energy" in arrays:
        steps = jnp.full(batch["weights"].shape, len(arrays["nll"]))
        arrays |= Effort(steps, steps, 0 * steps)._asdict()
    return arrays


@functools.partial(jax.jit, static_argnames=("objective", "thinking"))
def _batch_sums(
    params: PyTree,
    batch: Batch,
    key: jax.Array,
    objective: Objective,
    thinking: Thinking,
) -> dict[str, jax.Array]:
    """Sums over the predictions of a batch, `[]` or one for each step `[steps]`."""
    weights = batch["weights"]
    scored = weights > 0
    arrays = score(objective, params, batch, key, thinking)

    def total(values: jax.Array) -> jax.Array:
        # `where`, because padding may hold anything, and 0 * nan is nan.
        return jnp.where(scored, values.astype(jnp.float32) * weights, 0.0).sum()

    sums = {
        "tokens": weights.sum(),
        "scored": scored.sum(),
        "sequences": scored.any(axis=tuple(range(1, scored.ndim))).sum(),
        "nll": jax.vmap(total)(arrays["nll"]),
    }
    known = {"nll", "energy", "gradient_norm", "spread", *Effort._fields}
    for name in arrays.keys() - known:
        sums[f"measure/{name}"] = jax.vmap(total)(arrays[name])
    if "bytes" in batch:
        sums["bytes"] = total(batch["bytes"])
    if "gradient_norm" in arrays:
        sums["gradient_norm"] = jax.vmap(total)(arrays["gradient_norm"])
    if "energy" in arrays:
        before, after = arrays["energy"][0], arrays["energy"][-1]
        sums["energy_before"] = total(before)
        sums["energy_after"] = total(after)
        sums["energy_rose"] = (scored & (after > before)).sum()
        sums |= {name: total(arrays[name]) for name in Effort._fields}
    if "spread" in arrays and thinking.best_of > 1:
        sums["energy_spread"] = total(arrays["spread"])
    return sums


def _add(
    totals: dict[str, np.ndarray], sums: dict[str, jax.Array] | None
) -> dict[str, np.ndarray]:
    if sums is None:
        return totals
    added = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    if totals:
        added = {name: totals[name] + value for name, value in added.items()}
    return added


def _ratios(totals: dict[str, np.ndarray], measure: str) -> dict[str, float]:
    tokens = float(totals["tokens"])
    per_step = {measure: totals["nll"] / tokens}
    for name in sorted(totals):
        if name.startswith("measure/"):
            per_step[name.removeprefix("measure/")] = totals[name] / tokens
    if "mse" in per_step:
        per_step["psnr"] = psnr(per_step["mse"])
    results = {name: float(values[-1]) for name, values in per_step.items()}
    if measure == "nll":
        with np.errstate(over="ignore"):
            results["perplexity"] = float(np.exp(results["nll"]))
    if "bytes" in totals and totals["bytes"]:
        results["bits_per_byte"] = float(
            totals["nll"][-1] / math.log(2) / totals["bytes"]
        )
    if "energy_before" in totals:
        several = "gradient_norm" in totals
        if several:
            for name, values in per_step.items():
                results |= _per_step(name, values)
        results["energy_before"] = float(totals["energy_before"] / tokens)
        results["energy_after"] = float(totals["energy_after"] / tokens)
        results["energy_gap"] = results["energy_before"] - results["energy_after"]
        results["energy_rose"] = float(totals["energy_rose"] / totals["scored"])
        if several:
            results |= _per_step("gradient_norm", totals["gradient_norm"] / tokens)
        for name, of in EFFORT.items():
            results[name] = float(totals[of] / tokens)
    if "energy_spread" in totals:
        results["energy_spread"] = float(totals["energy_spread"] / tokens)
    results["tokens"] = tokens
    results["sequences"] = float(totals["sequences"])
    return results


def _per_step(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}/step_{i}": float(value) for i, value in enumerate(values, 1)}
