"""Schedules, noising, the bound and the samplers, each against what defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax.diffusion import (
    denoise,
    learnt_log_variance,
    level_log_likelihood,
    losses,
    make_process,
    posterior_mean,
    q_sample,
    spaced,
)

PROCESS = make_process("linear", 1000)
rng = np.random.default_rng(0)
IMAGES = jnp.asarray(rng.uniform(-1, 1, (3, 4, 4, 2)), jnp.float32)


def test_linear_schedule():
    np.testing.assert_allclose(PROCESS.beta[[0, -1]], [1e-4, 0.02])
    np.testing.assert_allclose(PROCESS.kept, np.cumprod(1 - PROCESS.beta))
    assert PROCESS.kept[-1] < 1e-4
    # Noise of a share of a schedule hardly depends on how many timesteps it has.
    ends = [make_process("linear", n).kept[n // 10 - 1] for n in (200, 1000, 2000)]
    np.testing.assert_allclose(ends, PROCESS.kept[99], rtol=5e-3)
    noise = np.sqrt(1 - PROCESS.kept[[99, 199]])  # the paper's 0.1 and 0.2
    np.testing.assert_allclose(noise, [0.32, 0.58], atol=5e-3)


def test_cosine_schedule():
    process = make_process("cosine", 500)
    time = np.array([100, 250, 400])
    angle = lambda t: np.cos((t / 500 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(process.kept[time - 1], angle(time) / angle(0))
    assert process.beta.max() <= 0.999 and (np.diff(process.kept) < 0).all()


def test_another_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is 'sine', but has to be linear or"):
        make_process("sine", 10)


def test_few_timesteps_keep_variances_below_one():
    assert make_process("linear", 5).beta.max() == 0.999


def test_noised_images_have_the_variance_of_their_step():
    noise = jax.random.normal(jax.random.key(0), (2, 64, 64, 4))
    step = jnp.array([9, 499])
    noised = q_sample(PROCESS, jnp.full_like(noise, 0.5), step, noise)
    kept = PROCESS.kept[np.asarray(step)]
    np.testing.assert_allclose(noised.mean((1, 2, 3)), 0.5 * np.sqrt(kept), atol=0.02)
    np.testing.assert_allclose(noised.std((1, 2, 3)), np.sqrt(1 - kept), rtol=0.02)


def test_noising_by_parts_is_noising_at_once():
    """The mean of x_{t-1} given x_t and x_0 is Bayes' rule for normal variables."""
    step = 300
    beta, before = PROCESS.beta[step], PROCESS.before[step]
    precision = (1 - beta) / beta + 1 / (1 - before)
    np.testing.assert_allclose(PROCESS.variance[step], 1 / precision)
    clean, noised = IMAGES, IMAGES[::-1]
    mean = np.sqrt(1 - beta) / beta * noised + np.sqrt(before) / (1 - before) * clean
    found = posterior_mean(PROCESS, clean, noised, jnp.full(3, step))
    np.testing.assert_allclose(found, mean / precision, rtol=1e-5, atol=1e-6)


def test_learnt_variance_lies_between_its_bounds():
    step, ends = jnp.array([0, 1, 700]), jnp.array([-1.0, 1.0]).reshape(2, 1, 1, 1, 1)
    between = jnp.broadcast_to(ends, (2, 3, 1, 1, 1))
    least, most = (learnt_log_variance(PROCESS, b, step)[:, 0, 0, 0] for b in between)
    np.testing.assert_allclose(most, np.log(PROCESS.beta[step]), rtol=1e-6)
    true = np.log(PROCESS.variance[np.array([1, 1, 700])])  # that of 0 is 0
    np.testing.assert_allclose(least, true, rtol=1e-6)


def test_a_spaced_process_keeps_the_noise_of_its_steps():
    some = spaced(PROCESS, 200, 5)
    assert some.timestep.tolist() == [0, 50, 100, 149, 199]
    np.testing.assert_allclose(some.kept, PROCESS.kept[some.timestep])
    np.testing.assert_allclose(np.cumprod(1 - some.beta), some.kept)
    assert spaced(PROCESS, 200, 1).timestep.tolist() == [199]
    assert np.isfinite(spaced(PROCESS, 200, 1).log_variance_bounds).all()
    for ours, theirs in zip(spaced(PROCESS, 1000, 1000), PROCESS, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    with pytest.raises(ValueError, match="passes is 11, but images are noised by 10"):
        spaced(PROCESS, 10, 11)


def oracle(process):
    """A model that knows the images, and the least variance."""

    def predict(noised, timestep):
        kept = jnp.asarray(process.kept, jnp.float32)[timestep].reshape(-1, 1, 1, 1)
        noise = (noised - jnp.sqrt(kept) * IMAGES) / jnp.sqrt(1 - kept)
        return jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)

    return predict


