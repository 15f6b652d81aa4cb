import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebt_jax.errors import UserError
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training.config import OptimConfig
from ebt_jax.training.optim import learning_rates, make_optimizer, parameter_groups

PARAMS = {
    "layers": {"w": jnp.array([[1.0, -2.0]]), "norm": jnp.ones(2)},
    "embed": jnp.full((3,), 0.5),
    "step_size": jnp.float32(5.0),
    "noise_std": jnp.float32(1.0),
}
LEARNT = RefineSetup(step_size_learnable=True, noise_std=1.0, noise_learnable=True)
FIXED = RefineSetup(step_size_learnable=False, noise_std=1.0)
CONFIG = OptimConfig(
    peak_lr=0.1,
    step_size_lr_multiplier=3.0,
    warmup_steps=4,
    schedule_steps=10,
    weight_decay=0.5,
    clip_norm=0.0,
)


def closed_form(k, peak, end, warmup=4, total=10):
    if k <= warmup:
        return peak * k / warmup
    done = min((k - warmup) / (total - warmup), 1.0)
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("shared, end", [(False, 0.03), (True, 0.01)])
def test_schedules_follow_the_closed_formula(shared, end):
    rates = learning_rates(dataclasses.replace(CONFIG, final_lr_shared=shared))
    counts = np.arange(15)
    weights = [closed_form(k + 1, 0.1, 0.01) for k in counts]
    step_size = [closed_form(k + 1, 0.3, end) for k in counts]
    np.testing.assert_allclose(rates["weights"](counts), weights, rtol=1e-6)
    np.testing.assert_allclose(rates["step_size"](counts), step_size, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 10, 20])
def test_schedules_without_warmup_or_without_cosine_are_finite(warmup):
    rate = learning_rates(dataclasses.replace(CONFIG, warmup_steps=warmup))["weights"]
    values = np.asarray(rate(np.arange(25)))
    assert np.isfinite(values).all() and values.max() == pytest.approx(0.1, rel=0.05)


def test_an_unresolved_schedule_is_refused():
    with pytest.raises(UserError, match="optim.schedule_steps is 0, which stands for"):
        learning_rates(dataclasses.replace(CONFIG, schedule_steps=0))


def one_update(config, refine, gradient, params=PARAMS, updates=1):
    optimizer = make_optimizer(config, refine, params)
    state = optimizer.init(params)
    for _ in range(updates):
        change, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, change)
    return params


def test_one_step_against_hand_arithmetic():
    gradient = jax.tree.map(lambda p: 0.25 * jnp.ones_like(p), PARAMS)
    after = one_update(CONFIG, LEARNT, gradient)
    rate = 0.1 / 4
    # At the first step Adam's direction is g / (|g| + eps), here 1.
    for before, now in (
        (PARAMS["layers"]["w"], after["layers"]["w"]),
        (PARAMS["layers"]["norm"], after["layers"]["norm"]),
        (PARAMS["embed"], after["embed"]),
    ):
        np.testing.assert_allclose(now, before - rate * (1 + 0.5 * before), rtol=1e-6)
    np.testing.assert_allclose(after["step_size"], 5.0 - 3 * rate, rtol=1e-6)
    np.testing.assert_allclose(after["noise_std"], 1.0 - rate, rtol=1e-6)


def test_two_steps_against_hand_arithmetic():
    config = dataclasses.replace(CONFIG, weight_decay=0.0)
    params = {"w": jnp.float32(1.0)}
    optimizer = make_optimizer(config, LEARNT, params)
    state = optimizer.init(params)
    for gradient in (0.5, -2.0):
        change, state = optimizer.update({"w": jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, change)
    first, second = 0.9 * 0.1 * 0.5 + 0.1 * -2.0, 0.999 * 0.001 * 0.25 + 0.001 * 4.0
    direction = (first / (1 - 0.9**2)) / (
        math.sqrt(second / (1 - 0.999**2)) + config.eps
    )
    expected = 1.0 - 0.025 - 0.05 * direction
    np.testing.assert_allclose(params["w"], expected, rtol=1e-6)


def test_what_is_not_learnt_does_not_move_at_all():
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    after = one_update(CONFIG, FIXED, gradient, updates=3)
    assert after["step_size"] == 5.0 and after["noise_std"] == 1.0
    assert (after["embed"] != PARAMS["embed"]).all()


def test_one_norm_clips_everything_and_counts_the_step_size():
    # Adam divides by the gradient's size; a huge eps leaves it proportional to it.
    config = dataclasses.replace(CONFIG, weight_decay=0.0, eps=1e6, clip_norm=1.0)
    gradient = {"w": jnp.float32(3.0), "step_size": jnp.float32(4.0)}
    params = {"w": jnp.float32(0.0), "step_size": jnp.float32(0.0)}
    optimizer = make_optimizer(config, LEARNT, params)
    change, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(change["w"], -0.025 * 0.6e-6, rtol=1e-5)
    np.testing.assert_allclose(change["step_size"], -0.075 * 0.8e-6, rtol=1e-5)


@pytest.mark.parametrize("refine", [LEARNT, FIXED])
def test_groups_cover_every_parameter_once(refine):
    groups = parameter_groups(PARAMS, refine)
    assert jax.tree.structure(groups) == jax.tree.structure(PARAMS)
    known = {*learning_rates(CONFIG), "fixed"}
    assert set(jax.tree.leaves(groups)) <= known
    learnt = refine.step_size_learnable
    assert groups["step_size"] == ("step_size" if learnt else "fixed")
    assert groups["noise_std"] == ("weights" if learnt else "fixed")
    del groups["step_size"], groups["noise_std"]
    assert set(jax.tree.leaves(groups)) == {"weights"}


def test_muon_moves_matrices_along_orthogonal_directions_as_long_as_adams():
    """Each layer's and each part's matrix is one; all else moves as with AdamW."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    params = {
        "blocks": {
            "qkv": {"kernel": draw(2, 12, 3, 8)},
            "norm": {"scale": draw(2, 12)},
        },
        "embed": {"embedding": draw(5, 12)},
        "step_size": jnp.float32(5.0),
        "noise_std": jnp.float32(0.0),
    }
    gradient = jax.tree.map(lambda x: draw(*x.shape), params)
    config = dataclasses.replace(CONFIG, weight_decay=0.0, warmup_steps=0)
    muon = dataclasses.replace(config, name="muon")
    after = one_update(muon, LEARNT, gradient, params)
    plain = one_update(config, LEARNT, gradient, params)
    kernel = lambda tree: np.asarray(tree["blocks"]["qkv"]["kernel"])
    rate = float(learning_rates(muon)["weights"](0))
    moved = (kernel(after) - kernel(params)) / rate
    for layer in range(2):
        for part in range(3):
            sizes = np.linalg.svd(moved[layer, :, part], compute_uv=False)
            # Newton-Schulz leaves singular values near 1, here times 0.2 sqrt(12).
            assert (abs(sizes / (0.2 * 12**0.5) - 1) < 0.5).all()
    others = lambda tree: {**tree, "blocks": tree["blocks"]["norm"]}
    for a, b in zip(*map(jax.tree.leaves, (others(after), others(plain))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(UserError, match="optim.name is 'sgd', but has to be one of"):
        OptimConfig(name="sgd")
