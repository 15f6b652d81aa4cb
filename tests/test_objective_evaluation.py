"""Evaluation and prediction of an objective, feed-forward ones, amortised starts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK
from toy_objective import (
    BATCH,
    KEY,
    SEQ,
    SETUP,
    TOY,
    WEIGHTS,
    energy,
    init,
    make_batch,
    mean,
    objective_of,
    smoothed,
    value_and_grad,
)

from ebt_jax import models
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Draws, FeedForward
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.text import cross_entropy
from ebt_jax.objective_config import (
    ObjectiveConfig,
)
from ebt_jax.objectives import feed_forward, refined
from ebt_jax.thinking import AS_TRAINED, Thinking

# Evaluation and prediction.

EVALUATED = dataclasses.replace(
    SETUP, min_steps=2, noise_std=0.3, step_size_jitter=2.0, backprop="truncated"
)


def rows(batch, chosen):
    return {name: array[jnp.array(chosen)] for name, array in batch.items()}


def test_evaluate_gives_every_step_and_the_final_energy():
    objective, batch = objective_of(EVALUATED), make_batch()
    params = objective.init(KEY)
    seen = objective.evaluate(params, batch, KEY, 0)
    assert {name: array.shape for name, array in seen.items()} == {
        "nll": (3, BATCH, SEQ),
        "energy": (4, BATCH, SEQ),
        "gradient_norm": (3, BATCH, SEQ),
    }
    logits = objective.predict(params, batch, KEY, AS_TRAINED)
    nll = smoothed(logits, batch["targets"], 0.0)
    np.testing.assert_allclose(seen["nll"][-1], nll, rtol=1e-5)
    context = params["table"][batch["tokens"]]
    final = energy(params, context, jax.nn.softmax(logits), 1)
    np.testing.assert_allclose(seen["energy"][-1], final, rtol=1e-5)


def test_evaluate_takes_as_many_steps_as_it_is_told():
    """More steps stay in the last landscape and begin as fewer do."""
    objective, batch = objective_of(EVALUATED), make_batch()
    params = objective.init(KEY)
    few, trained, many = (
        objective.evaluate(params, batch, KEY, steps) for steps in (1, 0, 5)
    )
    assert [len(x["nll"]) for x in (few, trained, many)] == [1, 3, 5]
    np.testing.assert_allclose(few["nll"][0], trained["nll"][0], rtol=1e-5)
    np.testing.assert_allclose(many["nll"][:3], trained["nll"], rtol=1e-5)


def test_evaluation_draws_no_step_size():
    plain = dataclasses.replace(EVALUATED, step_size_jitter=1.0)
    batch = make_batch()
    a, b = (
        objective_of(setup).predict(objective_of().init(KEY), batch, KEY, AS_TRAINED)
        for setup in (
            dataclasses.replace(EVALUATED, noise_std=0.0),
            dataclasses.replace(plain, noise_std=0.0),
        )
    )
    np.testing.assert_array_equal(a, b)


def causal_model():
    return models.build(
        ModelConfig(num_layers=1, num_heads=1, dim=8, vocab_size=5, num_landscapes=2)
    )


@pytest.mark.parametrize("model", [TOY, causal_model()], ids=["toy", "causal"])
def test_evaluation_does_not_depend_on_the_batch(model):
    """Neither on its size nor on its order: draws belong to `index`."""
    objective, batch = refined(model, EVALUATED, ObjectiveConfig()), make_batch()
    params = objective.init(KEY)
    evaluate = jax.jit(objective.evaluate, static_argnums=3, compiler_options=QUICK)
    whole = evaluate(params, batch, KEY, 0)
    for chosen in ([3, 1, 0, 2], [2], [0]):
        part = evaluate(params, rows(batch, chosen), KEY, 0)
        for name, array in part.items():
            expected = whole[name][:, jnp.array(chosen)]
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)
    renamed = {**batch, "index": batch["index"] + 1}
    assert (evaluate(params, renamed, KEY, 0)["nll"] != whole["nll"]).all()


def test_non_finite_numbers_are_recorded_not_raised():
    objective, batch = objective_of(), make_batch()
    params = {**objective.init(KEY), "step_size": jnp.float32(jnp.inf)}
    (loss, metrics), _ = value_and_grad(objective, batch, params=params)
    assert not np.isfinite(loss) and np.isfinite(metrics["energy_first"])


# Feed-forward.


def table_model():
    predict = lambda params, batch: params["table"][batch["tokens"]]
    return FeedForward(init=init, predict=predict, loss=cross_entropy)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_feed_forward_is_the_mean_cross_entropy_of_one_pass(smoothing):
    objective = feed_forward(table_model(), ObjectiveConfig(label_smoothing=smoothing))
    params, batch = objective.init(KEY), make_batch()
    loss, metrics = objective.loss(params, batch, KEY)
    logits = params["table"][batch["tokens"]]
    expected = mean(smoothed(logits, batch["targets"], smoothing))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["tokens"] == WEIGHTS.sum()
    np.testing.assert_array_equal(
        objective.predict(params, batch, KEY, Thinking(7)), logits
    )
    seen = objective.evaluate(params, batch, KEY, 7)
    assert list(seen) == ["nll"]
    np.testing.assert_allclose(
        seen["nll"], smoothed(logits, batch["targets"], 0.0)[None], rtol=1e-5
    )


def test_feed_forward_ignores_padding():
    objective = feed_forward(table_model(), ObjectiveConfig())
    batch, other = make_batch(), make_batch(seed=9)
    targets = jnp.where(WEIGHTS > 0, batch["targets"], other["targets"])
    gradient = jax.grad(objective.loss, has_aux=True)
    a = gradient(objective.init(KEY), batch, KEY)
    b = gradient(objective.init(KEY), {**batch, "targets": targets}, KEY)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_amortised_start_is_scored_like_a_step_and_thought_from():
    guess = lambda params, context: 3.0 * context
    model = TOY._replace(guess=guess)
    setup = dataclasses.replace(SETUP, initial_candidate="amortised")
    objective = refined(model, setup, ObjectiveConfig())
    params, batch = objective.init(KEY), make_batch()
    total, metrics = objective.loss(params, batch, KEY)
    start = guess(params, model.encode_context(params, batch))
    mean = (cross_entropy(start, batch) * WEIGHTS).sum() / WEIGHTS.sum()
    np.testing.assert_allclose(metrics["nll_start"], mean, rtol=1e-6)
    given = refined(TOY, SETUP, ObjectiveConfig())
    rest, _ = given.loss(params, batch, KEY, Draws(candidate=start))
    np.testing.assert_allclose(total, (mean + 3 * rest) / 4, rtol=1e-6)
    other = objective.predict(params, batch, jax.random.key(5), AS_TRAINED)
    np.testing.assert_array_equal(
        objective.predict(params, batch, KEY, AS_TRAINED), other
    )


def test_an_amortised_start_of_a_model_without_one():
    setup = dataclasses.replace(SETUP, initial_candidate="amortised")
    message = "'amortised', but of this model there are noise, zeros"
    with pytest.raises(UserError, match=message):
        refined(TOY, setup, ObjectiveConfig())
