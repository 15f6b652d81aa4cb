"""`refine`: closed forms, and every option against hand arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from energies import BATCH, DIM, gradient_at, mixed, problem

from ebt_jax.refine import RefineConfig, refine

STEP_SIZE = 0.1
VALUES = [0.3, -2.0, 4.0]


def bowl(params, context, candidate, landscape):
    """(c - b)^T A (c - b) / 2 with A, b = params."""
    matrix, centre = params
    distance = candidate - centre
    return 0.5 * jnp.einsum("bi,ij,bj->b", distance, matrix, distance)


def bowl_problem(rng):
    """A positive definite matrix, a centre and candidates, float64."""
    root = rng.standard_normal((DIM, DIM))
    matrix = root @ root.T + np.eye(DIM)
    return matrix, rng.standard_normal((1, DIM)), rng.standard_normal((BATCH, DIM))


def run(config, energy=mixed, candidate=None, step_size: Any = STEP_SIZE, **options):
    params, context, start = problem()
    start = start if candidate is None else candidate
    return refine(
        energy, params, context, start, step_size=step_size, config=config, **options
    )


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


@pytest.mark.parametrize("step_size", [0.3, 4.0])
def test_unit_gradients_make_steps_as_long_as_the_step_size(step_size):
    config = RefineConfig(num_steps=1, unit_gradient=True)
    params, context, start = problem()
    after = run(config, step_size=step_size).candidate
    length = jnp.sqrt(jnp.sum(jnp.square(after - start), axis=-1))
    np.testing.assert_allclose(length, step_size, rtol=1e-5)
    along = gradient_at(params, context, start, 0)
    cosine = jnp.sum((start - after) * along, axis=-1)
    cosine /= length * jnp.sqrt(jnp.sum(jnp.square(along), axis=-1))
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)


def test_unit_gradients_of_nothing_are_nothing_also_to_their_derivative():
    def total(candidate):
        flat = lambda params, context, c, landscape: 0.0 * c.sum(-1)
        config = RefineConfig(num_steps=2, unit_gradient=True, backprop="full")
        return run(config, energy=flat, candidate=candidate).candidate.sum()

    start = jnp.ones((BATCH, DIM))
    np.testing.assert_array_equal(jax.grad(total)(start), start)


# Closed forms.


@pytest.mark.parametrize("normalize_steps", ["all", "none"])
def test_quadratic_energy_matches_its_closed_form(normalize_steps):
    """z' = M r z + a A b with M = I - a A, where c = r z (r = 1 when off)."""
    steps, a, r = 6, 0.05, 0.5
    matrix, centre, start = bowl_problem(np.random.default_rng(1))
    factor = r if normalize_steps == "all" else 1.0
    linear = factor * (np.eye(DIM) - a * matrix)
    fixed = np.linalg.solve(np.eye(DIM) - linear, a * matrix @ centre[0])
    expected = (start - fixed) @ np.linalg.matrix_power(linear, steps) + fixed
    with jax.enable_x64(True):
        config = RefineConfig(num_steps=steps, normalize_steps=normalize_steps)
        result = refine(
            bowl,
            (jnp.asarray(matrix), jnp.asarray(centre)),
            None,
            jnp.asarray(start),
            step_size=a,
            config=config,
            normalize=lambda z: r * z,
        )
    np.testing.assert_allclose(result.candidate, expected, rtol=1e-12)


@pytest.mark.parametrize("meta_gradient", ["rule", "autodiff"])
@pytest.mark.parametrize("backprop", ["per_step", "truncated", "full"])
def test_step_size_gradient_of_a_quadratic_matches_its_closed_form(
    backprop, meta_gradient
):
    """With d_i = c_i - b: d_{i+1} = M d_i, M = I - a A, L = |d_T|^2 / 2.

    dL/da is d_T times dd_T/da, which is -A d_{T-1} through the last step alone,
    -T A M^(T-1) d_0 through all of them, and where earlier gradients are constants,
    M (-sum_{i<T-1} A d_i) - A d_{T-1}.
    """
    steps, a = 4, 0.07
    matrix, centre, start = bowl_problem(np.random.default_rng(2))
    linear = np.eye(DIM) - a * matrix
    power = lambda n: np.linalg.matrix_power(linear, n)
    distances = [(start - centre) @ power(i) for i in range(steps + 1)]
    moved = {
        "per_step": -distances[-2] @ matrix,
        "truncated": -sum(distances[:-2]) @ matrix @ linear - distances[-2] @ matrix,
        "full": -steps * distances[0] @ matrix @ power(steps - 1),
    }[backprop]
    expected = np.sum(distances[-1] * moved)
    config = RefineConfig(
        num_steps=steps, backprop=backprop, meta_gradient=meta_gradient
    )

    def loss(step_size):
        result = refine(
            bowl,
            (jnp.asarray(matrix), jnp.asarray(centre)),
            None,
            jnp.asarray(start),
            step_size=step_size,
            config=config,
        )
        return 0.5 * jnp.sum((result.candidate - centre) ** 2)

    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(a)), expected, rtol=1e-12)


