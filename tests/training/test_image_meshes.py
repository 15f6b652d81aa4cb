"""Training steps on images are the same on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import QUICK

from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training.config import Config, MeshConfig, TrainConfig
from ebt_jax.training.objective import batch_shapes, build_objective
from ebt_jax.training.sharding import (
    global_batch,
    make_mesh,
    state_shardings,
    state_target,
)
from ebt_jax.training.step import init_state, make_step

BATCH = 16
EBT = Config(
    model=ModelConfig(
        space="image",
        image_size=4,
        channels=2,
        num_layers=1,
        num_heads=2,
        dim=8,
        ffn_multiplier=2.0,
    ),
    refine=RefineSetup(
        num_steps=2, num_landscapes=1, step_size=3.0, initial_candidate="noised"
    ),
    diffusion=DiffusionConfig(timesteps=50, noise_level=0.2, random_level=True),
    train=TrainConfig(batch_size=BATCH, accumulation=2),
)
DIT = dataclasses.replace(
    EBT,
    model=dataclasses.replace(
        EBT.model, kind="dit", condition="caption", condition_size=3
    ),
)
MESHES = {
    "data and fsdp": MeshConfig(data=2, fsdp=4),
    "model": MeshConfig(data=2, fsdp=2, model=2),
}
# Its update is the gradient, so that a compiled step shows that, too.
OPTIMIZER = optax.sgd(1.0)


def batch_of(config):
    rng = np.random.default_rng(0)
    shapes = batch_shapes(config)
    batch = {name: rng.uniform(-1, 1, s.shape) for name, s in shapes.items()}
    batch = {name: values.astype(np.float32) for name, values in batch.items()}
    # Devices get different numbers of images that count, some none at all.
    weights = (np.arange(BATCH) % 3 > 0).astype(np.float32)
    weights[2:4] = 0
    return {**batch, "weights": weights, "index": np.arange(BATCH, dtype=np.int32)}


def trained(init):
    """Float64 parameters of which none is 0: new ones pass on no gradients."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape), shapes)
    if "step_size" in params:
        params |= {"step_size": np.array(3.0), "noise_std": np.array(0.0)}
    return lambda key: jax.tree.map(jnp.asarray, params)


def step_on(config, mesh):
    """Metrics and gradients of a compiled step in float64."""
    with jax.enable_x64(True):
        objective = build_objective(dataclasses.replace(config, mesh=mesh))
        objective = objective._replace(init=trained(objective.init))
        mesh = make_mesh(mesh)
        step = make_step(objective, OPTIMIZER, seed=3, accumulation=2, mesh=mesh)
        init = lambda: init_state(objective, OPTIMIZER, 3)
        shapes = jax.eval_shape(init)
        shardings = state_shardings(shapes, mesh)
        before = jax.jit(init, out_shardings=shardings)()
        rows = global_batch(batch_of(config), mesh, BATCH)
        compiled = step.lower(state_target(shapes, mesh), rows).compile(QUICK)
        start = jax.device_get(before.params)
        after, metrics = compiled(before, rows, step.key)
        gradient = jax.tree.map(np.subtract, start, jax.device_get(after.params))
        return jax.device_get(metrics), gradient


@pytest.fixture(scope="module")
def ebt():
    return EBT, *step_on(EBT, MeshConfig(data=1))


@pytest.fixture(scope="module")
def dit():
    return DIT, *step_on(DIT, MeshConfig(data=1))


def assert_same_on(name, expected):
    config, metrics, gradient = expected
    found, other = step_on(config, MESHES[name])
    for key, value in metrics.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=key)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(other),
        strict=True,
    ):
        scale = np.abs(a).max()
        assert np.abs(a - b).max() <= 1e-5 * scale, jax.tree_util.keystr(path)
    assert np.abs(gradient["blocks"]["modulation"]["kernel"]).max() > 0


@pytest.mark.parametrize("name", MESHES)
def test_refined_images_on_eight_devices(ebt, name):
    assert_same_on(name, ebt)


def test_diffusion_on_eight_devices(dit):
    assert_same_on("data and fsdp", dit)
