"""Thinking: steps, tolerance and the best of several candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from energies import mixed, problem
from tiny import QUICK

from ebt_jax.errors import UserError
from ebt_jax.randomness import fold_in, normal, prediction_keys
from ebt_jax.refine import RefineConfig, refine, refine_until
from ebt_jax.thinking import (
    AS_TRAINED,
    Adam,
    Annealed,
    Langevin,
    Lower,
    Mala,
    Momentum,
    Thinking,
    final_energy,
    think,
)

PARAMS, CONTEXT, START = problem()
KEYS = prediction_keys(jax.random.key(3), jnp.arange(len(START)), jnp.arange(1))[:, 0]
CONFIG = RefineConfig(num_steps=2, num_landscapes=2, noise_std=0.1)
OPTIONS = {"step_size": 0.1, "config": CONFIG, "normalize": jnp.tanh}


def initial(keys):
    return normal(keys, (*keys.shape, START.shape[1]), START.dtype)


def solver(thinking, energy=mixed, context=CONTEXT, **options):
    options = {**OPTIONS, "initial": initial, **options}
    run = lambda keys: think(
        energy, PARAMS, context, keys, thinking=thinking, **options
    )
    return jax.jit(run, compiler_options=QUICK)


def solve(thinking, **options):
    return solver(thinking, **options)(KEYS)


def test_as_trained_it_is_refine():
    result = solve(AS_TRAINED)
    expected = refine(
        mixed,
        PARAMS,
        CONTEXT,
        initial(fold_in(KEYS, 0)),
        key=fold_in(KEYS, 1),
        **OPTIONS,
    )
    np.testing.assert_allclose(result.candidate, expected.candidate, rtol=1e-5)
    assert result.num_steps.tolist() == [2] * len(START)


def test_any_number_of_steps():
    result = solve(Thinking(num_steps=5))
    assert result.num_steps.tolist() == [5] * len(START)
    unlike = solve(AS_TRAINED).candidate != result.candidate
    assert unlike.all()


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1])
def test_with_a_tolerance_it_is_refine_until(tolerance):
    options = {**OPTIONS, "config": RefineConfig(num_steps=2, num_landscapes=2)}
    result = solve(Thinking(40, tolerance=tolerance), **options)
    expected = refine_until(
        mixed,
        PARAMS,
        CONTEXT,
        initial(fold_in(KEYS, 0)),
        max_steps=40,
        tolerance=tolerance,
        **options,
    )
    np.testing.assert_allclose(result.candidate, expected.candidate, rtol=1e-5)
    np.testing.assert_array_equal(result.num_steps, expected.num_steps)
    assert len(set(result.num_steps.tolist())) > 1  # each stops on its own


def test_until_the_most_steps_it_draws_and_does_what_fixed_steps_do():
    """With noise as learnt, not as configured."""
    learnt = {"noise_std": jnp.float32(0.02)}
    slope = lambda *arguments: mixed(*arguments) + 5 * jnp.sum(arguments[2], axis=-1)
    fixed = solve(Thinking(4), energy=slope, **learnt)
    until = solve(Thinking(4, tolerance=0.0), energy=slope, **learnt)
    assert until.num_steps.tolist() == [4] * len(START)
    np.testing.assert_allclose(until.candidate, fixed.candidate, rtol=1e-6)
    configured = solve(Thinking(4), energy=slope)
    assert (configured.candidate != fixed.candidate).all()


@pytest.mark.parametrize("thinking", [Thinking(), Thinking(3), Thinking(9, 1, 0.01)])
def test_the_best_of_several_has_the_lowest_final_energy(thinking):
    """Each candidate refined apart; the first is what there is without others."""
    keys = [KEYS, *(fold_in(KEYS, i) for i in range(2, 5))]
    apart = list(map(solver(thinking), keys))
    energies = jnp.stack(
        [
            final_energy(mixed, PARAMS, CONTEXT, x.candidate, CONFIG, jnp.tanh)
            for x in apart
        ]
    )
    best = jnp.argmin(energies, axis=0)
    assert len(set(best.tolist())) > 1
    result = solve(thinking._replace(best_of=4))
    for i, chosen in enumerate(best.tolist()):
        np.testing.assert_allclose(
            result.candidate[i], apart[chosen].candidate[i], rtol=1e-5
        )
        assert result.num_steps[i] == apart[chosen].num_steps[i]


def test_the_final_energy_is_taken_in_the_last_landscape_where_candidates_live():
    expected = lambda c: mixed(PARAMS, CONTEXT, c, jnp.int32(1))
    for steps, candidate in (
        ("all", jnp.tanh(START)),
        ("first", START),
        ("none", START),
    ):
        config = RefineConfig(num_landscapes=2, normalize_steps=steps)
        energy = final_energy(mixed, PARAMS, CONTEXT, START, config, jnp.tanh)
        np.testing.assert_array_equal(energy, expected(candidate))


def test_a_diverged_candidate_is_never_the_best():
    def some_diverge(keys):
        start = initial(keys)
        return jnp.where(start[:, :1] > 0, jnp.nan, start)

    alone = solve(AS_TRAINED, initial=some_diverge).candidate
    assert jnp.isnan(alone).any()
    best = solve(Thinking(best_of=12), initial=some_diverge).candidate
    assert jnp.isfinite(best).all()


def test_no_draw_depends_on_the_batch():
    rows = jnp.array([3, 0])
    thinking = Thinking(6, best_of=3, tolerance=1e-3)
    whole = solve(thinking)
    context = jax.tree.map(lambda x: x[rows], CONTEXT)
    part = solver(thinking, context=context)(KEYS[rows])
    np.testing.assert_allclose(part.candidate, whole.candidate[rows], rtol=1e-5)
    np.testing.assert_array_equal(part.num_steps, whole.num_steps[rows])


@pytest.mark.parametrize(
    ("thinking", "message"),
    [
        (Thinking(num_steps=-1), "num_steps is -1, but cannot be negative"),
        (Thinking(best_of=0), "best_of is 0, but has to be at least 1"),
        (Thinking(tolerance=-1.0), "tolerance is -1.0, but cannot be negative"),
        (Thinking(tolerance=float("nan")), "tolerance is nan, but cannot"),
        (Thinking(by="luck"), "by is 'luck', but has to be one of energy, drop"),
        (Thinking(landscapes="none"), "landscapes is 'none', but has to be one of"),
        (Thinking(landscapes="each"), "landscapes is 'each', but no steps are given"),
        (Thinking(step_size=-0.5), "step_size is -0.5, but cannot be negative"),
        (Thinking(step_size=0.5, method=Adam()), "adam has its own; give it rate"),
        (Thinking(tolerance=0.1, method=Lower()), "but lower takes all its steps"),
        (Thinking(tolerance=0.1, method=Mala()), "but mala takes all its steps"),
        (
            Thinking(3, tolerance=0.1, landscapes="each"),
            "energies are compared in the last one only",
        ),
    ],
)
def test_what_cannot_be_is_refused(thinking, message):
    with pytest.raises(UserError, match=message):
        solve(thinking)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: Annealed(0.0), "rate of annealed is 0.0, but has to be above 0"),
        (lambda: Momentum(1.0), r"decay of momentum is 1.0, but has to be in \[0, 1\)"),
        (lambda: Adam(rate=0.0), "rate of adam is 0.0, but has to be above 0"),
        (lambda: Adam(decay_squares=1.5), "decay_squares of adam is 1.5"),
        (lambda: Langevin(0.0), "noise of langevin is 0.0, but has to be above 0"),
        (lambda: Lower(1.0), r"shrink of lower is 1.0, but has to be in \(0, 1\)"),
        (lambda: Mala(-1.0), "temperature of mala is -1.0, but has to be above 0"),
    ],
)
def test_methods_refuse_what_cannot_be(method, message):
    with pytest.raises(UserError, match=message):
        method()
