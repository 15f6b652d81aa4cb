"""Energies small enough to know everything about."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BATCH, DIM = 5, 3


def problem(dtype: Any = np.float32):
    """Parameters, context and a candidate for `mixed`."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    params = {"w": normal(DIM, DIM), "u": normal(DIM)}
    context = {"x": normal(BATCH, DIM), "mask": jnp.arange(BATCH) < BATCH - 1}
    return params, context, normal(BATCH, DIM)


def mixed(params, context, candidate, landscape):
    """Not quadratic; mixes parameters, context, candidate and landscape. `[batch]`."""
    hidden = jnp.tanh(candidate @ params["w"] + context["x"])
    gain = 1 + 0.5 * landscape.astype(candidate.dtype)
    quartic = gain * jnp.sum(candidate**4, axis=-1) / 4
    return jnp.where(context["mask"], hidden @ params["u"], 0.0) + quartic


def quadratic(params, context, candidate, landscape):
    """`params["scale"]` times half the squared distance to the context. `[batch]`."""
    return 0.5 * params["scale"] * jnp.sum((candidate - context) ** 2, axis=-1)


def counted(energy_fn):
    """The energy, and a list that grows by one each time it is traced."""
    traces = []

    def energy(params, context, candidate, landscape):
        traces.append(None)
        return energy_fn(params, context, candidate, landscape)

    return energy, traces


def gradient_at(params, context, candidate, landscape):
    """The inner gradient of `mixed`, by plain autodiff."""
    total = lambda c: mixed(params, context, c, jnp.int32(landscape)).sum()
    return jax.grad(total)(candidate)
