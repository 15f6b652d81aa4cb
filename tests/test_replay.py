"""What is kept, what is replayed, and that training with it is what it should be."""

import dataclasses
import json
import pathlib
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from test_golden import load_golden
from tiny import QUICK, VOCAB, tiny

from ebt_jax import interop, models, replay
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Draws
from ebt_jax.objective_config import ObjectiveConfig, system_2
from ebt_jax.objectives import refined
from ebt_jax.refine import Schedule
from ebt_jax.replay import EMPTY, NONE, ReplayConfig
from ebt_jax.training import checkpoint
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    MeshConfig,
    TrainConfig,
    from_json,
    resolve,
    to_json,
)
from ebt_jax.training.guard import new_guard
from ebt_jax.training.objective import build_objective
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import (
    check_replay,
    global_batch,
    make_mesh,
    state_shardings,
    state_target,
)
from ebt_jax.training.step import TrainState, init_state, make_step, saved_form

CASE = pathlib.Path(__file__).parent / "golden" / "text_time_embed_s2_replay.npz"
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


@pytest.mark.parametrize("meta_gradient", ["rule", "autodiff"])
def test_the_published_codes_numbers_come_through_the_buffer(meta_gradient):
    golden = load_golden()
    with np.load(CASE) as file:
        case = dict(file)
    config = interop.config_from_reference(json.loads(str(case["config"])))
    params = interop.from_reference(
        {k[6:]: v for k, v in case.items() if k.startswith("param/")}, config
    )
    whole = golden.text_batch(case["in/tokens"])
    fresh, old = ({k: v[i : i + 1] for k, v in whole.items()} for i in (0, 1))
    objective = refined(
        models.build(config.model),
        dataclasses.replace(config.refine, meta_gradient=meta_gradient),
        config.objective,
        ReplayConfig(capacity=3, fraction=1.0),
        {name: fresh[name] for name in ("tokens", "targets", "weights")},
    )
    assert objective.replaying is not None
    stored = jnp.asarray(case["in/replay_init_last_rows"])
    buffer = replay.push(objective.replaying.empty(), old, stored)
    initial = case["in/init"].copy()
    initial[1] = np.nan  # is not looked at
    draws = Draws(
        candidate=initial,
        noise=case["in/langevin_normal"],
        jitter=case["in/step_size_uniform"],
        schedule=Schedule(jnp.zeros(3, jnp.int32), 3),
    )
    function = jax.value_and_grad(objective.replaying.loss, has_aux=True)
    program = jax.jit(function, compiler_options=QUICK)
    (loss, (metrics, buffer)), gradient = program(params, fresh, KEY, buffer, draws)
    error = golden.relative_error
    assert error(loss, case["out/loss"]) < 1e-4
    assert metrics["tokens"] == whole["weights"].sum()
    assert metrics["replayed"] == old["weights"].sum() / whole["weights"].sum()
    for name, array in interop.to_reference(gradient, config).items():
        if f"grad/{name}" in case:
            assert error(array, case[f"grad/{name}"]) < 1e-4, name
    # The fresh sequence is kept with its final state, the other one stays as it is.
    assert sorted(map(int, buffer.age)) == [0, 1, EMPTY]
    new, before = (int(jnp.argmax(buffer.age == age)) for age in (0, 1))
    assert (buffer.batch["tokens"][new] == fresh["tokens"][0]).all()
    assert error(buffer.candidate[new], case["out/predictions"][-1, 0]) < 1e-4
    assert (buffer.candidate[before] == stored[0]).all()


def config_of(rows=4, accumulation=1, context=SEQ, mesh=1, **replayed):
    refine, scored = system_2(step_size=5.0, noise_std=3.0)
    config = Config(
        model=tiny(num_layers=1, num_landscapes=1, unroll=0),
        refine=dataclasses.replace(refine, block=6),
        objective=scored,
        replay=ReplayConfig(**{"capacity": 8, **replayed}),
        data=DataConfig(context=context),
        train=TrainConfig(batch_size=rows, accumulation=accumulation),
        mesh=MeshConfig(data=mesh),
    )
    return resolve(config, VOCAB)


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda: rng.integers(VOCAB, size=(rows, SEQ)).astype(np.int32)
    weights = (rng.random((rows, SEQ)) < 0.8).astype(np.float32)
    tokens = {"tokens": ids(), "targets": ids(), "weights": weights}
    return {**tokens, "index": np.arange(rows, dtype=np.int32)}


def test_blocks_give_what_refine_gives():
    # Blocks of 6 of 6 sequences of 5: some sequences, and parts of them, at a time.
    config = config_of()
    params, results = None, []
    for way in ("rule", "autodiff"):
        refine = dataclasses.replace(config.refine, meta_gradient=way)
        objective = build_objective(dataclasses.replace(config, refine=refine))
        assert objective.replaying is not None
        params = objective.init(KEY) if params is None else params
        buffer = objective.replaying.empty()
        function = jax.value_and_grad(objective.replaying.loss, has_aux=True)
        program = jax.jit(function, compiler_options=QUICK)
        for seed in range(3):
            key = jax.random.fold_in(KEY, seed)
            aux, gradient = program(params, batch_of(4, seed), key, buffer)
            loss, (metrics, buffer) = aux
        results.append((loss, metrics, gradient, buffer))
    fast, plain = results
    assert fast[1]["replayed"] > 0.2
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max())


