"""The fast way to train computes what plain differentiation of `refine` computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, VOCAB, tiny

from ebt_jax import models
from ebt_jax.categorical import covers
from ebt_jax.interfaces import Draws
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.objectives import refined
from ebt_jax.randomness import over_predictions

BATCH, SEQ = 4, 5
KEY = jax.random.key(7)

SYSTEM_1 = RefineSetup(num_steps=2, num_landscapes=2, step_size=2.0)
SYSTEM_2 = RefineSetup(
    num_steps=3,
    min_steps=2,
    num_landscapes=2,
    step_size=5.0,
    step_size_learnable=False,
    step_size_jitter=2.0,
    noise_std=3.0,
    backprop="truncated",
)
LAST = ObjectiveConfig(loss_steps="last")
change = dataclasses.replace

MODELS = {
    "default": {"conditioning": "default"},
    "time_embed": {"conditioning": "time_embed"},
    "adaln": {"conditioning": "adaln"},
    "adaln_zero": {"conditioning": "adaln_zero"},
    "tied": {"tied_embedding": True},
    "anchored": {"conditioning": "default", "candidate_input": "anchored"},
    "anchored adaln": {"conditioning": "adaln", "candidate_input": "anchored"},
    "trunk": {
        "conditioning": "default",
        "candidate_input": "anchored",
        "candidate_layers": 1,
    },
    "final": {"conditioning": "default", "candidate_input": "final"},
    "scales": {"conditioning": "default", "landscape_scales": True},
}
SETUPS = {
    "one step": (
        change(SYSTEM_1, num_steps=1, num_landscapes=1, initial_scale=0.3),
        None,
    ),
    "more steps than landscapes": (
        change(SYSTEM_1, num_steps=4, step_size_jitter=2.0),
        None,
    ),
    "steps drawn": (change(SYSTEM_1, num_steps=4, min_steps=2), None),
    "smoothed": (
        change(SYSTEM_1, initial_candidate="zeros"),
        ObjectiveConfig(label_smoothing=0.3, reconstruction_weight=0.3),
    ),
    "rising, steps drawn": (
        change(SYSTEM_1, num_steps=3, min_steps=1),
        ObjectiveConfig(loss_steps="rising"),
    ),
    "step size at its bound": (change(SYSTEM_1, step_size=1e-4), None),
    "last, smoothed": (
        change(SYSTEM_1, num_steps=3, step_size_learnable=False),
        change(LAST, label_smoothing=0.3),
    ),
    "last, noise": (
        change(SYSTEM_1, noise_std=0.5, initial_candidate="zeros"),
        LAST,
    ),
    "system 2": (SYSTEM_2, LAST),
}


def model_of(**fields):
    return tiny(**{"num_layers": 1, **fields})


def make_batch(packed=False):
    rng = np.random.default_rng(0)
    ids = lambda: jnp.asarray(rng.integers(VOCAB, size=(BATCH, SEQ)), jnp.int32)
    weights = np.ones((BATCH, SEQ), np.float32)
    weights[1, 3:] = weights[2, 0] = 0
    batch = {"tokens": ids(), "targets": ids(), "weights": jnp.asarray(weights)}
    if packed:
        batch["segments"] = jnp.tile(jnp.array([1, 1, 2, 2, 2]), (BATCH, 1))
        batch["positions"] = jnp.tile(jnp.array([0, 1, 0, 1, 2]), (BATCH, 1))
    return {**batch, "index": jnp.arange(BATCH)}


def make_draws(rng, num_steps):
    """In place of what is drawn; double precision where it is enabled."""
    return Draws(
        candidate=jnp.asarray(rng.normal(size=(BATCH, SEQ, VOCAB))),
        noise=jnp.asarray(rng.normal(size=(num_steps, BATCH, SEQ, VOCAB))),
        jitter=jnp.asarray(rng.uniform(size=(BATCH, SEQ))),
    )


@functools.cache
def value_and_grad(model, setup, objective=None, packed=False, drawn=False):
    """`((loss, metrics), gradients)` from parameters that hide nothing behind zeros.

    In double precision, so that only mistakes make a difference; in float32 where
    everything is drawn.
    """
    setup = change(setup, num_landscapes=model.num_landscapes)
    built = refined(models.build(model), setup, objective or ObjectiveConfig())
    rng = np.random.default_rng(1)
    with jax.enable_x64(not drawn):
        move = lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape)
        params = jax.jit(built.init, compiler_options=QUICK)(jax.random.key(0))
        sizes = {name: np.float64(params[name]) for name in ("step_size", "noise_std")}
        params = {**jax.tree.map(move, params), **sizes}
        draws = None if drawn else make_draws(rng, setup.num_steps)
        program = jax.value_and_grad(built.loss, has_aux=True)
        program = jax.jit(program, compiler_options=QUICK)
        return jax.device_get(program(params, make_batch(packed), KEY, draws))


def assert_same(actual, expected, tolerance=1e-9):
    """Relative to the largest number of each array."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(paths, jax.tree.leaves(actual), strict=True):
        scale = np.abs(b).max() or 1.0
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=name)


def plainly(setup):
    return change(setup, meta_gradient="autodiff")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_gets_the_gradient_of_plain_differentiation(name):
    model = model_of(**MODELS[name], num_layers=2, unroll=0)
    exact = value_and_grad(model, plainly(SYSTEM_1))
    assert_same(value_and_grad(model, SYSTEM_1), exact)
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(exact[1]["blocks"]))


