"""The bidirectional network: every way to compute it gives the same numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK

from ebt_jax import models
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.models import bidirectional, image
from ebt_jax.models.config import ModelConfig

NOISING = DiffusionConfig(timesteps=50, noise_level=0.2)
CONFIG = ModelConfig(
    space="image", image_size=8, channels=3, num_layers=1, num_heads=2, dim=16, patch=4
)
DIT = dataclasses.replace(CONFIG, kind="dit")
TOLD = dataclasses.replace(CONFIG, condition="caption", condition_size=6)
jit = functools.partial(jax.jit, compiler_options=QUICK)
IMAGES = jax.random.uniform(jax.random.key(7), (2, 8, 8, 3), minval=-1.0)
CAPTIONS = jax.random.normal(jax.random.key(8), (2, 6))
BATCH = {"image": IMAGES, "caption": CAPTIONS, "weights": jnp.ones(2)}


def params_of(config):
    """Parameters of which none is 0, as after training."""
    shapes = jax.eval_shape(
        lambda key: bidirectional.init(config, key), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32)
    return jax.tree.map(draw, shapes)


def energies(config, params, images, batch=BATCH):
    model = models.build(config, NOISING)
    context = model.encode_context(params, batch)
    return model.energy(params, context, images, jnp.int32(0))


def second_order(config, params, images):
    """Energies, and the gradient of their slope's size."""

    def slope(params):
        gradient = jax.grad(lambda x: energies(config, params, x).sum())(images)
        return (gradient**2).sum(), gradient

    gradient, slopes = jax.grad(slope, has_aux=True)(params)
    return energies(config, params, images), slopes, gradient


@pytest.fixture(scope="module")
def reference():
    params = params_of(CONFIG)
    return jit(functools.partial(second_order, CONFIG))(params, IMAGES)


@pytest.mark.parametrize(
    "fields",
    [{"unroll": 0, "remat": "dots"}, {"remat": "full"}, {"fused": False}],
    ids=str,
)
def test_every_way_gives_the_same_second_derivatives(reference, fields):
    other = dataclasses.replace(CONFIG, **fields)
    ours = jit(functools.partial(second_order, other))(params_of(CONFIG), IMAGES)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_attention_in_blocks(reference):
    few = dataclasses.replace(CONFIG, attention_block=3)
    found = jit(functools.partial(energies, few))(params_of(CONFIG), IMAGES)
    np.testing.assert_allclose(found, reference[0], rtol=1e-5)


@jit
def mapped(params, images):
    return image.energy_map(CONFIG, params, BATCH, images)


def test_bfloat16_is_close_and_gives_float32(reference):
    params = params_of(CONFIG)
    cheap = dataclasses.replace(CONFIG, dtype="bfloat16")
    low = jit(functools.partial(energies, cheap))(params, IMAGES)
    full = reference[0]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, full, atol=0.05 * float(jnp.abs(full).max()))
    assert not np.array_equal(low, full)


def test_the_energy_is_the_mean_of_a_map_over_patches(reference):
    params = params_of(CONFIG)
    energy_map = mapped(params, IMAGES)
    assert energy_map.shape == (2, 2, 2)
    np.testing.assert_allclose(energy_map.mean((1, 2)), reference[0], rtol=1e-5)


def test_patches_see_each_other_and_know_their_places():
    params = params_of(CONFIG)
    energy_map = functools.partial(mapped, params)
    plain = energy_map(IMAGES)
    changed = energy_map(IMAGES.at[:, 0, 0].add(1.0))  # in the first patch
    assert (jnp.abs(changed - plain) > 1e-6).all()
    flipped = energy_map(IMAGES[:, :, jnp.arange(8) - 4])  # columns of patches
    assert (jnp.abs(flipped[:, :, ::-1] - plain) > 1e-6).all()


def test_a_new_model_finds_no_slope():
    @jit
    def slope_of_new(key):
        params = bidirectional.init(CONFIG, key)
        return jax.grad(lambda x: energies(CONFIG, params, x).sum())(IMAGES)

    slope = slope_of_new(jax.random.key(0))
    np.testing.assert_array_equal(slope, 0)
    told = dataclasses.replace(DIT, condition="caption", condition_size=6)
    denoiser = models.build(told, NOISING)

    @jit
    def predicted_by_new(key):
        params = denoiser.init(key)
        condition = denoiser.condition(params, BATCH)
        return denoiser.predict(params, condition, IMAGES, jnp.array([3])), params

    output, params = predicted_by_new(jax.random.key(0))
    assert params["condition"]["embedding"].shape == (1, 16)
    assert output.shape == (2, 8, 8, 6)
    np.testing.assert_array_equal(output, 0)


