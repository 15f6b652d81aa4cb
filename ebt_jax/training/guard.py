"""Updates that would do harm are left out, on the device and without waiting for it.

An update is left out if its loss or the norm of its gradient is not finite or, with
`train.spike_factor`, if the norm is that many times its running mean. Parameters and
optimiser then stay what they were; the step counts, its batch is gone.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.interfaces import Metrics

MEMORY = 100  # updates that the running mean of the norm goes back, about
SETTLED = 20  # updates made before a norm can count as a spike


class Guard(NamedTuple):
    """What is known of the updates so far.

    Attributes:
      skipped_in_a_row: int32 scalar, updates left out since the last that was made.
      skipped_total: int32 scalar, all that were left out.
      rollbacks: int32 scalar, how often the run went back to a checkpoint.
      made: int32 scalar, updates that were made.
      mean_norm: float32 scalar, running mean of the gradient norm of those.
    """

    skipped_in_a_row: jax.Array
    skipped_total: jax.Array
    rollbacks: jax.Array
    made: jax.Array
    mean_norm: jax.Array


def new_guard() -> Guard:
    """Before the first update."""
    # An array each: the state is donated, which an array that is in it twice cannot be.
    zero = lambda: jnp.int32(0)
    return Guard(zero(), zero(), zero(), zero(), jnp.float32(0.0))


def judge(
    guard: Guard, loss: jax.Array, gradient_norm: jax.Array, spike_factor: float
) -> tuple[jax.Array, Guard]:
    """Whether an update is made, and the guard after it.

    Args:
      guard: before the update.
      loss: scalar.
      gradient_norm: scalar, before clipping.
      spike_factor: of `train`; 0 for no limit.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if spike_factor:
        spike = gradient_norm > spike_factor * guard.mean_norm
        good &= ~(spike & (guard.made >= SETTLED))
    one = jnp.int32(1)
    made = guard.made + jnp.where(good, one, 0)
    share = 1.0 / jnp.clip(made, 1, MEMORY)
    change = share * (gradient_norm.astype(jnp.float32) - guard.mean_norm)
    return good, Guard(
        skipped_in_a_row=jnp.where(good, 0, guard.skipped_in_a_row + one),
        skipped_total=guard.skipped_total + jnp.where(good, 0, one),
        rollbacks=guard.rollbacks,
        made=made,
        mean_norm=guard.mean_norm + jnp.where(good, change, 0.0),
    )


def numbers(guard: Guard) -> Metrics:
    """What is logged of it."""
    return {
        "skipped_in_a_row": guard.skipped_in_a_row,
        "skipped_total": guard.skipped_total,
        "rollbacks": guard.rollbacks,
    }


def after_rollback(restored: Guard, present: Guard) -> Guard:
    """The guard of a run that goes back to a checkpoint, with nothing uncounted.

    Args:
      restored: of the checkpoint.
      present: of the state that is given up.
    """
    return restored._replace(
        skipped_total=present.skipped_total,
        rollbacks=present.rollbacks + 1,
        skipped_in_a_row=jnp.zeros_like(present.skipped_in_a_row),
    )
