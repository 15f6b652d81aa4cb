"""Loss and gradients of one device, on eight in every arrangement; their traffic."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from tiny import QUICK

from ebt_jax.evaluation.collectives import count_collectives
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.training.checkpoint import restore
from ebt_jax.training.config import Config, MeshConfig, OptimConfig, TrainConfig
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.resolve import resolve
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import (
    global_batch,
    make_mesh,
    state_shardings,
    state_target,
)
from ebt_jax.training.step import init_state, make_step

BATCH, SEQ, VOCAB = 16, 6, 38  # no other axis has the vocabulary's size, or half
MODEL = ModelConfig(
    num_layers=1, num_heads=2, dim=16, vocab_size=VOCAB, num_landscapes=2, unroll=0
)
SYSTEM_1 = Config(
    model=MODEL,
    refine=RefineSetup(num_steps=2, num_landscapes=2, block=32),
    train=TrainConfig(accumulation=2),
)
SYSTEM_2 = Config(
    model=dataclasses.replace(MODEL, num_landscapes=1),
    refine=RefineSetup(
        num_steps=3,
        min_steps=2,
        backprop="truncated",
        noise_std=3.0,
        step_size_jitter=2.0,
        step_size_learnable=False,
    ),
    objective=ObjectiveConfig(loss_steps="last"),
)
TRANSFORMER = Config(
    model=dataclasses.replace(MODEL, kind="transformer_pp", num_landscapes=1)
)
LIGHT = Config(  # candidates pass the last of two blocks
    model=dataclasses.replace(
        MODEL,
        num_layers=2,
        num_landscapes=1,
        conditioning="default",
        candidate_input="final",
        candidate_layers=1,
    ),
    refine=RefineSetup(num_steps=1, num_landscapes=1),
)
CONFIGS = {
    "system 1": SYSTEM_1,
    "system 2": SYSTEM_2,
    "light": LIGHT,
    "transformer": TRANSFORMER,
}
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "model": MeshConfig(data=2, fsdp=2, model=2),
    "seq": MeshConfig(data=2, seq=2, model=2),
}
# Its update is the gradient, so that a compiled step shows that, too.
OPTIMIZER = optax.sgd(1.0)


def batch():
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(VOCAB, size=(BATCH, SEQ)).astype(np.int32)
    # Devices get different numbers of tokens that count, some none at all.
    weights = (rng.random((BATCH, SEQ)) < 0.6).astype(np.float32)
    weights[2:4] = 0
    return {"tokens": ids(), "targets": ids(), "weights": weights}


def step_on(config, mesh, optimizer=OPTIMIZER):
    """Metrics and what a compiled step in float64 takes away, and its text."""
    with jax.enable_x64(True):
        objective = build_objective(dataclasses.replace(config, mesh=mesh))
        plain = objective.init
        precise = lambda key: jax.tree.map(lambda x: x.astype(float), plain(key))
        objective = objective._replace(init=precise)
        mesh = make_mesh(mesh)
        parts = config.train.accumulation
        step = make_step(objective, optimizer, seed=3, accumulation=parts, mesh=mesh)
        init = lambda: init_state(objective, optimizer, 3)
        shapes = jax.eval_shape(init)
        before = jax.jit(init, out_shardings=state_shardings(shapes, mesh))()
        rows = global_batch(batch(), mesh, BATCH)
        lowered = step.lower(state_target(shapes, mesh), rows)
        compiled = lowered.compile(QUICK)
        start = jax.device_get(before.params)
        after, metrics = compiled(before, rows, step.key)
        gradient = jax.tree.map(np.subtract, start, jax.device_get(after.params))
        return jax.device_get(metrics), gradient, compiled.as_text()


@pytest.fixture(scope="module", params=CONFIGS)
def on_one_device(request):
    config = CONFIGS[request.param]
    return config, *step_on(config, MeshConfig(data=1))[:2]


def size_of(gradient):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one(on_one_device, name):
    config, metrics, gradient = on_one_device
    found, other, text = step_on(config, MESHES[name])
    for key, value in metrics.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=key)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(other),
        strict=True,
    ):
        scale = np.abs(a).max()
        assert np.abs(a - b).max() <= 1e-5 * scale, jax.tree_util.keystr(path)
    assert np.abs(gradient["embed"]["embedding"]).max() > 0

    size, traffic = size_of(gradient), count_collectives(text)
    if name == "data":  # gradients, once, however many steps, blocks and parts
        assert set(traffic) == {"all-reduce"}
        assert size <= traffic["all-reduce"].bytes <= 1.02 * size
    if name == "fsdp":  # parameters gathered once, gradients scattered once
        assert set(traffic) == {"all-gather", "reduce-scatter", "all-reduce"}
        assert traffic["all-gather"].bytes == traffic["reduce-scatter"].bytes <= size
        assert sum(kind.bytes for kind in traffic.values()) < 2.5 * size
    if name in ("model", "seq"):  # no device holds a whole candidate
        dimensions = set(
            re.findall(r"\d+", " ".join(re.findall(r"\[([\d,]+)\]", text)))
        )
        assert str(VOCAB // 2) in dimensions and str(VOCAB) not in dimensions


def test_muon_moves_as_on_one_device():
    """Matrices become orthogonal as a whole, not by their parts."""
    optim = OptimConfig(name="muon", peak_lr=0.1, warmup_steps=0, schedule_steps=10)
    shapes = jax.eval_shape(build_objective(LIGHT).init, jax.random.key(0))
    optimizer = make_optimizer(optim, LIGHT.refine, shapes)
    _, expected, _ = step_on(LIGHT, MeshConfig(data=1), optimizer)
    _, found, _ = step_on(LIGHT, MESHES["model"], optimizer)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected),
        jax.tree.leaves(found),
        strict=True,
    ):
        assert np.abs(a).max() > 0 or path[0].key == "noise_std"
        np.testing.assert_allclose(b, a, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_a_checkpoint_fits_any_mesh(tmp_path):
    config = resolve(SYSTEM_1, VOCAB)
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    init = lambda: init_state(objective, optimizer, 3)
    target = lambda axes: state_target(jax.eval_shape(init), make_mesh(axes))
    shardings = jax.tree.map(lambda t: t.sharding, target(MESHES["fsdp"]))
    state = jax.jit(init, out_shardings=shardings)()
    with Saver(tmp_path, config.checkpoint) as saver:
        saver.save(7, state, 112, config, wait=True)
    for axes in (MESHES["model"], MESHES["data"], MeshConfig(data=1)):
        restored = restore(tmp_path, 7, target(axes))
        assert restored.next_example == 112
        jax.tree.map(np.testing.assert_array_equal, restored.state, state)
        wanted = jax.tree.map(lambda t: t.sharding, target(axes))
        assert jax.tree.map(lambda x: x.sharding, restored.state) == wanted