def run(config, steps):
    """State and metrics after some steps, and what they were made with."""
    objective = build_objective(config)
    optimizer, mesh = optax.sgd(1e-3), make_mesh(config.mesh)
    parts, rows = config.train.accumulation, config.train.batch_size
    init = lambda: init_state(objective, optimizer, 3)
    shardings = state_shardings(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=shardings)()
    step = make_step(objective, optimizer, seed=3, accumulation=parts, mesh=mesh)
    compiled, tokens = None, []
    for i in range(steps):
        batch = global_batch(batch_of(rows, i), mesh, rows)
        if compiled is None:
            compiled = step.lower(state, batch).compile(QUICK)
        before = state.replay
        state, metrics = compiled(state, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))  # donated
        tokens.append(batch_of(rows, i)["tokens"])
    return types.SimpleNamespace(
        state=state,
        metrics=metrics,
        tokens=tokens,
        target=state_target(jax.eval_shape(init), mesh),
        again=lambda state: compiled(state, batch)[0],
        text=compiled.as_text(),
    )


def test_parts_of_a_batch_are_kept_one_after_the_other():
    config = config_of(rows=4, accumulation=2, capacity=5)
    made = run(config, 2)
    first, second = made.tokens
    # Every second sequence makes a part; the last five that came are there.
    came = [*first[::2], *first[1::2], *second[::2], *second[1::2]]
    order = np.argsort(-np.asarray(made.state.replay.age))
    assert (made.state.replay.batch["tokens"][order] == np.stack(came[-5:])).all()
    assert 0.2 < made.metrics["replayed"] < 0.5
    assert made.metrics["skipped_total"] == 0


@pytest.fixture(scope="module")
def on_four_devices():
    config = config_of(rows=8, mesh=4, capacity=12, dtype="bfloat16", top_k=4)
    return run(config, 2)


def test_each_device_keeps_a_share_of_its_own(on_four_devices):
    made = on_four_devices
    buffer = made.state.replay
    for shard in buffer.batch["tokens"].addressable_shards:
        device = shard.index[0].start // 3
        own = [tokens[2 * device : 2 * device + 2] for tokens in made.tokens]
        came = {tuple(row) for row in np.concatenate(own)[-3:]}
        assert {tuple(row) for row in np.asarray(shard.data)} == came
    assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(buffer)} == {
        ("data", "fsdp")
    }
    assert made.metrics["replayed"] > 0.2
    assert "all-gather" not in made.text  # nothing of the buffer is sent


def test_a_checkpoint_continues_bit_for_bit_and_on_other_devices(
    on_four_devices, tmp_path
):
    made, config = on_four_devices, config_of()
    with Saver(tmp_path, CheckpointConfig()) as saver:
        saver.save(2, made.state, 16, config, wait=True)
    restored = checkpoint.restore(tmp_path, 2, made.target).state
    on_two = state_target(made.target, make_mesh(MeshConfig(data=2)))
    buffer = checkpoint.restore(tmp_path, 2, on_two).state.replay
    same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(same, buffer, made.state.replay)
    assert len(buffer.age.addressable_shards[0].data) == 6
    jax.tree.map(same, made.again(restored), made.again(made.state))


class Before(NamedTuple):
    """A training state from before there was replay."""

    params: Any
    opt_state: Any
    step: Any
    guard: Any


def test_checkpoints_without_replay_are_as_before_there_was_one(tmp_path):
    params = {"w": jnp.arange(3.0)}
    before = Before(params, optax.adam(1.0).init(params), jnp.int32(4), new_guard())
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(before),
        data=ocp.args.JsonSave({"next_example": 3}),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(checkpoint.directory_of(tmp_path, 4), args=items)
    state = TrainState(*before)
    target = state_target(jax.eval_shape(lambda: state), make_mesh(MeshConfig()))
    restored = checkpoint.restore(tmp_path, 4, target)
    assert restored.next_example == 3 and restored.state.replay == ()
    assert (restored.state.params["w"] == params["w"]).all()
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert saved_form(state).keys() == set(Before._fields)


def test_without_replay_the_state_has_nothing_of_it():
    config = config_of(capacity=0)
    objective = build_objective(config)
    state = jax.eval_shape(lambda: init_state(objective, optax.sgd(1.0), 0))
    assert objective.replaying is None and state.replay == ()


def test_a_config_from_before_there_was_replay_is_read():
    config = config_of(capacity=0)
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
        config_of(top_k=VOCAB)
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
