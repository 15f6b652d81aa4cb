"""`refine_until`: every prediction stops on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from energies import mixed, problem, quadratic

from ebt_jax.randomness import prediction_keys
from ebt_jax.refine import RefineConfig, refine, refine_until

CONFIG = RefineConfig()


def bowls(scales):
    """Predictions on quadratics of other curvatures, all from 1 towards 0."""

    def energy(params, context, candidate, landscape):
        return 0.5 * context * jnp.sum(candidate**2, axis=-1)

    return energy, None, jnp.asarray(scales), jnp.ones((len(scales), 2))


def test_a_quadratic_converges_to_its_minimum():
    centre = jnp.array([[1.0, -2.0]])
    result = refine_until(
        quadratic,
        {"scale": jnp.float32(1)},
        centre,
        jnp.zeros((1, 2)),
        step_size=0.5,
        config=CONFIG,
        max_steps=200,
    )
    np.testing.assert_allclose(result.candidate, centre, atol=1e-6)
    assert result.converged.all()
    assert 5 < result.num_steps[0] < 60
    assert result.energy[0] < 1e-12


def test_each_prediction_stops_on_its_own():
    """Alone it ends where it ends in company: candidate, energy, number of steps."""
    scales = [0.05, 1.0, 1.9, 0.5]
    solve = lambda problem: refine_until(
        *problem, step_size=1.0, config=CONFIG, max_steps=500, tolerance=1e-4
    )
    together = solve(bowls(scales))
    assert together.converged.all()
    assert len(set(together.num_steps.tolist())) == 4
    for i, scale in enumerate(scales):
        alone = solve(bowls([scale]))
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[i], theirs[0], rtol=1e-6)


def test_it_stops_at_the_first_fall_below_the_tolerance():
    """By hand: c halves, energies 1, 1/4, 1/16, ...; a fall of 3/64 is too small."""
    result = refine_until(
        *bowls([1.0]), step_size=0.5, config=CONFIG, max_steps=100, tolerance=0.1
    )
    assert result.num_steps.tolist() == [3]
    np.testing.assert_allclose(result.candidate, [[1 / 8, 1 / 8]])
    np.testing.assert_allclose(result.energy, [1 / 16])


def test_an_energy_that_always_falls_takes_the_fixed_steps_of_refine():
    params, context, start = problem()
    config = RefineConfig(num_steps=6, num_landscapes=2, absolute_clamp=1.0)
    options = {"step_size": 0.01, "transform": optax.trace(0.5)}

    def slope(params, context, candidate, landscape):
        energy = mixed(params, context, candidate, landscape)
        return energy + 5 * jnp.sum(candidate, axis=-1)

    expected = refine(slope, params, context, start, config=config, **options)
    result = refine_until(
        slope, params, context, start, config=config, max_steps=6, **options
    )
    np.testing.assert_allclose(result.candidate, expected.candidate, rtol=1e-6)
    np.testing.assert_allclose(
        result.energy, expected.trajectory["energy"][-1], rtol=1e-6
    )
    assert (result.num_steps == 6).all() and not result.converged.any()


def test_an_energy_that_rises_keeps_the_candidate_before_it():
    """Step size 3 overshoots: c = 1, -2, 4; the second energy is already higher."""
    result = refine_until(*bowls([1.0]), step_size=3.0, config=CONFIG, max_steps=9)
    np.testing.assert_allclose(result.candidate, [[-2.0, -2.0]])
    assert result.num_steps.tolist() == [1]
    assert result.energy.tolist() == [1.0]
    assert result.converged.all()


def test_landscapes_are_all_visited_before_energies_are_compared():
    """Each landscape lies higher than the one before it."""

    def energy(params, context, candidate, landscape):
        return 0.5 * jnp.sum(candidate**2, axis=-1) + 10.0 * landscape

    result = refine_until(
        energy,
        None,
        None,
        jnp.ones((1, 2)),
        step_size=0.5,
        config=RefineConfig(num_steps=3, num_landscapes=3),
        max_steps=5,
    )
    assert result.num_steps.tolist() == [5]
    np.testing.assert_allclose(result.candidate, [[2.0**-5] * 2])


def test_a_non_finite_energy_stops_that_prediction_alone():
    energy, params, scales, start = bowls([1.0, jnp.nan, 1.0])
    solve = lambda start, scales: refine_until(
        energy, params, scales, start, step_size=0.5, config=CONFIG, max_steps=8
    )
    result = solve(start, scales)
    assert result.num_steps.tolist() == [8, 0, 8]
    np.testing.assert_array_equal(result.candidate[1], start[1])
    np.testing.assert_array_equal(result.candidate[0], result.candidate[2])
    assert np.isfinite(result.candidate).all()


def test_jit_and_vmap_change_nothing():
    energy, params, scales, start = bowls([0.3, 1.0, 1.7])

    def solve(scale, start):
        return refine_until(
            energy,
            params,
            scale,
            start,
            step_size=1.0,
            config=CONFIG,
            max_steps=50,
            tolerance=1e-3,
        )

    expected = solve(scales, start)
    jitted = jax.jit(solve)(scales, start)
    mapped = jax.vmap(solve)(scales[:, None], start[:, None])
    for plain, a, b in zip(expected, jitted, mapped, strict=True):
        np.testing.assert_allclose(a, plain, rtol=1e-6)
        np.testing.assert_allclose(b[:, 0], plain, rtol=1e-6)


def test_noise_belongs_to_the_prediction():
    params, context, start = problem()
    keys = prediction_keys(jax.random.key(0), jnp.arange(len(start)), jnp.arange(1))[
        :, 0
    ]

    def solve(rows):
        return refine_until(
            mixed,
            params,
            jax.tree.map(lambda x: x[rows], context),
            start[rows],
            step_size=0.01,
            config=RefineConfig(noise_std=0.01),
            max_steps=3,
            key=keys[rows],
        )

    rows = jnp.array([2, 0])
    np.testing.assert_allclose(
        solve(rows).candidate, solve(jnp.arange(5)).candidate[rows], rtol=1e-5
    )


# Rows that leave the work -------------------------------------------------------------

SCALES = (0.05, 1.9, 0.5, 1.0, 0.03, 1.2, 0.7, 1.0, 1.6, 0.9, 0.2)
NOISY = {
    "config": RefineConfig(noise_std=1e-3),
    "key": jax.random.split(jax.random.key(3), len(SCALES)),
}


def computing(energy_fn):
    """The energy, and a list of how many rows each evaluation was of."""
    rows = []

    def energy(params, context, candidate, landscape):
        jax.debug.callback(functools.partial(rows.append, len(candidate)))
        return energy_fn(params, context, candidate, landscape)

    return energy, rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": 25},
        {"transform": optax.scale_by_adam(eps=1.0)},
        {"step_size": jnp.linspace(0.5, 1.1, len(SCALES))},
        {"config": RefineConfig(num_landscapes=4, num_steps=4)},
        NOISY,
    ],
    ids=["plain", "few_steps", "adam", "step_sizes", "landscapes", "noise"],
)
def test_rows_that_leave_change_no_result_and_cost_nothing(options):
    energy, *problem = bowls(SCALES)
    options = {
        **{"step_size": 1.0, "config": CONFIG, "max_steps": 300, "tolerance": 1e-4},
        **options,
    }
    plain, together = computing(energy)
    expected = refine_until(plain, *problem, **options)
    narrowed, apart = computing(energy)
    take = lambda scales, index: scales[index]
    result = refine_until(narrowed, *problem, rows=take, **options)
    jax.effects_barrier()
    assert len(set(expected.num_steps.tolist())) > 3
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert set(together) == {len(SCALES)}
    assert sum(apart) < sum(together)
    assert {11, 5, 1} >= set(apart) > {11}


def test_rows_of_several_predictions_leave_when_all_have_stopped():
    scales = jnp.asarray(SCALES[:8]).reshape(4, 2)
    energy = lambda params, scales, candidate, landscape: (
        0.5 * scales * (candidate**2).sum(-1)
    )
    options = {"step_size": 1.0, "config": CONFIG, "max_steps": 300, "tolerance": 1e-4}
    start = jnp.ones((4, 2, 3))
    expected = refine_until(energy, None, scales, start, **options)
    narrowed, rows = computing(energy)
    take = lambda scales, index: scales[index]
    result = refine_until(narrowed, None, scales, start, rows=take, **options)
    jax.effects_barrier()
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert set(rows) == {4, 2}


def test_rows_need_a_key_for_each_prediction():
    options = {"step_size": 1.0, "max_steps": 5, **NOISY, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"a key of shape \(\); pass one key for each"):
        refine_until(*bowls(SCALES), rows=lambda scales, i: scales[i], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0, but has to be at least 1"),
        ({"tolerance": -1.0}, "tolerance is -1.0, but has to be zero or positive"),
        (
            {"config": RefineConfig(noise_std=1.0)},
            "refine_until has to draw noise but got key=None; pass a key",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    options = {"step_size": 1.0, "config": CONFIG, "max_steps": 5, **options}
    with pytest.raises(ValueError, match=message):
        refine_until(*bowls([1.0]), **options)
