"""An objective whose energy is small enough to do by hand."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import QUICK

from ebt_jax.interfaces import Draws, EnergyModel
from ebt_jax.models.text import cross_entropy
from ebt_jax.objective_config import (
    ObjectiveConfig,
    RefineSetup,
)
from ebt_jax.objectives import refined
from ebt_jax.randomness import normal

BATCH, SEQ, VOCAB = 4, 3, 5
KEY = jax.random.key(0)
SETUP = RefineSetup(num_steps=3, num_landscapes=2, step_size=2.0)
WEIGHTS = np.ones((BATCH, SEQ), np.float32)
WEIGHTS[1, 1:] = 0
WEIGHTS[3, 2] = 0


def energy(params, context, candidate, landscape):
    """Distance to a guess that a table makes of the token and the candidate."""
    guess = jnp.tanh(context + candidate @ params["w"])
    return (1.0 + landscape) * jnp.sum((candidate - guess) ** 2, axis=-1)


def init(key):
    table, w = jax.random.normal(key, (2, VOCAB, VOCAB))
    return {"table": table, "w": w}


TOY = EnergyModel(
    init=init,
    encode_context=lambda params, batch: params["table"][batch["tokens"]],
    energy=energy,
    initial_candidate=lambda key, batch: normal(
        key, (*batch["tokens"].shape, VOCAB), jnp.float32
    ),
    normalize=jax.nn.softmax,
    loss=cross_entropy,
    target=lambda batch: jax.nn.one_hot(batch["targets"], VOCAB),
)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda: jnp.asarray(rng.integers(VOCAB, size=(BATCH, SEQ)), jnp.int32)
    return {
        "tokens": ids(),
        "targets": ids(),
        "weights": jnp.asarray(WEIGHTS),
        "index": jnp.array([7, 2, 30, 4], jnp.int32),
    }


def objective_of(setup=SETUP, **options):
    return refined(TOY, setup, ObjectiveConfig(**options))


def start_of(seed=1):
    shape = (BATCH, SEQ, VOCAB)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_grad(objective, batch, draws=None, params=None):
    """`((loss, metrics), gradients)`, from the same parameters and candidate."""
    params = objective.init(KEY) if params is None else params
    draws = Draws(candidate=start_of()) if draws is None else draws
    function = jax.value_and_grad(objective.loss, has_aux=True)
    function = jax.jit(function, compiler_options=QUICK)
    return function(params, batch, KEY, draws)


def path_of(params, batch, setup=SETUP):
    """Candidates before and after each step, with their energies, by hand."""
    context = params["table"][batch["tokens"]]
    z, path = start_of(), []
    for i in range(setup.num_steps):
        landscape = min(i, setup.num_landscapes - 1)
        c = jax.nn.softmax(z)
        total = lambda c, i=landscape: energy(params, context, c, i).sum()
        z = c - setup.step_size * jax.grad(total)(c)
        path.append((c, z, energy(params, context, c, landscape)))
    return path


def smoothed(z, targets, smoothing):
    """Cross-entropy with a target of (1 - s) one-hot + s / vocab."""
    target = (1 - smoothing) * jax.nn.one_hot(targets, VOCAB) + smoothing / VOCAB
    return -(target * jax.nn.log_softmax(z)).sum(axis=-1)


def mean(values):
    return float((values * WEIGHTS).sum() / WEIGHTS.sum())
