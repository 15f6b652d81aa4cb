"""Training on frames: devices, the replay buffer, what is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import QUICK

from ebt_jax import replay
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Draws
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, system_2
from ebt_jax.refine import Schedule
from ebt_jax.replay import ReplayConfig
from ebt_jax.training.config import Config, MeshConfig, TrainConfig
from ebt_jax.training.objective import batch_shapes, build_objective
from ebt_jax.training.sharding import (
    global_batch,
    make_mesh,
    state_shardings,
    state_target,
)
from ebt_jax.training.step import init_state, make_step

BATCH, SEQ, FRAME = 8, 4, 6
MODEL = ModelConfig(
    space="video",
    num_layers=1,
    num_heads=2,
    dim=8,
    frame_size=FRAME,
    num_landscapes=1,
)
REFINE, SCORED = system_2(step_size=3.0, noise_std=1.0)
SYSTEM_2 = Config(
    model=MODEL,
    refine=REFINE,
    objective=SCORED,
    data=DataConfig(context=SEQ),
    train=TrainConfig(batch_size=BATCH),
)
KEY = jax.random.key(0)


def batch(rows=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    clips = rng.normal(size=(rows, SEQ + 1, FRAME)).astype(np.float32)
    weights = (rng.random((rows, SEQ)) < 0.7).astype(np.float32)
    return {"frames": clips[:, :-1], "targets": clips[:, 1:], "weights": weights}


def step_on(mesh):
    """Metrics and gradients of a compiled System-2 step, in float64."""
    with jax.enable_x64(True):
        objective = build_objective(dataclasses.replace(SYSTEM_2, mesh=mesh))
        plain, mesh = objective.init, make_mesh(mesh)
        precise = lambda key: jax.tree.map(lambda x: x.astype(float), plain(key))
        objective = objective._replace(init=precise)
        # Its update is the gradient.
        step = make_step(objective, optax.sgd(1.0), seed=3, mesh=mesh)
        init = lambda: init_state(objective, optax.sgd(1.0), 3)
        shapes = jax.eval_shape(init)
        before = jax.jit(init, out_shardings=state_shardings(shapes, mesh))()
        rows = global_batch(batch(), mesh, BATCH)
        compiled = step.lower(state_target(shapes, mesh), rows).compile(QUICK)
        start = jax.device_get(before.params)
        after, metrics = compiled(before, rows, step.key)
        gradient = jax.tree.map(np.subtract, start, jax.device_get(after.params))
        return jax.device_get(metrics), gradient


def test_several_devices_equal_one():
    """Noise, step sizes and the number of steps are drawn alike."""
    metrics, gradient = step_on(MeshConfig(data=1))
    found, other = step_on(MeshConfig(data=2, fsdp=4))
    for key, value in metrics.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=key)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(other),
        strict=True,
    ):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), jax.tree_util.keystr(path)
    assert np.abs(gradient["frame_embed"]["kernel"]).max() > 0
    assert metrics["refine_steps"] in (2, 3) and "smooth_l1" in metrics


def test_batches_are_of_the_shapes_that_are_told():
    shapes = batch_shapes(SYSTEM_2)
    assert {n: s.shape for n, s in shapes.items() if n != "index"} == {
        name: array.shape for name, array in batch().items()
    }
    assert {s.dtype.name for n, s in shapes.items() if n != "index"} == {"float32"}


def test_replayed_clips_begin_where_their_frames_were_left():
    """As if their initial candidates had been given, and all at once."""
    config = dataclasses.replace(SYSTEM_2, replay=ReplayConfig(capacity=4, fraction=1))
    objective = build_objective(config)
    assert objective.replaying is not None
    whole = jax.tree.map(jnp.asarray, batch(4))
    fresh, old = ({k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2))
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    shapes = jax.eval_shape(objective.init, KEY)
    params = jax.tree.map(lambda s: 0.5 * draw(*s.shape), shapes)
    params |= {"step_size": jnp.float32(3), "noise_std": jnp.float32(1)}
    stored, first = draw(2, SEQ, FRAME), draw(2, SEQ, FRAME)
    draws = Draws(
        candidate=jnp.concatenate([first, stored]),
        noise=draw(3, 4, SEQ, MODEL.width),
        jitter=jnp.asarray(rng.random((4, SEQ)), jnp.float32),
        schedule=Schedule(jnp.zeros(3, jnp.int32), 3),
    )
    # Rows of the buffer come in an order of their own, so all clips draw the same.
    same = lambda x: jnp.broadcast_to(x[..., :1, :, :], x.shape)
    draws = draws._replace(noise=same(draws.noise), jitter=0 * draws.jitter)
    unknown = draws._replace(candidate=draws.candidate.at[2:].set(jnp.nan))
    buffer = replay.push(objective.replaying.empty(), old, stored)
    quick = functools.partial(jax.jit, compiler_options=QUICK)
    program = quick(objective.replaying.loss)
    loss, (metrics, buffer) = program(params, fresh, KEY, buffer, unknown)
    expected, _ = quick(objective.loss)(params, whole, KEY, draws)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["tokens"] == whole["weights"].sum()
    assert sorted(map(int, buffer.age)) == [0, 1, 2, 3]
    newest = np.asarray(buffer.candidate)[np.asarray(buffer.age) < 2]
    assert np.isfinite(newest).all() and newest.shape == (2, SEQ, FRAME)


def test_what_is_of_distributions_alone_is_refused():
    for section, change, message in (
        (
            "objective",
            ObjectiveConfig(label_smoothing=0.1),
            "objective.label_smoothing",
        ),
        ("replay", ReplayConfig(capacity=4, top_k=2), "replay.top_k is 2, which keeps"),
    ):
        config = dataclasses.replace(SYSTEM_2, **{section: change})
        with pytest.raises(UserError, match="^" + re.escape(message)):
            build_objective(config)