# Options of one step, by hand.


def one_step(config, **options):
    """One step on a known slope of 1 everywhere, from VALUES."""
    slope = lambda params, context, c, landscape: c.sum(axis=-1)
    result = run(config, slope, jnp.array([VALUES]), **options)
    return np.asarray(result.candidate[0])


def test_gradient_clamp_bounds_the_move_of_every_entry():
    config = RefineConfig(num_steps=1, gradient_clamp=0.25)
    moved = one_step(config, step_size=0.1)
    np.testing.assert_allclose(moved, np.array(VALUES) - 0.1, rtol=1e-6)
    moved = one_step(config, step_size=10.0)
    np.testing.assert_allclose(moved, np.array(VALUES) - 0.25, rtol=1e-6)


def test_gradient_clamp_uses_the_step_size_before_jitter():
    config = RefineConfig(num_steps=1, gradient_clamp=0.25, step_size_jitter=2.0)
    moved = one_step(config, step_size=10.0, jitter=jnp.ones(1))  # size 20, g <= 0.025
    np.testing.assert_allclose(moved, np.array(VALUES) - 0.5, rtol=1e-6)


def test_absolute_clamp_clips_after_the_update():
    moved = one_step(RefineConfig(num_steps=1, absolute_clamp=1.5))
    np.testing.assert_allclose(moved, [0.2, -1.5, 1.5], rtol=1e-6)


def test_sharpen_divides_after_the_update_and_the_clip():
    config = RefineConfig(num_steps=1, absolute_clamp=1.5, sharpen=0.5)
    np.testing.assert_allclose(one_step(config), [0.4, -3.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("normalize_steps", "normalized"),
    [("all", [0, 1, 2]), ("first", [0]), ("none", [])],
)
def test_normalize_applies_at_the_steps_it_is_asked_for(normalize_steps, normalized):
    params, context, z = problem()
    config = RefineConfig(
        num_steps=3, num_landscapes=2, normalize_steps=normalize_steps
    )
    result = run(config, normalize=jax.nn.softmax, observe=lambda step: step.before)
    for i in range(3):
        c = softmax(np.asarray(z)) if i in normalized else z
        np.testing.assert_allclose(result.trajectory[i], c, rtol=1e-5, atol=1e-6)
        z = c - STEP_SIZE * gradient_at(params, context, jnp.asarray(c), min(i, 1))
    np.testing.assert_allclose(result.candidate, z, rtol=1e-5, atol=1e-6)


def test_first_means_landscape_0_not_step_0():
    config = RefineConfig(
        num_steps=4,
        num_landscapes=2,
        final_landscape_only=False,
        normalize_steps="first",
    )
    sums = run(
        config, normalize=jax.nn.softmax, observe=lambda step: step.before.sum(-1)
    ).trajectory
    assert np.allclose(sums[:2], 1, atol=1e-5)
    assert not np.allclose(sums[2:], 1, atol=1e-2)


@pytest.mark.parametrize(
    "transform",
    [
        optax.scale_by_adam(eps_root=1e-8),
        optax.trace(decay=0.9),
        optax.clip(0.05),
        optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.5, nesterov=True)),
    ],
    ids=["adam", "trace", "clip", "chain"],
)
def test_an_optax_transform_equals_a_hand_loop(transform):
    params, context, z = problem()
    state = transform.init(z)
    for i in range(4):
        update, state = transform.update(gradient_at(params, context, z, i), state, z)
        z = z - STEP_SIZE * update
    config = RefineConfig(num_steps=4, num_landscapes=4, backprop="full")
    result = run(config, transform=transform)
    np.testing.assert_allclose(result.candidate, z, rtol=1e-5, atol=1e-6)


def test_step_sizes_may_differ_between_predictions():
    config = RefineConfig(num_steps=3)
    sizes = jnp.linspace(0.01, 0.2, BATCH)
    together = run(config, step_size=sizes).candidate
    for i, size in enumerate(sizes):
        alone = run(config, step_size=size).candidate
        np.testing.assert_allclose(together[i], alone[i], rtol=1e-6)


