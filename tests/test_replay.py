"""What is kept, what is replayed, and what cannot be asked for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, tiny

from ebt_jax import replay
from ebt_jax.errors import UserError
from ebt_jax.objective_config import ObjectiveConfig, system_2
from ebt_jax.replay import EMPTY, NONE, ReplayConfig
from ebt_jax.training.config import Config, MeshConfig, TrainConfig, from_json, to_json
from ebt_jax.training.resolve import resolve
from ebt_jax.training.sharding import check_replay, make_mesh

KEY = jax.random.key(3)
SEQ = 5


def items(start, count):
    """Sequences that are their own number."""
    numbers = jnp.arange(start, start + count, dtype=jnp.float32)
    batch = {"tokens": numbers[:, None].astype(jnp.int32), "weights": 1 + 0 * numbers}
    return batch, numbers[:, None, None] * jnp.ones((1, 1, 3))


def empty(**fields):
    return replay.empty(ReplayConfig(**fields), *items(0, 1))


def held(buffer):
    """Numbers of the sequences in a buffer, the newest first, by their candidates."""
    there = sorted((int(a), i) for i, a in enumerate(buffer.age) if a != EMPTY)
    tokens = [int(buffer.batch["tokens"][i, 0]) for _, i in there]
    assert tokens == [int(buffer.candidate[i, 0, 0]) for _, i in there]
    return tokens


def test_first_in_first_out():
    buffer, known, push = empty(capacity=7), [], jax.jit(replay.push)
    for start, count in ((0, 3), (3, 3), (6, 3), (9, 1), (10, 7), (17, 5), (22, 3)):
        buffer = push(buffer, *items(start, count))
        known = [*reversed(range(start, start + count)), *known][:7]
        assert held(buffer) == known


def test_a_share_is_a_buffer_and_shares_make_one():
    # As of a run that goes on with another number of devices.
    left, right = empty(capacity=4), empty(capacity=4)
    for start in (0, 20):
        left = replay.push(left, *items(start, 3))
        right = replay.push(right, *items(start + 10, 3))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), left, right)
    assert held(both) == [22, 32, 21, 31, 20, 30, 2, 12]
    assert set(held(replay.push(both, *items(40, 6)))) == {*range(40, 46), 22, 32}
    half = jax.tree.map(lambda x: x[:4], both)
    assert held(replay.push(half, *items(50, 2))) == [51, 50, 22, 21]


def test_candidates_that_are_not_finite_are_not_kept():
    batch, candidate = items(0, 4)
    candidate = candidate.at[1, 0, 2].set(jnp.nan).at[2, 0, 0].set(jnp.inf)
    buffer = replay.push(empty(capacity=5), batch, candidate)
    assert held(buffer) == [3, 0]
    rows = replay.sample(buffer, KEY, 5)
    assert np.isfinite(buffer.candidate[rows[rows != NONE]]).all()


def test_a_sample_is_uniform_and_without_replacement():
    buffer = replay.push(empty(capacity=6), *items(0, 4))
    draw = jax.jit(jax.vmap(lambda key: replay.sample(buffer, key, 2)))
    rows = np.asarray(draw(jax.random.split(KEY, 3000)))
    assert (rows[:, 0] != rows[:, 1]).all()
    there = np.asarray(buffer.age) != EMPTY
    counts = np.bincount(rows.ravel(), minlength=6)
    assert counts[~there].sum() == 0
    # 1,500 of each, with a standard deviation of sqrt(3000 / 4) = 27
    np.testing.assert_allclose(counts[there], 1500, atol=5 * 27)


def test_where_there_are_too_few_the_rest_weighs_nothing():
    buffer = replay.push(empty(capacity=6), *items(5, 2))
    rows = replay.sample(buffer, KEY, 4)
    assert sorted(map(int, rows[:2])) == sorted(np.flatnonzero(buffer.age != EMPTY))
    assert rows[2:].tolist() == [NONE, NONE]
    found = replay.sequences(buffer, rows)
    assert found["weights"].tolist() == [1, 1, 0, 0]
    assert {*map(int, found["tokens"][:2, 0])} == {5, 6}
    assert (replay.sample(empty(capacity=6), KEY, 4) == NONE).all()


def test_float32_is_kept_as_it_is_and_bfloat16_rounded():
    z = 30 * jax.random.normal(KEY, (4, SEQ, 40))
    whole = replay.restored(replay.kept(z, ReplayConfig()), ReplayConfig(), z)
    assert (whole == z).all()
    config = ReplayConfig(dtype="bfloat16")
    found = replay.kept(z, config)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(replay.restored(found, config, z), z, rtol=2**-8)


def test_top_k_keeps_the_probability_of_each_and_of_the_rest():
    z = 4 * jax.random.normal(KEY, (3, SEQ, 40))
    config = ReplayConfig(top_k=6)
    found = replay.kept(z, config)
    assert found.values.shape == found.indices.shape == (3, SEQ, 6)
    before = np.asarray(jax.nn.softmax(z))
    after = np.asarray(jax.nn.softmax(replay.restored(found, config, z)))
    order = np.argsort(-before, axis=-1)
    top = lambda p: np.take_along_axis(p, order[..., :6], axis=-1)
    rest = lambda p: np.take_along_axis(p, order[..., 6:], axis=-1)
    np.testing.assert_allclose(top(after), top(before), rtol=1e-5)
    mean = rest(before).mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        rest(after), np.broadcast_to(mean, rest(after).shape), rtol=1e-4
    )


def test_what_is_kept_takes_the_memory_it_should():
    shape = jax.ShapeDtypeStruct((1, 256, 50_000), jnp.float32)
    tokens = {"tokens": jax.ShapeDtypeStruct((1, 256), jnp.int32)}

    def size(**fields):
        config = ReplayConfig(capacity=192, **fields)
        form = jax.eval_shape(lambda: replay.empty(config, tokens, shape).candidate)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(form))

    predictions = 192 * 256
    assert size() == predictions * 50_000 * 4
    assert size(dtype="bfloat16") == size() / 2
    assert size(top_k=64, dtype="bfloat16") == predictions * (64 * 6 + 2)


def test_a_config_from_before_there_was_replay_is_read():
    config = Config()
    tree = json.loads(to_json(config))
    del tree["replay"]
    assert from_json(json.dumps(tree)) == config
    del tree["refine"]
    with pytest.raises(UserError, match="lacks"):
        from_json(json.dumps(tree))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": -1}, "capacity is -1, but has to be positive, or 0"),
        ({"fraction": 0.0}, r"fraction is 0.0, but has to be in \(0, 1\]"),
        ({"fraction": 1.5}, r"fraction is 1.5, but has to be in \(0, 1\]"),
        ({"dtype": "int8"}, "dtype is 'int8', but has to be one of float32, bfloat16"),
        ({"top_k": -2}, "top_k is -2, but has to be positive, or 0"),
    ],
)
def test_values_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        ReplayConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity": 12}, "capacity is 12, which the 8 devices .* do not divide"),
        (
            {"capacity": 24},
            "capacity is 24, 3 for each of 8 devices, but a device's share of a batch "
            "is 4 sequences .* raise it to at least 32, or set it to 0",
        ),
        (
            {"capacity": 32, "fraction": 0.2},
            "fraction is 0.2, which of a device's share of a batch, 4 sequences, is "
            "none; raise it to at least 0.25",
        ),
    ],
)
def test_a_share_that_does_not_suit_is_refused(fields, message):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    config = TrainConfig(batch_size=64, accumulation=2)
    with pytest.raises(UserError, match=f"replay.{message}"):
        check_replay(ReplayConfig(**fields), config, mesh)
    check_replay(ReplayConfig(capacity=32), config, mesh)
    check_replay(ReplayConfig(), config, mesh)


def test_more_entries_than_there_are_cannot_be_kept():
    with pytest.raises(UserError, match="replay.top_k is 11, but .* have 11 entries"):
        resolve(Config(replay=ReplayConfig(capacity=8, top_k=VOCAB)), VOCAB)
    with pytest.raises(ValueError, match="top_k is 3, but candidates have 3 entries"):
        empty(capacity=2, top_k=3)


def test_a_model_that_refines_nothing_replays_nothing():
    with pytest.raises(UserError, match="replay.capacity is 8, .* refines nothing"):
        Config(
            model=tiny(kind="transformer_pp", num_landscapes=1),
            refine=system_2(5.0, 3.0)[0],
            objective=ObjectiveConfig(loss_steps="last"),
            replay=ReplayConfig(capacity=8),
        )
