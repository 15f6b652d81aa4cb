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


def evaluate(
    objective: Objective,
    params: PyTree,
    batches: Iterable[Mapping[str, ArrayLike]],
    *,
    seed: int,
    num_steps: int = 0,
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
      num_steps: refinement steps; 0 for the trained number.
      progress: True to count batches on stderr.

    Returns:
      `nll` after the last step (nats per token), `perplexity`, `tokens`, `sequences`,
      and `bits_per_byte` where the batches have `bytes`. Of a refinement also
      `nll/step_i` (after step i, counting from 1), `gradient_norm/step_i`,
      `energy_before` (initial candidate), `energy_after` (final candidate in the last
      landscape), `energy_gap` (before - after) and `energy_rose` (share of predictions
      whose energy rose). What is not finite is reported as it is.

    Raises:
      UserError: if nothing is scored.
    """
    key = jax.random.key(seed)
    totals: dict[str, np.ndarray] = {}
    pending = None
    for count, batch in enumerate(batches, 1):
        # The device works on this batch while the host adds up the one before.
        sums = _batch_sums(params, dict(batch), key, objective, num_steps)
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
    return _ratios(totals)


@functools.partial(jax.jit, static_argnames=("objective", "num_steps"))
def _batch_sums(
    params: PyTree, batch: Batch, key: jax.Array, objective: Objective, num_steps: int
) -> dict[str, jax.Array]:
    """Sums over the predictions of a batch, `[]` or one for each step `[steps]`."""
    weights = batch["weights"]
    scored = weights > 0
    arrays = objective.evaluate(params, batch, key, num_steps)

    def total(values: jax.Array) -> jax.Array:
        # `where`, because padding may hold anything, and 0 * nan is nan.
        return jnp.where(scored, values.astype(jnp.float32) * weights, 0.0).sum()

    sums = {
        "tokens": weights.sum(),
        "scored": scored.sum(),
        "sequences": scored.any(axis=tuple(range(1, scored.ndim))).sum(),
        "nll": jax.vmap(total)(arrays["nll"]),
    }
    if "bytes" in batch:
        sums["bytes"] = total(batch["bytes"])
    if "gradient_norm" in arrays:
        sums["gradient_norm"] = jax.vmap(total)(arrays["gradient_norm"])
    if "energy" in arrays:
        before, after = arrays["energy"][0], arrays["energy"][-1]
        sums["energy_before"] = total(before)
        sums["energy_after"] = total(after)
        sums["energy_rose"] = (scored & (after > before)).sum()
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


def _ratios(totals: dict[str, np.ndarray]) -> dict[str, float]:
    tokens = float(totals["tokens"])
    nll = totals["nll"] / tokens
    with np.errstate(over="ignore"):
        results = {"nll": float(nll[-1]), "perplexity": float(np.exp(nll[-1]))}
    if "bytes" in totals and totals["bytes"]:
        results["bits_per_byte"] = float(
            totals["nll"][-1] / math.log(2) / totals["bytes"]
        )
    if "energy_before" in totals:
        results |= _per_step("nll", nll)
        results["energy_before"] = float(totals["energy_before"] / tokens)
        results["energy_after"] = float(totals["energy_after"] / tokens)
        results["energy_gap"] = results["energy_before"] - results["energy_after"]
        results["energy_rose"] = float(totals["energy_rose"] / totals["scored"])
        results |= _per_step("gradient_norm", totals["gradient_norm"] / tokens)
    results["tokens"] = tokens
    results["sequences"] = float(totals["sequences"])
    return results


def _per_step(name: str, values: np.ndarray) -> dict[str, float]:
    return {f"{name}/step_{i}": float(value) for i, value in enumerate(values, 1)}
