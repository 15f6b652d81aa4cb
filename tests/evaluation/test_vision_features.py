"""Features of a model's patches, and of an extractor, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_cases import read_case

from ebt_jax import models
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.evaluation.vision.features import extractor, labelled_features
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.encoders import dinov2, weights
from ebt_jax.models.image import features


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights of a small DINOv2, as a file."""
    arrays, _ = read_case("dinov2_transformers")
    path = tmp_path_factory.mktemp("weights") / "dinov2.npz"
    np.savez(path, **arrays)
    return path


def test_patches_are_averaged_where_pictures_count():
    model = ModelConfig(
        space="image",
        num_layers=1,
        num_heads=1,
        dim=8,
        image_size=4,
        channels=1,
        patch=2,
        num_landscapes=1,
    )
    init = models.build(model, DiffusionConfig()).init
    params = jax.jit(init)(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(4, 4, 4, 1)).astype(np.float32)
    batch = {
        "image": images,
        "label": np.array([3, 1, 2, 0]),
        "weights": np.array([1.0, 0.0, 1.0, 1.0], np.float32),
    }
    found, labels = labelled_features(model, params, [batch, batch])
    assert labels.tolist() == [3, 2, 0] * 2
    each = jax.jit(lambda params: features(model, params, {}, jnp.asarray(images)))
    expected = np.asarray(each(params)).mean(axis=1)[[0, 2, 3]]
    assert found == pytest.approx(np.concatenate([expected, expected]), abs=1e-5)
    del batch["label"]
    with pytest.raises(UserError, match="the data has none"):
        labelled_features(model, params, [batch])


def test_an_extractor_sees_pictures_as_dinov2_was_trained_on_them(saved):
    encoder = dinov2.from_weights(weights.read(str(saved), "DINOv2"))
    side = encoder.config.patch * encoder.config.grid
    pictures = np.random.default_rng(1).integers(0, 256, (2, side, side, 3), np.uint8)
    extract = extractor(str(saved))
    normal = dinov2.imagenet_normalised(jnp.asarray(pictures / 127.5 - 1, jnp.float32))
    expected = jax.jit(encoder.encode)(encoder.params, normal).image
    assert extract(pictures) == pytest.approx(np.asarray(expected), abs=1e-4)
    # Other sizes are made this one; a picture of one colour stays that.
    plain = np.full((1, side, side, 3), 90, np.uint8)
    small = extract(plain[:, :5, :5])
    assert small == pytest.approx(extract(plain), abs=1e-4)
