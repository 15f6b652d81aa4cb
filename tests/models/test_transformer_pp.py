"""The baseline: the same blocks, one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, tiny

from ebt_jax.models.text import cross_entropy, transformer_pp

BATCH, SEQ = 2, 5


def tokens():
    ids = np.random.default_rng(0).integers(VOCAB, size=(BATCH, SEQ))
    return jnp.asarray(ids, jnp.int32)


@pytest.fixture(scope="module")
def baseline():
    model = transformer_pp(tiny(kind="transformer_pp"))
    return jax.jit(model.init)(jax.random.key(0)), jax.jit(model.predict)


def test_logits_are_float32_and_finite(baseline):
    params, predict = baseline
    logits = predict(params, {"tokens": tokens()})
    assert logits.shape == (BATCH, SEQ, VOCAB) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


def test_the_future_does_not_leak(baseline):
    params, predict = baseline
    logits = predict(params, {"tokens": tokens()})
    for j in range(SEQ):
        moved = tokens().at[0, j].set((tokens()[0, j] + 1) % VOCAB)
        new = predict(params, {"tokens": moved})
        np.testing.assert_allclose(new[0, :j], logits[0, :j], atol=1e-5)
        np.testing.assert_allclose(new[1], logits[1], atol=1e-5)
        assert (np.abs(new[0, j:] - logits[0, j:]).max(axis=-1) > 1e-6).all()


def test_packed_documents_are_scored_as_each_alone(baseline):
    params, predict = baseline
    row = tokens()
    packed = {
        "tokens": row,
        "segments": jnp.array([[1, 1, 2, 2, 2]] * 2),
        "positions": jnp.array([[0, 1, 0, 1, 2]] * 2),
    }
    logits = predict(params, packed)
    for part in (slice(0, 2), slice(2, 5)):
        alone = predict(params, {"tokens": row[:, part]})
        np.testing.assert_allclose(logits[:, part], alone, atol=1e-5)


def test_bfloat16_stays_near_with_float32_logits(baseline):
    params, predict = baseline
    exact = predict(params, {"tokens": tokens()})
    half = transformer_pp(tiny(kind="transformer_pp", dtype="bfloat16"))
    half = half.predict(params, {"tokens": tokens()})
    assert half.dtype == jnp.float32
    scale = np.abs(exact).max()
    assert 0 < np.abs(half - exact).max() < 0.05 * scale


def test_it_has_no_energy_and_no_steps(baseline):
    params, _ = baseline
    assert set(params) == {"embed", "blocks", "final_norm", "output"}


def test_cross_entropy_equals_the_formula_with_and_without_smoothing():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, SEQ, VOCAB)))
    log_prob = np.asarray(jax.nn.log_softmax(logits))
    target = np.eye(VOCAB)[np.asarray(tokens())]
    for smoothing in (0.0, 0.3):
        mixed = (1 - smoothing) * target + smoothing / VOCAB
        expected = -(mixed * log_prob).sum(axis=-1)
        for value in (smoothing, jnp.float32(smoothing)):
            actual = cross_entropy(logits, {"targets": tokens()}, value)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
