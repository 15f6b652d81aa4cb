"""A bigram model and a grain pipeline, small enough to train in a second."""

import dataclasses
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import recomputing

from ebt_jax.data.pipeline import TrainBatches
from ebt_jax.interfaces import Objective
from ebt_jax.models.config import ModelConfig
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
)
from ebt_jax.training.resolve import resolve

VOCAB, CONTEXT = 11, 8


class Letters:
    """A tokenizer of eleven letters."""

    vocab_size = VOCAB

    def decode(self, ids):
        return "".join(chr(ord("a") + int(i)) for i in ids)


def row(index):
    """A sequence that counts upwards from somewhere, with a few slips and gaps."""
    rng = np.random.default_rng(int(index))
    ids = (rng.integers(VOCAB) + np.arange(CONTEXT + 1)) % VOCAB
    ids = np.where(rng.random(CONTEXT + 1) < 0.1, 0, ids).astype(np.int32)
    weights = (rng.random(CONTEXT) < 0.8).astype(np.float32)
    return {
        "tokens": ids[:-1],
        "targets": ids[1:],
        "weights": weights,
        "index": np.int32(index),
    }


def training_batches(batch_size, seed=0, rows=1000, repeat=True):
    data = grain.MapDataset.range(rows).shuffle(seed=seed)
    data = data.repeat() if repeat else data
    return TrainBatches(
        data.map(row), batch_size=batch_size, rows=range(batch_size), num_workers=0
    )


def held_out_batches(batch_size=8, rows=16):
    batches = []
    for first in range(5000, 5000 + rows, batch_size):
        rows_of_batch = [row(index) for index in range(first, first + batch_size)]
        batch = {k: np.stack([r[k] for r in rows_of_batch]) for k in rows_of_batch[0]}
        batches.append({**batch, "bytes": np.ones_like(batch["weights"])})
    return batches


def bigram(noise=0.0, poison=None):
    """A table of logits with a learnt scale and, where asked for, noise on it.

    `traces` counts how often the loss was traced. Loss and gradient of a batch that
    holds one of the sequences `poison` are nan.
    """
    traces = []

    def init(key):
        return {
            "table": 0.1 * jax.random.normal(key, (VOCAB, VOCAB)),
            "step_size": jnp.float32(2.0),
            "noise_std": jnp.float32(0.0),
        }

    def logits(params, batch):
        return params["step_size"] * params["table"][batch["tokens"]]

    def nll(params, batch, shift=0.0):
        logs = jax.nn.log_softmax(logits(params, batch) + shift)
        return -jnp.take_along_axis(logs, batch["targets"][..., None], -1)[..., 0]

    def loss(params, batch, key):
        traces.append(1)
        # The key's own bits, spread over the vocabulary: a draw that compiles fast.
        bits = (jax.random.key_data(key)[:1] % 1000).astype(jnp.float32)
        shift = noise * jnp.sin(bits + jnp.arange(VOCAB))[None, None]
        tokens = batch["weights"].sum()
        mean = (nll(params, batch, shift) * batch["weights"]).sum()
        mean = mean / jnp.maximum(tokens, 1.0)
        if poison is not None:
            poisoned = jnp.isin(batch["index"], jnp.asarray(poison)).any()
            mean = mean * jnp.where(poisoned, jnp.nan, 1.0)
        return mean, {"loss": mean, "nll": mean, "tokens": tokens}

    def evaluate(params, batch, key, num_steps):
        value = nll(params, batch)
        steps = num_steps or 2
        energy = jnp.stack([value - i for i in range(steps + 1)])
        return {
            "nll": jnp.stack([value + 1.0 / (i + 1) for i in range(steps)]),
            "energy": energy,
            "gradient_norm": jnp.stack([value] * steps),
        }

    def predict(params, batch, key, num_steps):
        return logits(params, batch)

    objective = Objective(init, loss, evaluate, predict, recomputing(predict))
    return SimpleNamespace(objective=objective, traces=traces)


def small_config(**sections):
    """A config of the bigram run; `train={"steps": 7}` changes a section."""
    config = Config(
        model=ModelConfig(vocab_size=VOCAB),
        optim=OptimConfig(peak_lr=0.03, warmup_steps=3),
        train=TrainConfig(steps=12, batch_size=8),
        eval=EvalConfig(
            every=5,
            batch_size=8,
            curve_steps=0,
            sample_tokens=0,
            sample_temperature=0.0,
        ),
        checkpoint=CheckpointConfig(every=5),
        log=LogConfig(every=2, tensorboard=False, plots=False, compilation_cache=False),
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, context=CONTEXT)
    )
    for name, values in sections.items():
        section = dataclasses.replace(getattr(config, name), **values)
        config = dataclasses.replace(config, **{name: section})
    return resolve(config, VOCAB)


@pytest.fixture(scope="session")
def toy():
    """The pieces above, for the tests of this directory."""
    return SimpleNamespace(
        bigram=bigram,
        config=small_config,
        training_batches=training_batches,
        held_out_batches=held_out_batches,
        tokenizer=Letters(),
        vocab=VOCAB,
        context=CONTEXT,
        row=row,
    )
