"""Attention: what is seen, and that blocks of it change no derivative of any order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax.models.attention import (
    Visible,
    attend,
    attend_in_pieces,
    rotate,
    rotation,
)

BATCH, HEADS, SEQ, KEYS, DIM = 2, 2, 7, 9, 4
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 3, 3], [1, 1, 2, 2, 2, 2, 2, 2, 2]])
CASES = {
    "causal": Visible(jnp.arange(SEQ)[None] + 1),
    "ragged": Visible(jnp.array([[0, 0, 3, 4, 4, 8, 8], [2, 2, 2, 2, 2, 2, 2]])),
    "packed": Visible(jnp.arange(SEQ)[None] + 2, SEGMENTS[:, 2:], SEGMENTS),
    "packed behind a step token": Visible(
        jnp.arange(SEQ)[None] + 2, SEGMENTS[:, 2:], SEGMENTS.at[:, 0].set(-1)
    ),
}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(with_own=True):
    query = draw(BATCH, HEADS, SEQ, DIM)
    keys, values = draw(2, BATCH, HEADS, KEYS, DIM, seed=1)
    own = draw(2, BATCH, HEADS, SEQ, DIM, seed=2)
    return query, keys, values, tuple(own) if with_own else None


def test_rotation_turns_pairs_by_position_times_frequency():
    x = draw(1, 1, 3, 4)
    turned = rotate(x, rotation(jnp.array([0, 1, 7]), 4, x.dtype))
    for j, position in enumerate([0, 1, 7]):
        for pair, frequency in enumerate([1.0, 0.01]):
            plane = complex(x[0, 0, j, pair], x[0, 0, j, 2 + pair])
            expected = plane * np.exp(1j * position * frequency)
            actual = complex(turned[0, 0, j, pair], turned[0, 0, j, 2 + pair])
            np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("block", [0, 2])
def test_attention_to_itself_is_one_more_key(block):
    """Also where nothing else is visible, and with scores that would overflow."""
    query, keys, values, own = inputs()
    query = 30 * query
    visible = Visible(jnp.array([[-1, 0, 3, 4, 4, 8, 8]]))
    out = attend(query, keys, values, visible, own, block)
    for b, h, j in np.ndindex(BATCH, HEADS, SEQ):
        count = int(visible.last[0, j]) + 1
        k = np.concatenate([keys[b, h, :count], own[0][b, h, j : j + 1]])
        v = np.concatenate([values[b, h, :count], own[1][b, h, j : j + 1]])
        scores = k @ np.asarray(query[b, h, j]) / 2
        weights = np.exp(scores - scores.max())
        expected = weights @ v / weights.sum()
        np.testing.assert_allclose(out[b, h, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one", "packed"])
def test_pieces_of_a_sequence_attend_as_the_whole(segments):
    """With a last piece that is shorter."""
    query, keys, values = draw(3, BATCH, HEADS, KEYS, DIM)
    visible = Visible(jnp.arange(KEYS)[None], segments, segments)
    pieces = attend_in_pieces(query, keys, values, visible, 4)
    expected = attend(query, keys, values, visible)
    np.testing.assert_allclose(pieces, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_blocks_change_neither_values_nor_first_nor_second_derivatives(name, with_own):
    """With blocks that divide neither the queries nor the keys."""
    arguments, visible = inputs(with_own), CASES[name]
    along = jax.tree.map(lambda x: draw(*x.shape, seed=3), arguments)

    def derivatives(block):
        def loss(query, keys, values, own):
            return jnp.sum(attend(query, keys, values, visible, own, block) ** 3)

        gradient = jax.grad(loss, argnums=(0, 1, 2, 3))

        def slope(arguments):
            leaves = zip(
                jax.tree.leaves(gradient(*arguments)),
                jax.tree.leaves(along),
                strict=True,
            )
            return sum(jnp.vdot(g, u) for g, u in leaves)

        forward = jax.jvp(lambda *a: gradient(*a), arguments, along)[1]
        reverse = jax.grad(slope)(arguments)
        return loss(*arguments), gradient(*arguments), forward, reverse

    exact, blocked = (jax.jit(derivatives, static_argnums=0)(b) for b in (0, 4))
    for a, b in zip(jax.tree.leaves(blocked), jax.tree.leaves(exact), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-6)
    # Second derivatives are symmetric.
    for a, b in zip(*map(jax.tree.leaves, exact[2:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_blocks_keep_no_array_of_queries_by_keys():
    """Temporary memory of a second derivative grows with the length, not its square."""

    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
        visible = Visible(jnp.arange(length)[None])

        def gradient(query, keys):
            loss = lambda q, k: jnp.sum(attend(q, k, k, visible, block=64) ** 2)
            return jax.grad(loss, argnums=(0, 1))(query, keys)

        second = lambda q, k: jax.jvp(lambda q: gradient(q, k), (q,), (q,))[1]
        compiled = jax.jit(second).lower(shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.3 * temporary(1024)