@pytest.mark.parametrize("name", SETUPS)
def test_every_setup_gets_the_gradient_of_plain_differentiation(name):
    setup, objective = SETUPS[name]
    assert covers(setup, objective or ObjectiveConfig())
    model = model_of(num_landscapes=setup.num_landscapes)
    quick = value_and_grad(model, setup, objective)
    assert_same(quick, value_and_grad(model, plainly(setup), objective))
    learnt = setup.step_size_learnable and setup.step_size > 1e-4
    assert (quick[1]["step_size"] != 0) == learnt


def test_packed_documents():
    quick = value_and_grad(model_of(), SYSTEM_1, packed=True)
    assert_same(quick, value_and_grad(model_of(), plainly(SYSTEM_1), packed=True))


@pytest.mark.parametrize("name", ["one step", "steps drawn", "system 2"])
def test_the_same_numbers_are_drawn(name):
    setup, objective = SETUPS[name]
    setup = change(setup, step_size=0.5)  # large ones magnify the rounding of float32
    exact = value_and_grad(model_of(), plainly(setup), objective, drawn=True)
    part = change(setup, block=3)
    quick = value_and_grad(model_of(), part, objective, drawn=True)
    assert_same(quick, exact, 1e-4)


@pytest.mark.parametrize(
    ("setup", "objective", "block"),
    [(SYSTEM_1, None, block) for block in (1, 3, 8)] + [(SYSTEM_2, LAST, 3)],
)
def test_no_number_depends_on_the_block(setup, objective, block):
    """Blocks of a prediction, of part of a sequence, of several; also with remat."""
    model = model_of(remat="full", unroll=0) if block == 3 else model_of()
    whole = value_and_grad(model_of(), setup, objective)
    part = change(setup, block=block)
    assert_same(value_and_grad(model, part, objective), whole)


@pytest.mark.parametrize("conditioning", ["time_embed", "adaln"])
def test_anchors_and_contexts_get_gradients_from_every_block(conditioning):
    fields = {"conditioning": conditioning, "num_landscapes": 3}
    if conditioning == "adaln":
        fields["candidate_input"] = "anchored"
    setup = change(SYSTEM_1, num_steps=5, block=2)
    quick = value_and_grad(model_of(**fields), setup)
    assert_same(quick, value_and_grad(model_of(**fields), plainly(setup)))


def test_nothing_as_large_as_batch_seq_vocab_is_kept():
    """Streamed, the compiled gradient has less temporary memory than one such array."""
    count, length, vocab = 8, 64, 4096
    model = model_of(vocab_size=vocab, remat="full", unroll=0)
    setup = change(SYSTEM_1, block=32)
    objective = refined(models.build(model), setup, ObjectiveConfig())
    ids = jax.ShapeDtypeStruct((count, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((count, length), jnp.float32)
    batch = {"tokens": ids, "targets": ids, "weights": weights}
    params = jax.eval_shape(objective.init, KEY)
    program = jax.jit(jax.grad(objective.loss, has_aux=True))
    memory = program.lower(params, batch, KEY).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * count * length * vocab / 2


def test_bfloat16_is_near_and_gradients_are_float32():
    exact = value_and_grad(model_of(), SYSTEM_1, drawn=True)
    half = value_and_grad(model_of(dtype="bfloat16"), SYSTEM_1, drawn=True)
    for leaf in jax.tree.leaves(half):
        assert leaf.dtype == np.float32 and np.isfinite(leaf).all()
    np.testing.assert_allclose(half[0][0], exact[0][0], rtol=0.02)
    assert_same(half[1]["blocks"], exact[1]["blocks"], 0.1)


def test_the_loss_alone_is_the_same_and_its_gradient_is_scaled():
    model, setup = models.build(model_of()), SYSTEM_1
    objective = refined(model, setup, ObjectiveConfig())
    params, batch = objective.init(jax.random.key(0)), make_batch()
    loss = lambda params: objective.loss(params, batch, KEY)[0]
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(jax.jit(loss)(params), value, rtol=1e-6)
    thrice = jax.jit(jax.grad(lambda params: 3.0 * loss(params)))(params)
    assert_same(thrice, jax.tree.map(lambda g: 3 * g, gradient), 1e-6)


@pytest.mark.parametrize(
    ("fields", "objective"),
    [
        ({"meta_gradient": "autodiff"}, ObjectiveConfig()),
        ({"gradient_clamp": 1.0}, ObjectiveConfig()),
        ({"absolute_clamp": 1.0}, ObjectiveConfig()),
        ({"sharpen": 2.0}, ObjectiveConfig()),
        ({"normalize_steps": "first"}, ObjectiveConfig()),
        ({"noise_std": 1.0}, ObjectiveConfig()),
        ({"backprop": "full"}, ObjectiveConfig()),
        ({"backprop": "truncated"}, ObjectiveConfig()),
        ({"backprop": "truncated"}, LAST),
        ({"noise_std": 1.0, "noise_learnable": True}, LAST),
        ({}, ObjectiveConfig(contrastive_weight=0.1)),
    ],
)
def test_the_rest_is_left_to_plain_refinement(fields, objective):
    assert covers(SYSTEM_1, ObjectiveConfig()) and covers(SYSTEM_2, LAST)
    assert not covers(change(SYSTEM_1, **fields), objective)


def test_mapping_in_groups_draws_the_same_numbers(monkeypatch):
    keys = jax.random.split(KEY, 7)
    draw = lambda key: jax.random.normal(key, (5,))
    expected = jax.vmap(draw)(keys)
    for group in (1, 10, 1000):
        monkeypatch.setattr("ebt_jax.randomness.CPU_GROUP", group)
        np.testing.assert_array_equal(over_predictions(draw, keys), expected)
