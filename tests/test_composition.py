"""Energies of several models together, and a model that starts from another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from energies import mixed, problem
from tiny import QUICK, VOCAB, tiny

from ebt_jax import models
from ebt_jax.composition import compose, compose_models, ensemble, hybrid
from ebt_jax.errors import UserError
from ebt_jax.evaluation.generation import generate_ids
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.interfaces import EnergyModel
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.objectives import feed_forward, refined
from ebt_jax.refine import RefineConfig, refine
from ebt_jax.thinking import AS_TRAINED, Thinking

PARAMS, CONTEXT, START = problem()
KEY = jax.random.key(0)
SETUP = RefineSetup(num_steps=2, num_landscapes=2, step_size=5.0)


def solve(energy_fn, params, context, step_size, start=START):
    config = RefineConfig(num_steps=4, num_landscapes=2)
    return refine(
        energy_fn,
        params,
        context,
        start,
        step_size=step_size,
        config=config,
        normalize=jnp.tanh,
    ).candidate


def test_a_sum_is_weighted_and_a_difference_takes_away():
    other = jax.tree.map(lambda x: -2 * x, PARAMS)
    energy = compose([mixed, mixed, mixed], [0.5, 2.0, -1.0])
    landscape = jnp.int32(1)
    first = mixed(PARAMS, CONTEXT, START, landscape)
    second = mixed(other, CONTEXT, START, landscape)
    total = energy((PARAMS, other, PARAMS), [CONTEXT] * 3, START, landscape)
    np.testing.assert_allclose(total, 2 * second - 0.5 * first, rtol=1e-5)


def test_a_model_with_itself_is_that_model_at_twice_the_step_size():
    """As it is, under jit and vmap, and on a mesh of eight devices."""
    twice = compose([mixed, mixed], [1.0, 1.0])
    together = lambda start, context: solve(
        twice, (PARAMS, PARAMS), (context, context), 0.05, start
    )
    expected = solve(mixed, PARAMS, CONTEXT, 0.1)
    np.testing.assert_allclose(together(START, CONTEXT), expected, rtol=1e-6)
    one = lambda start, context: jax.tree.map(
        lambda x: x[0], together(start[None], jax.tree.map(lambda x: x[None], context))
    )
    each = jax.jit(jax.vmap(one), compiler_options=QUICK)(START, CONTEXT)
    np.testing.assert_allclose(each, expected, rtol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    eight = jnp.arange(8) % len(START)
    inputs = jax.device_put(
        jax.tree.map(lambda x: x[eight], (START, CONTEXT)),
        jax.NamedSharding(mesh, jax.P("data")),
    )
    sharded = jax.jit(together, compiler_options=QUICK)(*inputs)
    np.testing.assert_allclose(sharded, expected[eight], rtol=1e-5)


def energy_model(**fields):
    fields = {"num_layers": 1, "conditioning": "default", **fields}
    model = models.build(tiny(**fields))
    assert isinstance(model, EnergyModel)
    return model


def batch(length=5):
    tokens = jax.random.randint(jax.random.key(1), (2, length), 0, VOCAB)
    return {
        "tokens": tokens,
        "targets": tokens,
        "weights": jnp.ones(tokens.shape),
        "index": jnp.arange(2),
    }


def pair():
    """Of a model, and of itself with itself: objectives and their parameters."""
    model = energy_model()
    alone = refined(model, SETUP, ObjectiveConfig())
    both = refined(compose_models([model, model], [1.0, 1.0]), SETUP, ObjectiveConfig())
    params = jax.jit(alone.init, compiler_options=QUICK)(KEY)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), params
    ) | {"step_size": jnp.float32(6.0)}
    sizes = {name: params[name] for name in ("step_size", "noise_std")}
    members = {name: params[name] for name in params if name not in sizes}
    half = {"members": [members, members], **sizes, "step_size": jnp.float32(3.0)}
    return (alone, params), (both, half)


def test_models_compose_to_a_model():
    (alone, params), (both, members) = pair()
    predictions = [
        jax.jit(objective.predict, static_argnums=3, compiler_options=QUICK)(
            p, batch(), KEY, Thinking(3)
        )
        for objective, p in ((alone, params), (both, members))
    ]
    np.testing.assert_allclose(predictions[0], predictions[1], rtol=1e-3, atol=1e-4)
    made = [
        generate_ids(
            objective,
            p,
            [np.array([3]), np.array([1, 2, 4])],
            context=9,
            new_tokens=5,
            sampling=Sampling(0.0),
        )
        for objective, p in ((alone, params), (both, members))
    ]
    for ours, theirs in zip(*made, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_its_parameters_are_those_of_its_members():
    model = energy_model()
    composed = compose_models([model, model], [1.0, -0.5])
    params = jax.eval_shape(composed.init, KEY)
    assert len(params["members"]) == 2
    alone = jax.tree.structure(jax.eval_shape(model.init, KEY))
    assert jax.tree.structure(params["members"][1]) == alone


def test_a_hybrid_refines_what_another_model_predicts():
    model = energy_model()
    draft = jax.random.normal(jax.random.key(7), (2, 5, VOCAB))
    objective = refined(hybrid(model, lambda b: draft), SETUP, ObjectiveConfig())
    params = jax.jit(objective.init, compiler_options=QUICK)(KEY)
    predict = jax.jit(objective.predict, static_argnums=3, compiler_options=QUICK)
    expected = refine(
        model.energy,
        params,
        model.encode_context(params, batch()),
        draft,
        step_size=5.0,
        config=SETUP,
        normalize=jax.nn.softmax,
    ).candidate
    result = predict(params, batch(), KEY, AS_TRAINED)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_mistakes():
    with pytest.raises(UserError, match="2 energies and 1 weights"):
        compose([mixed, mixed], [1.0])
    with pytest.raises(UserError, match="0 energies and 0 weights"):
        compose([], [])
    apart = compose_models(
        [energy_model(), energy_model(vocab_size=VOCAB + 2)], [1.0, 1.0]
    )
    with pytest.raises(UserError, match=r"\(2, 5, 11\), but model 2 \(2, 5, 13\)"):
        jax.eval_shape(apart.initial_candidate, KEY, batch())


def test_an_ensemble_predicts_the_mean_of_its_members_probabilities():
    energy = refined(models.build(tiny()), SETUP, ObjectiveConfig())
    baseline = feed_forward(
        models.build(tiny(kind="transformer_pp")), ObjectiveConfig()
    )
    both = ensemble([energy, baseline], [3.0, 1.0])
    params = both.init(KEY)
    batch = {
        "tokens": jnp.arange(8).reshape(2, 4) % VOCAB,
        "targets": jnp.arange(1, 9).reshape(2, 4) % VOCAB,
        "weights": jnp.ones((2, 4)),
        "index": jnp.arange(2),
    }
    parts = [
        jax.nn.softmax(objective.predict(own, batch, KEY, Thinking(3)))
        for objective, own in zip((energy, baseline), params["members"], strict=True)
    ]
    expected = 0.75 * parts[0] + 0.25 * parts[1]
    predicted = jnp.exp(both.predict(params, batch, KEY, Thinking(3)))
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)
    right = jnp.take_along_axis(expected, batch["targets"][..., None], -1)[..., 0]
    nll = both.evaluate(params, batch, KEY, 3)["nll"]
    np.testing.assert_allclose(nll[0], -jnp.log(right), rtol=1e-5)
    loss, metrics = both.loss(params, batch, KEY)
    assert jnp.isfinite(loss) and metrics["tokens"] == 8


def test_an_ensemble_of_one_vocabulary_with_a_weight_for_each():
    one, other = (
        feed_forward(
            models.build(tiny(kind="transformer_pp", vocab_size=size)),
            ObjectiveConfig(),
        )
        for size in (VOCAB, VOCAB + 1)
    )
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(UserError, match="one positive weight for each"):
            ensemble([one, other], weights)
    both = ensemble([one, other], [1.0, 1.0])
    batch = {"tokens": jnp.zeros((1, 2), jnp.int32), "weights": jnp.ones((1, 2))}
    with pytest.raises(UserError, match="an ensemble needs models of one vocabulary"):
        both.predict(both.init(KEY), batch, KEY, AS_TRAINED)
