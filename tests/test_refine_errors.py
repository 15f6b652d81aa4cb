"""Every refusal of the core names the value, the rule and the remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.refine import RefineConfig, refine, refine_until

START = jnp.ones((2, 3))


def slope(params, context, candidate, landscape):
    return candidate.sum(axis=-1)


def starts(message):
    return "^" + re.escape(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0, but has to be at least 1"),
        (
            {"num_steps": 2, "min_steps": 3},
            "min_steps is 3, but has to be between 0 and num_steps (2)",
        ),
        ({"min_steps": -1}, "min_steps is -1, but has to be between 0 and"),
        ({"num_landscapes": 0}, "num_landscapes is 0, but has to be at least 1"),
        (
            {"backprop": "none"},
            "backprop is 'none', but has to be one of per_step, truncated, full",
        ),
        (
            {"meta_gradient": "exact"},
            "meta_gradient is 'exact', but has to be one of rule, autodiff",
        ),
        (
            {"normalize_steps": "last"},
            "normalize_steps is 'last', but has to be one of all, first, none",
        ),
        ({"noise_std": -1.0}, "noise_std is -1.0, but has to be zero or positive"),
        ({"gradient_clamp": -1.0}, "gradient_clamp is -1.0, but has to be zero or"),
        ({"absolute_clamp": -2.0}, "absolute_clamp is -2.0, but has to be zero or"),
        ({"sharpen": -0.5}, "sharpen is -0.5, but has to be zero or positive"),
        (
            {"step_size_jitter": 0.5},
            "step_size_jitter is 0.5, but has to be at least 1 (1 draws nothing)",
        ),
        (
            {"num_steps": 3, "num_landscapes": 2, "final_landscape_only": False},
            "num_steps is 3, but has to be a multiple of num_landscapes (2) when "
            "final_landscape_only is False",
        ),
        (
            {
                "num_steps": 4,
                "min_steps": 3,
                "num_landscapes": 2,
                "final_landscape_only": False,
            },
            "min_steps is 3, but has to be a multiple of num_landscapes (2)",
        ),
    ],
)
def test_refine_config_refuses(fields, message):
    with pytest.raises(ValueError, match=starts(message)):
        RefineConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0, but has to be at least 1"),
        ({"step_size": 0.0}, "step_size is 0.0, but has to be at least 0.0001"),
        (
            {"initial_candidate": "ones"},
            "initial_candidate is 'ones', but has to be one of noise, zeros",
        ),
        ({"initial_scale": -1.0}, "initial_scale is -1.0, but cannot be negative"),
        (
            {"noise_learnable": True},
            "noise_learnable is True, but noise_std is 0; give its initial value",
        ),
    ],
)
def test_refine_setup_refuses(fields, message):
    with pytest.raises(ValueError, match=starts(message)):
        RefineSetup(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss_steps": "first"},
            "loss_steps is 'first', but has to be one of all, last",
        ),
        (
            {"label_smoothing": 1.0},
            "label_smoothing is 1.0, but has to be in [0, 1)",
        ),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1, but has to be in [0, 1)"),
    ],
)
def test_objective_config_refuses(fields, message):
    with pytest.raises(ValueError, match=starts(message)):
        ObjectiveConfig(**fields)


BAD_ENERGIES = [
    (
        slope,
        jnp.ones((2, 3), jnp.int32),
        TypeError,
        "candidate has dtype int32, but refinement needs gradients; pass "
        "floating-point arrays",
    ),
    (slope, {}, ValueError, "candidate is an empty pytree; it needs at least one"),
    (
        lambda params, context, c, landscape: (c.sum(), c),
        START,
        TypeError,
        "energy_fn returned tuple, expected an array of energies",
    ),
    (
        lambda params, context, c, landscape: (c > 0).sum(axis=-1),
        START,
        TypeError,
        "energy_fn returned dtype int32, expected a float",
    ),
    (
        lambda params, context, c, landscape: c.sum(axis=0),
        START,
        ValueError,
        "energy_fn returned shape (3,), expected a leading part of the candidate's "
        "shape (2, 3), e.g. (2,)",
    ),
    (
        lambda params, context, c, landscape: c["a"].sum(axis=-1),
        {"a": START, "b": jnp.ones((3, 3))},
        ValueError,
        "energy_fn returned shape (2,), expected a leading part of the candidate's "
        "shape (3, 3)",
    ),
]


@pytest.mark.parametrize(("energy", "start", "kind", "message"), BAD_ENERGIES)
def test_both_loops_refuse_energies_that_are_none(energy, start, kind, message):
    options = {"step_size": 0.1, "config": RefineConfig()}
    with pytest.raises(kind, match=starts(message)):
        refine(energy, None, None, start, **options)
    with pytest.raises(kind, match=starts(message)):
        refine_until(energy, None, None, start, max_steps=2, **options)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"noise_std": 1.0},
            {},
            "refine has to draw noise but got key=None; pass a PRNG key",
        ),
        (
            {},
            {"noise_std": 1.0},
            "refine has to draw noise but got key=None; pass a PRNG key",
        ),
        (
            {"step_size_jitter": 2.0},
            {},
            "refine has to draw a step-size jitter but got key=None; pass a PRNG key",
        ),
        (
            {"step_size_jitter": 2.0, "noise_std": 1.0},
            {"noise": np.zeros((2, 2, 3), np.float32)},
            "refine has to draw a step-size jitter but got key=None; pass a PRNG key",
        ),
        (
            {"noise_std": 1.0},
            {"key": jax.random.split(jax.random.key(0), 3)},
            "key has shape (3,), expected a scalar or one key for each prediction, "
            "(2,)",
        ),
    ],
)
def test_refine_refuses_to_draw_without_fitting_keys(fields, options, message):
    config = RefineConfig(**fields)
    with pytest.raises(ValueError, match=starts(message)):
        refine(slope, None, None, START, step_size=0.1, config=config, **options)


def test_what_is_given_needs_no_key():
    config = RefineConfig(step_size_jitter=2.0, noise_std=1.0)
    refine(
        slope,
        None,
        None,
        START,
        step_size=0.1,
        config=config,
        noise=jnp.zeros((2, 2, 3)),
        jitter=jnp.zeros(2),
    )


def test_raw_keys_are_taken_as_typed_ones():
    config = RefineConfig(step_size_jitter=2.0, noise_std=1.0)
    raw, typed = (
        refine(slope, None, None, START, step_size=0.1, config=config, key=key)
        for key in (jax.random.PRNGKey(3), jax.random.key(3))
    )
    np.testing.assert_array_equal(raw.candidate, typed.candidate)
