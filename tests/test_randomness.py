"""Draws that belong to a prediction, not to a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax import randomness

KEY = jax.random.key(7)


def data(key):
    return np.asarray(jax.random.key_data(key))


def test_prediction_keys_are_all_different():
    keys = data(randomness.prediction_keys(KEY, jnp.arange(4), jnp.arange(6))).reshape(
        24, -1
    )
    assert len({tuple(key) for key in keys}) == 24


def test_prediction_keys_depend_on_sequence_and_position_alone():
    whole = data(randomness.prediction_keys(KEY, jnp.array([3, 9, 5]), jnp.arange(6)))
    part = data(randomness.prediction_keys(KEY, jnp.array([5, 3]), jnp.arange(4)))
    np.testing.assert_array_equal(part, whole[[2, 0], :4])
    other = data(
        randomness.prediction_keys(jax.random.key(8), jnp.array([3]), jnp.arange(6))
    )
    assert (other != whole[:1]).any(axis=-1).all()


@pytest.mark.parametrize("draw", [randomness.normal, randomness.uniform])
def test_draws_by_a_key_per_prediction_do_not_depend_on_the_layout(draw):
    keys = randomness.prediction_keys(KEY, jnp.arange(3), jnp.arange(4))
    whole = draw(keys, (3, 4, 5), jnp.float32)
    assert whole.shape == (3, 4, 5) and whole.dtype == jnp.float32
    part = draw(keys[1:, 2:], (2, 2, 5), jnp.float32)
    np.testing.assert_array_equal(part, whole[1:, 2:])


def test_a_scalar_key_draws_the_whole_array():
    expected = jax.random.normal(KEY, (3, 4), jnp.float32)
    actual = randomness.normal(KEY, (3, 4), jnp.float32)
    np.testing.assert_array_equal(actual, expected)


def test_fold_in_folds_into_each_of_an_array_of_keys():
    keys = jax.random.split(KEY, 6).reshape(2, 3)
    folded = randomness.fold_in(keys, 4)
    assert folded.shape == (2, 3)
    expected = jax.random.fold_in(keys[1, 2], 4)
    np.testing.assert_array_equal(data(folded[1, 2]), data(expected))


def test_raw_keys_become_typed_ones():
    raw = jax.random.PRNGKey(7)
    np.testing.assert_array_equal(data(randomness.typed(raw)), data(KEY))
    assert randomness.typed(KEY) is KEY


def test_leaves_of_a_tree_get_normals_of_their_own():
    tree = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3)), "c": jnp.zeros((2,))}
    drawn = randomness.normal_like(KEY, tree, 1)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, tree)
    assert (drawn["a"] != drawn["b"]).all()


def test_keys_that_are_not_one_for_each_prediction_are_refused():
    with pytest.raises(ValueError, match=r"key has shape \(3,\).*scalar or one.*\(2,"):
        randomness.normal_like(jax.random.split(KEY, 3), jnp.zeros((2, 5)), 1)
