"""Choosing tokens: probabilities, filters, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax.errors import UserError
from ebt_jax.evaluation.sampling import Sampling, check_sampling, choose


def drawn(sampling, probabilities=(0.4, 0.3, 0.2, 0.1), draws=4000):
    logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)), (draws, 4))
    keys = jax.random.split(jax.random.key(0), draws)
    return np.bincount(choose(logits, keys, sampling), minlength=4) / draws


def test_sampling_follows_the_probabilities():
    np.testing.assert_allclose(drawn(Sampling(1.0)), [0.4, 0.3, 0.2, 0.1], atol=0.03)
    square_root = np.sqrt([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(
        drawn(Sampling(2.0)), square_root / square_root.sum(), atol=0.03
    )


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (Sampling(1.0, top_k=2), [0.4, 0.3, 0, 0]),
        (Sampling(1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(1.0, top_p=0.69), [0.4, 0.3, 0, 0]),
        (Sampling(1.0, top_p=0.71), [0.4, 0.3, 0.2, 0]),
        (Sampling(1.0, top_p=1e-6), [1, 0, 0, 0]),
        (Sampling(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),  # 0.4 / 0.7 > 0.5
        (Sampling(0.0, top_k=2), [1, 0, 0, 0]),
    ],
)
def test_filters_leave_the_most_likely_tokens(sampling, left):
    expected = np.array(left) / np.sum(left)
    np.testing.assert_allclose(drawn(sampling), expected, atol=0.03)
    assert (drawn(sampling)[expected == 0] == 0).all()


def test_all_tokens_are_drawn_alike_with_and_without_a_sort():
    logits = jax.random.normal(jax.random.key(1), (64, 9))
    keys = jax.random.split(jax.random.key(2), 64)
    whole = choose(logits, keys, Sampling(0.7))
    np.testing.assert_array_equal(whole, choose(logits, keys, Sampling(0.7, top_k=9)))
    assert (whole != choose(logits, keys, Sampling())).any()


def test_the_likeliest_token_is_the_first_largest_logit():
    logits = jnp.array([[0.0, 2, 1, 2], [3, -1, -1, 3], [-4, -3, -2, -1], [0, 0, 0, 0]])
    keys = jax.random.split(jax.random.key(0), len(logits))
    assert choose(logits, keys, Sampling()).tolist() == [1, 0, 3, 0]
    nothing = choose(jnp.full((1, 4), jnp.nan), keys[:1], Sampling())
    assert 0 <= nothing[0] < 4


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-0.5), "temperature is -0.5.*negative"),
        (Sampling(temperature=float("nan")), "temperature is nan"),
        (Sampling(top_k=-1), "top_k is -1.*negative"),
        (Sampling(top_p=0.0), "top_p is 0.0.*above 0"),
        (Sampling(top_p=1.5), "top_p is 1.5.*at most 1"),
    ],
)
def test_errors(sampling, message):
    with pytest.raises(UserError, match=message):
        check_sampling(sampling)
