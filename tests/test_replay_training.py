"""Training with a replay buffer: its numbers, parts, devices and checkpoints."""

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
from ebt_jax.evaluation.planning import candidate_shape, kept_bytes, memory_table
from ebt_jax.interfaces import Draws
from ebt_jax.objective_config import system_2
from ebt_jax.objectives import refined
from ebt_jax.refine import Schedule
from ebt_jax.replay import EMPTY, ReplayConfig
from ebt_jax.training import checkpoint
from ebt_jax.training.config import CheckpointConfig, Config, MeshConfig, TrainConfig
from ebt_jax.training.guard import new_guard
from ebt_jax.training.objective import build_objective
from ebt_jax.training.resolve import resolve, scored_sequences
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import (
    global_batch,
    make_mesh,
    state_shardings,
    state_target,
)
from ebt_jax.training.step import TrainState, init_state, make_step, saved_form

CASE = pathlib.Path(__file__).parent / "golden" / "text_time_embed_s2_replay.npz"
KEY = jax.random.key(3)
SEQ = 5


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
        state, metrics = compiled(state, batch, step.key)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))  # donated
        tokens.append(batch_of(rows, i)["tokens"])
    return types.SimpleNamespace(
        state=state,
        metrics=metrics,
        tokens=tokens,
        target=state_target(jax.eval_shape(init), mesh),
        again=lambda state: compiled(state, batch, step.key)[0],
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


def test_the_plan_of_a_devices_memory_has_the_buffer():
    config = config_of(rows=8, mesh=2, capacity=1200, fraction=0.25)
    objective, mesh = build_objective(config), make_mesh(config.mesh)
    init = lambda: init_state(objective, optax.sgd(1.0), 0)
    state = state_target(jax.eval_shape(init), mesh)
    memory = types.SimpleNamespace(temp_size_in_bytes=0, argument_size_in_bytes=0)
    compiled = types.SimpleNamespace(memory_analysis=lambda: memory)
    text = memory_table(config, state, mesh, compiled, 0)
    # Of a prediction: 11 entries, token, target and weight; of a sequence, its age.
    held = 600 * (SEQ * 4 * (VOCAB + 3) + 4)
    assert f"replay buffer {held / 2**20:>15.1f} MiB\n" in text
    assert kept_bytes(config, state, mesh) == (4 + 1) * SEQ * 4 * VOCAB
    assert "kept candidates" in text and "on their way to the buffer" in text
    assert candidate_shape(config, mesh) == (6, VOCAB)  # a block
    assert scored_sequences(config, 2) == 10


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