def test_initial_weights_are_spread_as_in_dit():
    wide = dataclasses.replace(DIT, dim=64, num_layers=1)
    params = jit(functools.partial(bidirectional.init, wide))(jax.random.key(0))
    block = params["blocks"]
    for name, fans in (("qkv", 4 * 64), ("out", 2 * 64), ("up", 2 * 64)):
        limit = np.sqrt(6 / fans)
        largest = np.abs(block[name]["kernel"]).max()
        assert 0.95 * limit < largest <= limit, name
        assert not block[name]["bias"].any()
    assert not block["modulation"]["kernel"].any()
    assert params["time_in"]["kernel"].std() == pytest.approx(0.02, rel=0.05)


def test_captions_condition_each_image_for_itself():
    params = params_of(TOLD)
    told = jit(functools.partial(energies, TOLD))
    plain = told(params, IMAGES, BATCH)
    other = {**BATCH, "caption": CAPTIONS.at[1].add(1.0)}
    changed = told(params, IMAGES, other)
    assert changed[0] == plain[0] and changed[1] != plain[1]
    context = models.build(TOLD, NOISING).encode_context(params, BATCH)
    assert context.blocks.shape == (1, 2, 6, 16) and context.final.shape == (2, 2, 16)
    context = models.build(CONFIG, NOISING).encode_context(params_of(CONFIG), BATCH)
    assert context.blocks.shape == (1, 1, 6, 16)  # one for all images


def test_dit_is_told_the_time_of_each_image():
    params, model = params_of(DIT), models.build(DIT, NOISING)
    told = jit(lambda times: model.predict(params, None, IMAGES, times))
    predict = lambda *times: told(jnp.array(times))
    same, mixed = predict(5, 5), predict(5, 6)
    np.testing.assert_allclose(predict(5), same, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed[0], same[0], rtol=1e-5, atol=1e-5)
    assert jnp.abs(mixed[1] - same[1]).max() > 1e-3


@pytest.mark.parametrize("config", [CONFIG, TOLD, DIT], ids=["ebt", "told", "dit"])
def test_features_of_patches(config):
    features = jit(functools.partial(image.features, config))(
        params_of(config), BATCH, IMAGES
    )
    assert features.shape == (2, 4, 16) and features.dtype == jnp.float32


def test_positions_are_those_of_columns_then_of_rows():
    table = bidirectional.positions(dataclasses.replace(CONFIG, patch=2))
    assert table.shape == (16, 16)
    by_place = table.reshape(4, 4, 16)  # rows, columns
    np.testing.assert_array_equal(by_place[0, :, :8], by_place[3, :, :8])
    np.testing.assert_array_equal(by_place[:, 0, 8:], by_place[:, 3, 8:])
    np.testing.assert_allclose(by_place[0, 3, :8][[0, 4]], [np.sin(3), np.cos(3)])
    np.testing.assert_allclose(by_place[2, 0, 8:][[1, 5]], [np.sin(0.2), np.cos(0.2)])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 10}, "model.image_size is 10, which patches of model.patch 4"),
        ({"image_size": 2}, "model.image_size is 2, which patches of model.patch 4"),
        ({"dim": 18}, "width 18 of an image model has to be a multiple of 4"),
        ({"kind": "transformer_pp"}, "of image there are ebt and dit"),
        ({"condition": "labels"}, "model.condition is 'labels', but has to be one of"),
    ],
)
def test_sizes_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 0}, "model.image_size is 0"),
        ({"channels": 0}, "model.channels is 0"),
        ({"condition": "caption"}, "model.condition_size is 0"),
    ],
)
def test_what_the_data_decide_has_to_be_resolved(fields, message):
    with pytest.raises(ValueError, match=message):
        models.build(dataclasses.replace(CONFIG, **fields), NOISING)
    with pytest.raises(ValueError, match="diffusion is None, but images are noised"):
        models.build(CONFIG)
