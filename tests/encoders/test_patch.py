"""The patch encoder is an orthonormal projection onto the leading components."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax.errors import UserError
from ebt_jax.models.encoders import patch


@pytest.fixture(scope="module")
def images():
    """Smooth pictures `[24, 12, 8, 3]`: sums of few plane waves and some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:12, :8] / 8
    waves = rng.normal(size=(24, 3, 5)), rng.uniform(0.2, 1.5, (24, 3, 5, 2))
    phases = waves[1][..., 0, None, None] * y + waves[1][..., 1, None, None] * x
    pictures = np.einsum("ncw,ncwhx->nhxc", waves[0], np.cos(3 * phases))
    return (pictures + 0.05 * rng.normal(size=pictures.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def params(images):
    return patch.fit_pca(images, patch=4, features=6)


def test_components_are_orthonormal_and_of_falling_variance(images, params):
    flat = params["components"].reshape(6, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(6), atol=1e-6)
    latents = np.asarray(patch.encode(params, images))
    assert latents.shape == (24, 3, 2, 6)
    variances = latents.reshape(-1, 6).var(axis=0)
    assert np.all(np.diff(variances) < 0)
    np.testing.assert_allclose(latents.reshape(-1, 6).mean(axis=0), 0, atol=1e-5)


def test_they_are_the_leading_singular_vectors(images, params):
    cut = images.reshape(24, 3, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 48)
    _, _, right = np.linalg.svd(cut - cut.mean(axis=0), full_matrices=False)
    flat = params["components"].reshape(6, -1)
    np.testing.assert_allclose(np.abs((flat * right[:6]).sum(axis=1)), 1, atol=1e-5)


def test_decoding_inverts_encoding(images, params):
    latents = patch.encode(params, images)
    again = patch.encode(params, patch.decode(params, latents))
    np.testing.assert_allclose(again, latents, atol=1e-5)
    whole = patch.fit_pca(images, patch=4, features=48)
    restored = patch.decode(whole, patch.encode(whole, images))
    np.testing.assert_allclose(restored, images, atol=1e-5)


def test_distances_are_those_of_the_pictures(params):
    latents = jax.random.normal(jax.random.key(0), (2, 3, 2, 6))
    pictures = patch.decode(params, latents)
    between = jnp.linalg.norm(pictures[0] - pictures[1])
    np.testing.assert_allclose(between, jnp.linalg.norm(latents[0] - latents[1]), 1e-5)


def test_one_patch_for_each_frame_of_clips(images):
    frames = images[:, :8].reshape(6, 4, 8, 8, 3)
    whole = patch.fit_pca(frames, patch=8, features=5)
    latents = jax.jit(patch.encode)(whole, frames)
    assert latents.shape == (6, 4, 1, 1, 5)
    assert patch.decode(whole, latents).shape == frames.shape


def test_many_patches_are_counted_in_chunks(images, params, monkeypatch):
    monkeypatch.setattr(patch, "_CHUNK", 17)
    chunks = patch.fit_pca(images, patch=4, features=6)
    for name, array in params.items():
        np.testing.assert_allclose(chunks[name], array, rtol=0, atol=1e-5)


def test_larger_patches_are_decomposed_by_their_products(images, monkeypatch):
    few = images[:4]
    exact = patch.fit_pca(few, patch=4, features=5)
    monkeypatch.setattr(patch, "_MAX_SIDE", 40)  # below a patch's 48 numbers
    products = patch.fit_pca(few, patch=4, features=5)
    np.testing.assert_allclose(
        products["components"], exact["components"], rtol=0, atol=1e-5
    )
    many = patch.fit_pca(images, patch=4, features=5)  # 40 of 144 patches
    flat = many["components"].reshape(5, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(5), atol=1e-6)
    first = (flat[0] * patch.fit_pca(images, 4, 1)["components"].ravel()).sum()
    assert abs(first) > 0.99


def test_constant_pictures_still_have_orthonormal_components():
    params = patch.fit_pca(np.ones((4, 4, 4, 1)), patch=2, features=4)
    flat = params["components"].reshape(4, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (9, (4, 2), "images of 9 x 9 pixels do not divide into patches of 4 x 4"),
        (8, (16, 2), "images of 8 x 8 pixels do not divide into patches of 16 x 16"),
        (8, (2, 13), "13 features of a patch of 2 x 2 x 3 = 12 numbers"),
        (8, (2, 0), "0 features of a patch of 2 x 2 x 3 = 12 numbers"),
        (8, (8, 5), "5 components cannot be fitted to 2 patches"),
    ],
)
def test_what_cannot_be_fitted(size, settings, message):
    with pytest.raises(UserError, match=message):
        patch.fit_pca(np.zeros((2, size, size, 3)), *settings)


def test_arrays_of_another_kind(params):
    with pytest.raises(UserError, match="1 channels, but the components were fitted"):
        patch.encode(params, jnp.zeros((2, 8, 8, 1)))
    with pytest.raises(UserError, match="latents have 4 features, but there are 6"):
        patch.decode(params, jnp.zeros((2, 2, 2, 4)))
