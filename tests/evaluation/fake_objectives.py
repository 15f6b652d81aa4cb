"""Objectives small enough to know the right answer of."""

import jax
import jax.numpy as jnp
import numpy as np
from decoding import recomputing

from ebt_jax.interfaces import Objective

VOCAB = 256


class Bytes:
    """The byte tokenizer, as far as generation knows it."""

    vocab_size = VOCAB

    def encode(self, text, /):
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids, /):
        return bytes(int(i) for i in ids).decode(errors="replace")


def cross_entropy(logits, batch):
    picked = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def with_predict(predict):
    """A feed-forward objective that predicts as given."""
    return bigram()._replace(predict=predict, decoder=recomputing(predict))


def bigram(vocab=VOCAB):
    """Feed-forward: the logits of a token are a row of a table."""

    def init(key):
        return {"table": jax.random.normal(key, (vocab, vocab))}

    def predict(params, batch, key, thinking):
        return params["table"][batch["tokens"]]

    def evaluate(params, batch, key, num_steps):
        logits = params["table"][batch["tokens"]]
        return {"nll": cross_entropy(logits, batch)[None]}

    def loss(params, batch, key):
        nll = evaluate(params, batch, key, 0)["nll"][0]
        return (nll * batch["weights"]).sum() / batch["weights"].sum(), {}

    return Objective(init, loss, evaluate, predict, recomputing(predict))


def thinker(trained_steps=3, vocab=VOCAB):
    """Noise that is pulled half-way to the prefix's mean embedding at every step.

    The energy is half the squared distance to it, so it and its gradient are known.
    """

    def init(key):
        return {"table": 3 * jax.random.normal(key, (vocab, vocab))}

    def states(params, batch, key, num_steps):
        rows = params["table"][batch["tokens"]]
        counts = jnp.arange(1, rows.shape[1] + 1)[:, None]
        goal = jnp.cumsum(rows, axis=1) / counts[None]
        draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), rows.shape[1:])
        logits = jax.vmap(draw)(batch["index"])
        distances = [logits - goal]
        for _ in range(num_steps or trained_steps):
            distances.append(distances[-1] / 2)
        return goal, jnp.stack(distances)

    def evaluate(params, batch, key, num_steps):
        goal, distances = states(params, batch, key, num_steps)
        nll = jax.vmap(lambda d: cross_entropy(goal + d, batch))(distances[1:])
        squares = jnp.square(distances).sum(-1)
        return {
            "nll": nll,
            "energy": squares / 2,
            "gradient_norm": jnp.sqrt(squares[:-1]),
        }

    def predict(params, batch, key, thinking):
        goal, distances = states(params, batch, key, thinking.num_steps)
        return goal + distances[-1]

    def loss(params, batch, key):
        nll = evaluate(params, batch, key, 0)["nll"].mean(0)
        return (nll * batch["weights"]).sum() / batch["weights"].sum(), {}

    return Objective(init, loss, evaluate, predict, recomputing(predict))


def batches(batch_size, sequences=12, length=7, vocab=VOCAB):
    """The same sequences in batches of any size, the last filled up with weight 0."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocab, (sequences, length + 1)).astype(np.int32)
    weights = generator.integers(0, 2, (sequences, length)).astype(np.float32)
    sizes = generator.integers(1, 5, (sequences, length)).astype(np.float32)
    for start in range(0, sequences, batch_size):
        rows = np.arange(start, start + batch_size)
        inside = rows < sequences
        rows = np.where(inside, rows, 0)
        yield {
            "tokens": tokens[rows, :-1],
            "targets": tokens[rows, 1:],
            "weights": weights[rows] * inside[:, None].astype(np.float32),
            "bytes": sizes[rows],
            "index": rows.astype(np.int32),
        }