def test_step_sizes_broadcast_from_the_right_over_the_batch():
    def energy(params, context, candidate, landscape):
        return 0.5 * (candidate**2).sum(-1)  # [2, 3]

    sizes = jnp.array([0.1, 0.2, 0.3])
    result = refine(
        energy,
        None,
        None,
        jnp.ones((2, 3, 4)),
        step_size=sizes,
        config=RefineConfig(num_steps=1),
    )
    expected = np.broadcast_to((1 - sizes)[None, :, None], (2, 3, 4))
    np.testing.assert_allclose(result.candidate, expected, rtol=1e-6)


def test_a_candidate_may_be_a_tree():
    params, context, start = problem()
    joined = lambda p, x, c, i: mixed(
        p, x, jnp.concatenate([c["a"], c["b"][:, None]], axis=-1), i
    )
    tree = {"a": start[:, :2], "b": start[:, 2]}
    config = RefineConfig(num_steps=3, gradient_clamp=0.05, noise_std=0.1)
    noise = jax.random.normal(jax.random.key(0), (3, BATCH, DIM))
    split = {"a": noise[..., :2], "b": noise[..., 2]}
    whole = run(config, noise=noise)
    result = run(config, joined, tree, noise=split)
    np.testing.assert_allclose(result.candidate["a"], whole.candidate[:, :2], rtol=1e-6)
    np.testing.assert_allclose(result.candidate["b"], whole.candidate[:, 2], rtol=1e-6)
    for name in ("energy", "gradient_norm"):
        np.testing.assert_allclose(
            result.trajectory[name], whole.trajectory[name], rtol=1e-5
        )


# What is recorded.


def test_the_default_observation_is_energy_and_gradient_norm_without_gradients():
    params, context, z = problem()
    result = run(RefineConfig(num_steps=2))
    for i in range(2):
        gradient = gradient_at(params, context, z, 0)
        energy = mixed(params, context, z, jnp.int32(0))
        norm = np.linalg.norm(gradient, axis=-1)
        np.testing.assert_allclose(result.trajectory["energy"][i], energy, rtol=1e-5)
        np.testing.assert_allclose(
            result.trajectory["gradient_norm"][i], norm, rtol=1e-5
        )
        z = z - STEP_SIZE * gradient
    total = lambda a: sum(
        t.sum() for t in jax.tree.leaves(run(RefineConfig(), step_size=a).trajectory)
    )
    assert jax.grad(total)(STEP_SIZE) == 0


def test_observe_sees_every_part_of_a_step():
    params, context, start = problem()
    config = RefineConfig(num_steps=3, num_landscapes=2, gradient_clamp=1e-3)
    result = run(config, normalize=jax.nn.softmax, observe=lambda step: step)
    seen = result.trajectory
    np.testing.assert_array_equal(seen.index, [0, 1, 2])
    np.testing.assert_array_equal(seen.landscape, [0, 1, 1])
    np.testing.assert_array_equal(seen.is_last, [False, False, True])
    np.testing.assert_allclose(seen.before[0], softmax(np.asarray(start)), rtol=1e-5)
    np.testing.assert_allclose(
        seen.before[1], softmax(np.asarray(seen.after[0])), rtol=1e-5
    )
    np.testing.assert_allclose(
        seen.gradient[2],  # not clamped
        gradient_at(params, context, seen.before[2], 1),
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_array_equal(seen.after[2], result.candidate)


# Many devices.


def test_a_sharded_batch_gives_what_an_unsharded_one_gives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    rng = np.random.default_rng(0)
    params, _, _ = problem()
    context = {
        "x": rng.standard_normal((16, DIM)).astype(np.float32),
        "mask": np.arange(16) % 3 > 0,
    }
    start = rng.standard_normal((16, DIM)).astype(np.float32)
    config = RefineConfig(num_steps=3, noise_std=0.5, step_size_jitter=2.0)

    @jax.jit
    def loss(params, context, start):
        result = refine(
            mixed,
            params,
            context,
            start,
            step_size=STEP_SIZE,
            config=config,
            key=jax.random.key(0),
        )
        return jnp.sum(result.candidate**2), result.candidate

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    expected = value_and_grad(params, context, start)
    actual = value_and_grad(params, *jax.device_put((context, start), sharding))
    assert len(actual[0][1].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
