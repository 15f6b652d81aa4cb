"""Encoders answer as the reference implementations do, from every published layout.

The cases are made by `tests/encoder_cases.py` with diffusers and transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_cases import read_case

from ebt_jax.errors import UserError
from ebt_jax.models.encoders import clip_text, dinov2, vae, weights
from ebt_jax.models.encoders.weights import Weights

CLIP_ACTIVATION = {
    "clip_transformers": "quick_gelu",
    "clip_openai": "gelu",
    "clip_projection": "quick_gelu",
}


def given(name, arrays):
    return Weights(arrays, name, "a test")


def assert_close(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-4)


def same(params, others):
    return jax.tree.all(jax.tree.map(np.array_equal, params, others))


@pytest.fixture(scope="module")
def autoencoder():
    arrays, case = read_case("vae_diffusers")
    return vae.from_weights(given("vae", arrays)), arrays, case


@pytest.fixture(scope="module")
def image_encoder():
    arrays, case = read_case("dinov2_transformers")
    return dinov2.from_weights(given("dinov2", arrays)), arrays, case


# The autoencoder.


@pytest.mark.parametrize("name", ["vae_diffusers", "vae_compvis"])
def test_the_autoencoder_of_diffusers(name):
    arrays, case = read_case(name)
    ours = vae.from_weights(given(name, arrays))
    assert ours.config == vae.VaeConfig((32, 64, 64), blocks=1, channels=3, latent=4)
    latents = jax.jit(ours.encode)(ours.params, case["in/images"], vae.SCALE)
    assert_close(latents / vae.SCALE, case["out/latents"])
    decode = weights.compiled(ours.decode, ours.params)
    images = decode(case["in/latents"] * 2.0, 2.0)
    assert_close(images, case["out/images"])


def test_other_names_of_the_same_autoencoder(autoencoder):
    """Older files of diffusers, and a whole checkpoint of Stable Diffusion."""
    ours, arrays, _ = autoencoder
    newer, older = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value")
    renamed = {}
    for name, array in arrays.items():
        for new, old in zip(newer, (*older, "proj_attn"), strict=True):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = array
    assert not set(renamed) == set(arrays)
    assert same(vae.from_weights(given("older", renamed)).params, ours.params)

    arrays, _ = read_case("vae_compvis")
    alone = vae.from_weights(given("alone", arrays)).params
    whole = {f"first_stage_model.{name}": array for name, array in arrays.items()}
    whole["model.diffusion_model.out.0.weight"] = np.zeros(3, np.float32)
    assert same(vae.from_weights(given("whole", whole)).params, alone)


def test_half_precision_becomes_single(autoencoder):
    _, arrays, _ = autoencoder
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    params = vae.from_weights(given("half", halves)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_images_that_the_autoencoder_cannot_take(autoencoder):
    ours, _, _ = autoencoder
    with pytest.raises(UserError, match="images of 16 x 18 pixels .* multiples of 4"):
        ours.encode(ours.params, jnp.zeros((1, 16, 18, 3)))
    with pytest.raises(UserError, match="images have 1 channels, .* needs 3"):
        ours.encode(ours.params, jnp.zeros((1, 16, 16, 1)))
    with pytest.raises(UserError, match="latents have 3 channels, .* have 4"):
        ours.decode(ours.params, jnp.zeros((1, 4, 4, 3)))


# DINOv2.


@pytest.mark.parametrize(
    "name",
    [
        "dinov2_transformers",
        "dinov2_facebook",
        "dinov2_registers",
        "dinov2_registers_facebook",
    ],
)
def test_dinov2_of_transformers_and_facebook(name):
    arrays, case = read_case(name)
    ours = dinov2.from_weights(given(name, arrays))
    assert ours.config.registers == (4 if "registers" in name else 0)
    assert ours.config.offset == (0.1 if name == "dinov2_facebook" else 0.0)
    features = jax.jit(ours.encode)(ours.params, case["in/images"])
    assert_close(features.image, case["out/image"])
    assert_close(features.patches, case["out/patches"])


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("after", [3, 5, 16, 37])
def test_resampling_keeps_constants_and_lines(antialias, after):
    matrix = dinov2.resampling(16, after, 0.0, antialias)
    assert matrix.shape == (after, 16)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    if after == 16:
        np.testing.assert_allclose(matrix, np.eye(16), atol=1e-6)
    inner = (matrix @ np.arange(16.0) + 0.5) / 16 - (np.arange(after) + 0.5) / after
    far = np.abs(np.arange(after) - (after - 1) / 2) < after / 2 - 2 * after / 16 - 1
    np.testing.assert_allclose(inner[far], 0, atol=0.02)


def test_normalisation_for_imagenet():
    images = jnp.array([-1.0, 0.0, 1.0]).reshape(1, 1, 3, 1).repeat(3, axis=-1)
    normalised = dinov2.imagenet_normalised(images)
    expected = (np.array([0.0, 0.5, 1.0])[:, None] - [0.485, 0.456, 0.406]) / [
        0.229,
        0.224,
        0.225,
    ]
    np.testing.assert_allclose(normalised[0, 0], expected, rtol=1e-5)


def test_images_that_dinov2_cannot_take(image_encoder):
    ours, _, _ = image_encoder
    with pytest.raises(UserError, match="images of 12 x 10 pixels .* multiples of 4"):
        ours.encode(ours.params, jnp.zeros((1, 12, 10, 3)))
    with pytest.raises(UserError, match="images have 1 channels, but DINOv2 needs 3"):
        ours.encode(ours.params, jnp.zeros((1, 12, 12, 1)))


# CLIP.


@pytest.mark.parametrize("name", list(CLIP_ACTIVATION))
def test_the_text_encoder_of_clip(name):
    arrays, case = read_case(name)
    ours = clip_text.from_weights(given(name, arrays), CLIP_ACTIVATION[name])
    features = jax.jit(ours.encode)(ours.params, case["in/tokens"])
    for key, reference in case.items():
        if key.startswith("out/"):
            assert_close(getattr(features, key.removeprefix("out/")), reference)
    assert (features.projected is None) == (name == "clip_transformers")
    ends = case["in/tokens"].argmax(axis=1)
    assert_close(features.pooled, features.tokens[np.arange(3), ends])


def test_a_whole_clip_model_and_one_level_of_names_more():
    arrays, _ = read_case("clip_transformers")
    alone = clip_text.from_weights(given("alone", arrays)).params
    whole = {f"text_model.{name}": array for name, array in arrays.items()}
    whole["text_model.embeddings.position_ids"] = np.arange(9)[None]
    whole["vision_model.post_layernorm.bias"] = np.zeros(4)
    whole |= {"visual_projection.weight": np.zeros((4, 4)), "logit_scale": np.ones(())}
    assert same(clip_text.from_weights(given("whole", whole)).params, alone)
    diffusion = {f"cond_stage_model.transformer.{k}": v for k, v in whole.items()}
    diffusion["model.diffusion_model.out.0.weight"] = np.zeros(3)
    assert same(clip_text.from_weights(given("diffusion", diffusion)).params, alone)


def test_texts_that_clip_cannot_take():
    arrays, _ = read_case("clip_transformers")
    ours = clip_text.from_weights(given("clip", arrays))
    with pytest.raises(UserError, match="texts have 10 tokens, .* takes 1 to 9"):
        ours.encode(ours.params, jnp.zeros((1, 10), jnp.int32))
    with pytest.raises(UserError, match="activation 'relu' is unknown; choose gelu or"):
        clip_text.load_clip_text("nowhere.npz", "relu")
