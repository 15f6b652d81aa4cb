"""Meta-losses against direct computation, on an energy small enough to do by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_objective import (
    BATCH,
    KEY,
    SEQ,
    SETUP,
    TOY,
    VOCAB,
    WEIGHTS,
    energy,
    init,
    make_batch,
    mean,
    objective_of,
    path_of,
    smoothed,
    start_of,
    value_and_grad,
)

from ebt_jax.interfaces import Draws
from ebt_jax.objective_config import (
    MIN_STEP_SIZE,
    ObjectiveConfig,
    RefineSetup,
    step_weight,
)
from ebt_jax.objectives import refined
from ebt_jax.refine import Schedule


def test_parameters_are_the_models_and_two_scalars():
    setup = dataclasses.replace(SETUP, noise_std=0.5)
    params = objective_of(setup).init(KEY)
    assert set(params) == {"table", "w", "step_size", "noise_std"}
    assert params["step_size"] == 2.0 and params["noise_std"] == 0.5
    assert {leaf.dtype.name for leaf in params.values()} == {"float32"}


def test_loss_and_metrics_equal_direct_computation():
    """With label smoothing s (N - 1 - i) / (N - 1), mean over steps."""
    objective, batch = objective_of(label_smoothing=0.4), make_batch()
    path = path_of(objective.init(KEY), batch)
    losses = [
        mean(smoothed(z, batch["targets"], 0.4 * (2 - i) / 2))
        for i, (_, z, _) in enumerate(path)
    ]
    (loss, metrics), _ = value_and_grad(objective, batch)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    first, last = mean(path[0][2]), mean(path[-1][2])
    expected = {
        "loss": np.mean(losses),
        "nll": losses[-1],
        "nll_first_step": losses[0],
        "energy_first": first,
        "energy_last": last,
        "energy_gap": first - last,
        "refine_steps": 3,
        "step_size": 2.0,
        "tokens": WEIGHTS.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    assert set(metrics) - set(expected) == {"gradient_norm_first", "gradient_norm_last"}


def test_the_last_step_is_never_smoothed():
    batch = make_batch()
    (smooth, _), _ = value_and_grad(
        objective_of(label_smoothing=0.4, loss_steps="last"), batch
    )
    (sharp, _), _ = value_and_grad(objective_of(loss_steps="last"), batch)
    np.testing.assert_allclose(smooth, sharp, rtol=1e-6)


def test_a_single_step_is_not_smoothed():
    setup = dataclasses.replace(SETUP, num_steps=1, num_landscapes=1)
    batch = make_batch()
    (smooth, _), _ = value_and_grad(objective_of(setup, label_smoothing=0.4), batch)
    (sharp, _), _ = value_and_grad(objective_of(setup), batch)
    np.testing.assert_allclose(smooth, sharp, rtol=1e-6)


def test_a_drawn_number_of_steps_gives_the_loss_of_that_many():
    """Mean, smoothing, metrics and contrastive term count the steps that are taken."""
    config = ObjectiveConfig(label_smoothing=0.4, contrastive_weight=0.3)
    batch, landscape = make_batch(), jnp.array([0, 1, 1])
    schedule = Schedule(landscape, jnp.int32(2))
    drawn = value_and_grad(
        refined(TOY, SETUP, config), batch, Draws(start_of(), schedule=schedule)
    )
    setup = dataclasses.replace(SETUP, num_steps=2)
    fixed = value_and_grad(refined(TOY, setup, config), batch)
    for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves(fixed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_loss_steps_last_scores_the_last_step_alone():
    batch = make_batch()
    (loss, metrics), _ = value_and_grad(objective_of(loss_steps="last"), batch)
    assert loss == metrics["nll"] != metrics["nll_first_step"]


def test_reconstruction_weight_scales_the_loss_but_not_the_metrics():
    batch = make_batch()
    (whole, metrics), _ = value_and_grad(objective_of(), batch)
    (half, same), _ = value_and_grad(objective_of(reconstruction_weight=0.5), batch)
    np.testing.assert_allclose(half, whole / 2, rtol=1e-6)
    np.testing.assert_allclose(same["nll"], metrics["nll"], rtol=1e-6)


def test_the_contrastive_term_equals_direct_computation():
    """Cross-entropy of [-E(target), -E(candidate before the last update)], label 0."""
    weight, batch = 0.7, make_batch()
    objective = objective_of(contrastive_weight=weight, loss_steps="last")
    params = objective.init(KEY)
    path = path_of(params, batch)
    context = params["table"][batch["tokens"]]
    target = energy(params, context, jax.nn.one_hot(batch["targets"], VOCAB), 1)
    scores = -jnp.stack([target, path[-1][2]], axis=-1)
    term = mean(-jax.nn.log_softmax(scores)[..., 0])
    (loss, metrics), gradients = value_and_grad(objective, batch)
    np.testing.assert_allclose(metrics["contrastive"], term, rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["nll"] + weight * term, rtol=1e-5)

    def by_hand(params):
        """The candidate before the last update is a constant (per_step)."""
        context = params["table"][batch["tokens"]]
        target = energy(params, context, jax.nn.one_hot(batch["targets"], VOCAB), 1)
        candidate = energy(params, context, path[-1][0], 1)
        term = jax.nn.softplus(target - candidate)
        return weight * (term * WEIGHTS).sum() / WEIGHTS.sum()

    (_, _), without = value_and_grad(objective_of(loss_steps="last"), batch)
    for name, expected in jax.grad(by_hand)(init(KEY)).items():
        np.testing.assert_allclose(
            gradients[name] - without[name], expected, rtol=1e-3, atol=1e-4
        )


def test_padding_changes_neither_loss_nor_gradients():
    objective = objective_of(contrastive_weight=0.5, label_smoothing=0.1)
    batch, other = make_batch(), make_batch(seed=9)
    changed = {
        **batch,
        "targets": jnp.where(WEIGHTS > 0, batch["targets"], other["targets"]),
        "tokens": jnp.where(WEIGHTS > 0, batch["tokens"], other["tokens"]),
    }
    assert (changed["targets"] != batch["targets"]).any()
    a, b = value_and_grad(objective, batch), value_and_grad(objective, changed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def test_a_batch_of_padding_has_loss_zero_and_finite_gradients():
    batch = {**make_batch(), "weights": jnp.zeros((BATCH, SEQ))}
    (loss, metrics), gradients = value_and_grad(objective_of(), batch)
    assert loss == 0 and metrics["tokens"] == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("learnable", [True, False])
def test_step_size_has_a_gradient_only_where_it_is_learnt(learnable):
    setup = dataclasses.replace(SETUP, step_size_learnable=learnable)
    _, gradients = value_and_grad(objective_of(setup), make_batch())
    assert (gradients["step_size"] != 0) == learnable
    assert (gradients["w"] != 0).all()


@pytest.mark.parametrize("learnable", [True, False])
def test_noise_std_has_a_gradient_only_where_it_is_learnt(learnable):
    setup = dataclasses.replace(SETUP, noise_std=0.5, noise_learnable=learnable)
    (_, metrics), gradients = value_and_grad(objective_of(setup), make_batch())
    assert (gradients["noise_std"] != 0) == learnable
    assert metrics["noise_std"] == 0.5


def test_a_learnt_step_size_never_falls_below_its_floor():
    objective, batch = objective_of(), make_batch()
    params = objective.init(KEY)
    (floor, _), _ = value_and_grad(
        objective, batch, params={**params, "step_size": jnp.float32(MIN_STEP_SIZE)}
    )
    (below, _), _ = value_and_grad(
        objective, batch, params={**params, "step_size": jnp.float32(-3)}
    )
    assert below == floor


def test_what_is_not_given_is_drawn_from_the_key():
    setup = dataclasses.replace(
        SETUP, min_steps=1, num_landscapes=1, noise_std=0.1, step_size_jitter=2.0
    )
    objective, batch = objective_of(setup), make_batch()
    params, loss = objective.init(KEY), jax.jit(objective.loss)
    keys = jax.random.split(KEY, 12)
    first, metrics = loss(params, batch, keys[0])
    assert first == loss(params, batch, keys[0])[0]
    seen = [loss(params, batch, key) for key in keys]
    assert len({float(value) for value, _ in seen}) == 12
    assert {int(metrics["refine_steps"]) for _, metrics in seen} == {1, 2, 3}


@pytest.mark.parametrize(
    ("fields", "std"),
    [({}, 1.0), ({"initial_scale": 3.0}, 3.0), ({"initial_candidate": "zeros"}, 0.0)],
)
def test_the_initial_candidate_is_noise_of_a_scale_or_zeros(fields, std):
    """Seen through an energy that is the candidate's mean square."""
    setup = RefineSetup(num_steps=1, normalize_steps="none", **fields)
    square = lambda params, context, candidate, i: jnp.mean(candidate**2, axis=-1)
    model = TOY._replace(energy=square)
    objective = refined(model, setup, ObjectiveConfig())
    batch = {
        **{k: jnp.zeros((20, 50), jnp.int32) for k in ("tokens", "targets")},
        "weights": jnp.ones((20, 50)),
    }
    _, metrics = objective.loss(objective.init(KEY), batch, KEY)
    np.testing.assert_allclose(metrics["energy_first"], std**2, rtol=0.1)


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("loss_steps", ["all", "last", "rising"])
def test_steps_weigh_1_together_and_none_that_is_not_taken(loss_steps, length):
    config = ObjectiveConfig(loss_steps=loss_steps)
    weights = np.asarray(step_weight(config, jnp.arange(5), length))
    expected = {"all": np.ones(length), "rising": np.arange(1, length + 1)}
    wanted = expected[loss_steps] if loss_steps in expected else np.eye(length)[-1]
    np.testing.assert_allclose(weights[:length], wanted / wanted.sum(), rtol=1e-6)
    assert not weights[length:].any()
