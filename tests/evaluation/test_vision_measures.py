"""Quality in numbers, against scikit-image's values and closed forms."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from ebt_jax.errors import UserError
from ebt_jax.evaluation.vision import baselines, fid, measures, probe


def pictures(height, width, channels):
    y, x, k = np.meshgrid(
        np.arange(height), np.arange(width), np.arange(channels), indexing="ij"
    )
    a = np.sin(0.7 * y + 0.3 * x * (k + 1)) * 0.8
    return a, a + 0.3 * np.cos(2.1 * x - 1.3 * y + k)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 16, 3), 0.9222930956539459),
        ((24, 13, 1), 0.9093032570990005),
        ((12, 40, 3), 0.9216222123877769),
    ],
)
def test_ssim_is_that_of_scikit_image(shape, expected):
    # structural_similarity(a, b, data_range=2, channel_axis=-1, gaussian_weights=True,
    #                       sigma=1.5, use_sample_covariance=False) of 0.26
    a, b = (jnp.asarray(p, jnp.float32) for p in pictures(*shape))
    assert float(measures.ssim(a, b)) == pytest.approx(expected, abs=1e-5)
    assert float(measures.ssim(a, a)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_ssim_of_small_pictures_is_of_the_largest_window_that_fits(side):
    a, b = (jnp.asarray(p, jnp.float32) for p in pictures(side, side, 1))
    assert float(measures.ssim(a, a)) == pytest.approx(1, abs=1e-5)
    assert float(measures.ssim(a, b)) < 0.999


def test_psnr_is_the_papers():
    # Table 3: an MSE of 142.98 in [0, 255] is 26.58 dB, one of 122.55 is 27.25 dB.
    for mse, expected in ((142.98, 26.58), (122.55, 27.25)):
        assert measures.psnr(mse, 255) == pytest.approx(expected, abs=0.005)
        ours = mse * (2 / 255) ** 2
        assert measures.psnr(ours) == pytest.approx(expected, abs=0.005)
        assert measures.in_255(ours) == pytest.approx(mse)
    assert measures.psnr(0.0) == math.inf and measures.psnr(math.inf) == -math.inf
    assert math.isnan(measures.psnr(math.nan))


def test_psnr_is_that_of_scikit_image_and_of_the_mean_error_of_a_set():
    a, b = (jnp.asarray(p[None], jnp.float32) for p in pictures(16, 16, 3))
    means = {name: float(v[0]) for name, v in measures.quality(b, a).items()}
    result = measures.set_quality(means)
    assert result["psnr"] == pytest.approx(19.488356360059164, abs=1e-4)
    assert list(result) == ["psnr", "mse", "ssim", "l1"]
    two = jnp.concatenate([b, a])  # one picture is exact: half the error, 3.01 dB more
    mse = measures.quality(two, jnp.concatenate([a, a]))["mse"].mean()
    gain = measures.psnr(float(mse)) - result["psnr"]
    assert gain == pytest.approx(10 * math.log10(2), abs=1e-4)


def gaussian_classes(seed, examples=240):
    """Three overlapping Gaussians, whose features have very different scales."""
    random = np.random.default_rng(seed)
    labels = np.arange(examples) % 3
    centres = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    features = centres[labels] + random.normal(size=(examples, 2))
    noise = random.normal(size=(examples, 3))
    constant = np.full((examples, 1), 7.0)
    return np.concatenate([features * [1e3, 1e-3], noise, constant], 1), labels


def test_linear_probe_comes_near_the_best_there_is():
    probed = probe.fit_probe(*gaussian_classes(0), 3, steps=50)
    assert probed.penalty in probe.PENALTIES
    features, labels = gaussian_classes(1, 900)
    accuracy = probe.probe_accuracy(probed, features, labels, top=(1, 2, 5))
    centres = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    distance = features[:, None, :2] / [1e3, 1e-3] - centres
    best = float((np.square(distance).sum(-1).argmin(1) == labels).mean())
    assert accuracy["top_1"] == pytest.approx(best, abs=0.02)
    assert accuracy["top_1"] < accuracy["top_2"] and "top_5" not in accuracy


def test_a_fitted_probe_is_a_minimum():
    features, labels = gaussian_classes(2)
    probed = probe.fit_probe(features, labels, 3, penalties=(1e-2,), steps=50)
    standard = (features - probed.mean) * probed.scale
    scores = np.exp(standard @ probed.weights + probed.bias)
    error = scores / scores.sum(1, keepdims=True) - np.eye(3)[labels]
    gradient = standard.T @ error / len(labels) + 1e-2 * probed.weights
    assert abs(gradient).max() < 1e-4 and abs(error.mean(0)).max() < 1e-4


def test_nearest_neighbours_vote():
    features, labels = gaussian_classes(0, 300)
    assert probe.neighbour_accuracy(features, labels, features, labels, 1) == 1.0
    # Cosines ask for directions: three of them, far apart.
    random = np.random.default_rng(0)
    directions = np.eye(3)[labels] * 10 + random.normal(size=(len(labels), 3))
    tests = directions[120:], labels[120:]
    right = probe.neighbour_accuracy(directions[:120], labels[:120], *tests)
    assert right > 0.98
    shuffled = random.permutation(labels[:120])
    assert probe.neighbour_accuracy(directions[:120], shuffled, *tests) < 0.6


def test_a_probe_needs_two_classes():
    with pytest.raises(UserError, match="4 labelled examples of 1 classes"):
        probe.fit_probe(np.zeros((4, 2)), np.zeros(4, int), 1)


def test_frechet_distance_is_the_closed_form():
    random = np.random.default_rng(0)
    basis = linalg.qr(random.normal(size=(5, 5)))[0]
    a, b = random.uniform(0.1, 4, (2, 5))
    one = fid.Moments(random.normal(size=5), basis * a @ basis.T)
    # Covariances that commute: the distance of standard deviations, squared.
    other = fid.Moments(one.mean + [2, 0, 0, 0, 0], basis * b @ basis.T)
    expected = 4 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert fid.frechet_distance(one, other) == pytest.approx(expected)
    assert fid.frechet_distance(one, one) == pytest.approx(0, abs=1e-10)
    # And covariances that do not: with a matrix square root.
    mixed = random.normal(size=(5, 5))
    other = fid.Moments(one.mean, mixed @ mixed.T)
    root = linalg.sqrtm(one.covariance @ other.covariance).real
    expected = np.trace(one.covariance + other.covariance - 2 * root)
    assert fid.frechet_distance(one, other) == pytest.approx(expected)
    assert fid.frechet_distance(other, one) == pytest.approx(expected)


def test_moments_of_few_examples_are_singular_and_still_have_a_distance():
    features = np.random.default_rng(1).normal(size=(4, 9))
    found = fid.moments(features)
    assert found.covariance == pytest.approx(np.cov(features.T))
    moved = fid.moments(features + 3.0)
    assert fid.frechet_distance(found, moved) == pytest.approx(81, abs=1e-5)
    with pytest.raises(UserError, match="two pictures, but there are 1"):
        fid.moments(features[:1])


def test_a_filter_is_as_wide_as_helps_most():
    clean = np.stack([p[0] for p in [pictures(24, 24, 1)]] * 4).astype(np.float32)
    random = np.random.default_rng(0)
    slight, strong = (
        clean + std * random.normal(size=clean.shape).astype(np.float32)
        for std in (0.05, 0.8)
    )
    narrow = baselines.choose_width(slight, clean)
    wide = baselines.choose_width(strong, clean)
    assert 0 < narrow < wide < 2
    error = lambda x: np.square(x - clean).mean()
    filtered = baselines.gaussian_filter(strong, wide)
    assert error(filtered) < error(strong) / 4
    for other in (0.9 * wide, 1.1 * wide):
        near = error(baselines.gaussian_filter(strong, other))
        assert error(filtered) < 1.03 * near
    assert (baselines.gaussian_filter(strong, 0.0) == strong).all()
    with pytest.raises(UserError, match="at least one picture"):
        baselines.choose_width(strong[:0], clean[:0])
