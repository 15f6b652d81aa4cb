"""How many steps `refine` takes, in which landscapes, and what it draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from energies import BATCH, DIM, counted, mixed, problem, quadratic

from ebt_jax.randomness import prediction_keys
from ebt_jax.refine import RefineConfig, Schedule, make_schedule, refine

STEP_SIZE = 0.1


def run(config, energy=mixed, candidate=None, step_size=STEP_SIZE, **options):
    params, context, start = problem()
    start = start if candidate is None else candidate
    return refine(
        energy, params, context, start, step_size=step_size, config=config, **options
    )


# Schedules.


def test_extra_steps_go_to_the_last_landscape():
    schedule = make_schedule(RefineConfig(num_steps=5, num_landscapes=3))
    assert schedule.landscape.tolist() == [0, 1, 2, 2, 2]
    assert schedule.length == 5


def test_extra_steps_may_go_to_every_landscape():
    config = RefineConfig(num_steps=6, num_landscapes=3, final_landscape_only=False)
    schedule = make_schedule(config)
    assert schedule.landscape.tolist() == [0, 0, 1, 1, 2, 2]
    assert schedule.length == 6


def test_a_drawn_length_is_uniform_between_min_steps_and_num_steps():
    config = RefineConfig(num_steps=4, min_steps=2, num_landscapes=2)
    keys = jax.random.split(jax.random.key(0), 300)
    schedules = jax.vmap(functools.partial(make_schedule, config))(keys)
    lengths, counts = np.unique(schedules.length, return_counts=True)
    assert lengths.tolist() == [2, 3, 4]
    assert counts.min() > 70
    assert (schedules.landscape == jnp.array([[0, 1, 1, 1]])).all()


def test_every_landscape_draws_its_own_number_of_steps():
    config = RefineConfig(
        num_steps=6, min_steps=2, num_landscapes=2, final_landscape_only=False
    )
    seen = set()
    for key in jax.random.split(jax.random.key(0), 60):
        landscape, length = make_schedule(config, key)
        taken = landscape[: int(length)].tolist()
        seen.add((taken.count(0), taken.count(1)))
        assert taken == sorted(taken)
    assert seen == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


def test_without_a_key_the_schedule_is_that_of_evaluation():
    """Once through each landscape, then the last one as often as any may be."""
    config = RefineConfig(
        num_steps=6, min_steps=2, num_landscapes=2, final_landscape_only=False
    )
    landscape, length = make_schedule(config)
    assert landscape[:length].tolist() == [0, 1, 1, 1]
    config = RefineConfig(num_steps=4, min_steps=2, num_landscapes=2)
    assert make_schedule(config).length == 4


@pytest.mark.parametrize("backprop", ["per_step", "truncated", "full"])
def test_steps_that_are_masked_equal_fewer_steps(backprop):
    """Candidate, trajectory and gradients; the rest of the trajectory is zero."""
    most, taken = 5, 3
    config = RefineConfig(
        num_steps=most, num_landscapes=2, backprop=backprop, noise_std=0.1
    )
    noise = jax.random.normal(jax.random.key(0), (most, BATCH, DIM))
    params, context, start = problem()

    def loss(params, config, schedule):
        result = refine(
            mixed,
            params,
            context,
            start,
            step_size=STEP_SIZE,
            config=config,
            noise=noise,
            schedule=schedule,
            transform=optax.trace(0.5),
            observe=lambda step: (1 + step.after**2).sum(),
        )
        return result.trajectory.sum(), result

    program = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    schedule = Schedule(make_schedule(config).landscape, jnp.int32(taken))
    gradient, result = program(params, config, schedule)
    fewer = dataclasses.replace(config, num_steps=taken)
    expected_gradient, expected = program(params, fewer, None)
    np.testing.assert_allclose(result.candidate, expected.candidate, rtol=1e-6)
    np.testing.assert_allclose(
        result.trajectory[:taken], expected.trajectory, rtol=1e-6
    )
    assert (result.trajectory[taken:] == 0).all()
    for name, array in expected_gradient.items():
        np.testing.assert_allclose(gradient[name], array, rtol=1e-5, atol=1e-6)


def test_a_random_number_of_steps_compiles_once():
    energy, traces = counted(mixed)
    config = RefineConfig(num_steps=4, min_steps=1)
    observe = lambda step: jnp.int32(1)
    program = jax.jit(lambda key: run(config, energy, key=key, observe=observe))
    keys = jax.random.split(jax.random.key(0), 20)
    program(keys[0])
    compiled = len(traces)
    lengths = {int(program(key).trajectory.sum()) for key in keys}
    assert lengths == {1, 2, 3, 4}
    assert len(traces) == compiled


@pytest.mark.parametrize("backprop", ["per_step", "truncated", "full"])
def test_traces_do_not_grow_with_the_number_of_steps(backprop):
    def traced(num_steps):
        energy, traces = counted(quadratic)
        config = RefineConfig(num_steps=num_steps, backprop=backprop)

        def loss(params):
            result = refine(
                energy, params, 1.0, jnp.zeros((2, 3)), step_size=0.1, config=config
            )
            return jnp.sum(result.candidate**2)

        jax.jit(jax.grad(loss)).lower({"scale": 1.0})
        return len(traces)

    assert traced(2) == traced(9) <= 10


# Draws.


def draws_of(config, key):
    """The normals of every step, read off a run on a flat energy from 0."""
    flat = lambda params, context, c, landscape: 0.0 * c.sum(axis=-1)
    before = run(
        config,
        flat,
        jnp.zeros((BATCH, DIM)),
        key=key,
        observe=lambda step: step.before,
    ).trajectory
    return jnp.diff(before, axis=0, prepend=jnp.zeros((1, BATCH, DIM)))


def test_explicit_noise_stands_for_the_draws_of_a_key():
    key, std = jax.random.key(3), 0.5
    config = RefineConfig(num_steps=3, noise_std=std)
    noise = draws_of(config, key) / std
    drawn = run(config, key=key)
    given = run(config, noise=noise)
    np.testing.assert_allclose(drawn.candidate, given.candidate, rtol=1e-5, atol=1e-6)
    assert len({float(x) for x in jnp.ravel(noise)}) == noise.size


def test_noise_is_standard_normal_times_its_deviation():
    flat = lambda params, context, c, landscape: 0.0 * c.sum(axis=-1)
    result = run(
        RefineConfig(num_steps=1, noise_std=3.0),
        flat,
        jnp.zeros((100, 100)),
        key=jax.random.key(0),
    )
    assert abs(float(result.candidate.std()) - 3.0) < 0.1
    assert abs(float(result.candidate.mean())) < 0.1


def test_a_learnt_deviation_replaces_the_configured_one():
    config = RefineConfig(num_steps=2, noise_std=0.5)
    key = jax.random.key(0)
    learnt = run(config, key=key, noise_std=0.25)
    expected = run(RefineConfig(num_steps=2, noise_std=0.25), key=key)
    np.testing.assert_array_equal(learnt.candidate, expected.candidate)


def test_jitter_draws_each_step_size_between_a_over_s_and_a_times_s():
    slope = lambda params, context, c, landscape: c.sum(axis=-1)
    config = RefineConfig(num_steps=2, step_size_jitter=4.0)
    start = jnp.zeros((2000, 2))
    result = run(
        config, slope, start, 0.5, key=jax.random.key(0), observe=lambda s: s.after
    )
    sizes = -result.trajectory[0]
    np.testing.assert_array_equal(sizes[:, 0], sizes[:, 1])  # one for each prediction
    np.testing.assert_allclose(-result.candidate, 2 * sizes, rtol=1e-6)  # and all steps
    assert 0.125 <= sizes.min() < 0.13 and 1.99 < sizes.max() <= 2.0
    assert abs(float(sizes.mean()) - (0.125 + 2.0) / 2) < 0.05
    given = run(config, slope, start[:2], 0.5, jitter=jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(-given.candidate[:, 0], [0.25, 4.0], rtol=1e-6)


def test_with_a_key_per_prediction_no_draw_depends_on_the_batch():
    config = RefineConfig(num_steps=3, noise_std=0.5, step_size_jitter=2.0, min_steps=1)
    params, context, start = problem()
    keys = prediction_keys(jax.random.key(0), jnp.arange(BATCH), jnp.arange(1))[:, 0]

    def of(rows):
        part = {name: array[rows] for name, array in context.items()}
        result = refine(
            mixed,
            params,
            part,
            start[rows],
            step_size=STEP_SIZE,
            config=config,
            key=keys[rows],
        )
        return result.candidate

    whole = of(np.arange(BATCH))
    for rows in map(np.array, ([3, 0], [1], [4, 2, 1])):
        np.testing.assert_allclose(
            of(np.array(rows)), whole[jnp.array(rows)], rtol=1e-6
        )