@pytest.mark.parametrize("passes", [1, 7])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_who_knows_the_noise_gets_the_image_back(sampler, passes):
    noise = jax.random.normal(jax.random.key(1), IMAGES.shape)
    noised = q_sample(PROCESS, IMAGES, jnp.full(3, 199), noise)
    keys = jax.random.split(jax.random.key(2), 3) if sampler == "ddpm" else None
    process = spaced(PROCESS, 200, passes)
    image = jax.jit(lambda x: denoise(process, oracle(PROCESS), x, keys))(noised)
    np.testing.assert_allclose(image, IMAGES, atol=1e-4)


def test_ddpm_steps_have_the_right_noise():
    """For images that are all 0 each x_t is normal: going back keeps that."""
    process = spaced(PROCESS, 1000, 50)

    def predict(noised, timestep):
        kept = jnp.asarray(PROCESS.kept, jnp.float32)[timestep].reshape(-1, 1, 1, 1)
        noise = noised / jnp.sqrt(1 - kept)
        return jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)

    noised = jax.random.normal(jax.random.key(0), (1, 64, 64, 4))
    half = type(process)(*(x[25:] for x in process))  # stops at the 25th step
    half = half._replace(timestep=process.timestep[25:])
    keys = jax.random.split(jax.random.key(1), 1)
    found = jax.jit(lambda x: denoise(half, predict, x, keys))(noised)
    # The last step of the half process adds none, as if it were the first.
    expected = process.before[25]
    mean = np.sqrt(1 - process.beta[25]) * (1 - expected) / (1 - process.kept[25])
    std = mean * np.sqrt(1 - process.kept[25])
    np.testing.assert_allclose(found.std(), std, rtol=0.02)


def test_clipped_images_stay_in_range():
    predict = lambda noised, timestep: jnp.zeros((*noised.shape[:-1], 4))
    process, noised = spaced(PROCESS, 100, 3), 3 * jnp.ones((1, 2, 2, 2))
    assert denoise(process, predict, noised).min() > 3
    np.testing.assert_allclose(denoise(process, predict, noised, clip=True), 1.0)


def test_the_bound_is_least_for_the_true_noise_and_variance():
    noise = jax.random.normal(jax.random.key(3), IMAGES.shape)
    step = jnp.array([1, 20, 50])
    noised = q_sample(PROCESS, IMAGES, step, noise)

    @jax.jit
    def both(predicted, between):
        output = jnp.concatenate([predicted, jnp.full_like(noise, between)], axis=-1)
        return losses(PROCESS, output, IMAGES, noised, step, noise)

    squared, bound = both(noise, -1.0)
    np.testing.assert_array_equal(squared, 0)
    np.testing.assert_allclose(bound, 0, atol=1e-5)
    squared, worse = both(noise + 0.1, -1.0)
    np.testing.assert_allclose(squared, 0.01, rtol=1e-5)
    assert (worse > bound).all() and (both(noise, 0.5)[1] > bound).all()
    # Its gradient moves the variance alone.
    slope = jax.grad(lambda p: both(p, 0.5)[1].sum())(noise + 0.1)
    np.testing.assert_array_equal(slope, 0)


def test_levels_of_a_pixel_share_all_probability():
    levels = jnp.linspace(-1, 1, 256)
    for mean, scale in ((0.1, 0.2), (-0.97, 0.01), (1.2, 0.5)):
        logs = jax.jit(level_log_likelihood)(levels, mean, np.log(scale))
        np.testing.assert_allclose(jnp.exp(logs).sum(), 1.0, atol=1e-5)
    noise = jnp.zeros((1, 2, 2, 1))
    image = jnp.full_like(noise, 0.25)
    output = jnp.concatenate([noise, noise], axis=-1)
    step = jnp.array([0])
    noised = q_sample(PROCESS, image, step, noise)
    _, bound = losses(PROCESS, output, image, noised, step, noise)
    scale = 0.5 * learnt_log_variance(PROCESS, noise, step)
    nats = -level_log_likelihood(image, image, scale).mean()
    np.testing.assert_allclose(bound[0], nats / np.log(2), rtol=1e-3)
