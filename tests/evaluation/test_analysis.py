"""Looking into predictions: the same ones that are scored, and a plane around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, VOCAB, tiny

from ebt_jax import models
from ebt_jax.evaluation.analysis import landscape_slice, trace, trace_feed_forward
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.objectives import feed_forward, refined
from ebt_jax.thinking import AS_TRAINED

BATCH, SEQ, POINTS = 2, 4, 5
KEY = jax.random.key(3)
SETUPS = {
    "system 1": RefineSetup(num_steps=3, num_landscapes=2, step_size=5.0),
    "noisy": RefineSetup(
        num_steps=3, min_steps=2, num_landscapes=2, noise_std=0.5, step_size_jitter=2.0
    ),
}


def make_batch():
    tokens = np.random.default_rng(0).integers(VOCAB, size=(BATCH, SEQ + 1))
    return {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.ones((BATCH, SEQ)),
        "index": jnp.arange(BATCH),
    }


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile(QUICK)(*arguments)


@pytest.fixture(scope="module", params=SETUPS)
def looked_at(request):
    """A model, its setup and parameters, and what is seen of it."""
    setup, batch = SETUPS[request.param], make_batch()
    model = models.build(tiny(num_layers=1))
    params = refined(model, setup, ObjectiveConfig()).init(jax.random.key(1))

    def look(params):
        return (
            trace(model, setup, params, batch, KEY, top=3),
            landscape_slice(model, setup, params, batch, KEY, points=POINTS),
        )

    return model, setup, params, batch, *compiled(look, params)


def test_a_trace_is_of_the_predictions_that_are_scored(looked_at):
    model, setup, params, batch, seen, _ = looked_at
    objective = refined(model, setup, ObjectiveConfig())

    def score(params):
        logits = objective.predict(params, batch, KEY, AS_TRAINED)
        return objective.evaluate(params, batch, KEY, 0), logits

    scored, logits = compiled(score, params)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    same(seen.energy, scored["energy"])
    same(seen.gradient_norm, scored["gradient_norm"])
    same(seen.nll[1:], scored["nll"])
    probabilities = np.sort(jax.nn.softmax(logits))[..., ::-1]
    same(seen.probability[-1], probabilities[..., :3])
    assert (seen.top[-1, ..., 0] == logits.argmax(-1)).all()
    assert seen.nll.shape == (4, BATCH, SEQ) and seen.top.shape == (4, BATCH, SEQ, 3)


def test_a_slice_goes_through_initial_final_and_target(looked_at):
    model, setup, params, batch, seen, plane = looked_at
    assert plane.energy.shape == (POINTS, POINTS, BATCH, SEQ)
    assert plane.x.shape == plane.y.shape == (POINTS, BATCH, SEQ)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    near(plane.path[0], np.zeros((BATCH, SEQ, 2)))  # the origin
    near(plane.path[-1, ..., 1], np.zeros((BATCH, SEQ)))  # on the x axis
    near(plane.off[0], np.zeros((BATCH, SEQ)))
    near(plane.off[-1], np.zeros((BATCH, SEQ)))
    assert (plane.path[-1, ..., 0] > 0).all() and (plane.target[..., 1] > 0).all()
    # The frame holds all three.
    for corner in (plane.path[0], plane.path[-1], plane.target):
        assert (plane.x[0] < corner[..., 0]).all() and (
            plane.x[-1] > corner[..., 0]
        ).all()
        assert (plane.y[0] < corner[..., 1]).all() and (
            plane.y[-1] > corner[..., 1]
        ).all()


def by_formula(energy, **changes):
    """A model with an energy of the candidate alone, and its parameters."""
    base = models.build(tiny(num_layers=1))
    model = base._replace(
        encode_context=lambda params, batch: None,
        energy=lambda params, context, candidate, landscape: energy(candidate),
        **changes,
    )
    return model, {"step_size": jnp.float32(2.0), "noise_std": jnp.float32(0.0)}


def test_energies_of_a_slice_are_those_of_its_points():
    """A linear energy is linear on the plane, so the grid gives it everywhere."""
    slope = jnp.linspace(-1.0, 2.0, VOCAB) ** 2
    model, params = by_formula(lambda candidate: candidate @ slope)
    setup, batch = RefineSetup(num_landscapes=2), make_batch()
    seen, plane = compiled(
        lambda params: (
            trace(model, setup, params, batch, KEY, top=1),
            landscape_slice(model, setup, params, batch, KEY, points=POINTS),
        ),
        params,
    )
    for row, column in np.ndindex(BATCH, SEQ):
        x, y = plane.x[:, row, column], plane.y[:, row, column]
        grid = np.asarray(plane.energy[..., row, column])
        there = (
            (plane.path[0], seen.energy[0]),
            (plane.path[-1], seen.energy[-1]),
            (plane.target, plane.target_energy),
        )
        for point, energy in there:
            px, py = np.asarray(point[row, column])
            on_rows = [np.interp(px, x, values) for values in grid]
            found = np.interp(py, y, on_rows)
            np.testing.assert_allclose(found, energy[row, column], atol=1e-4)
        target = int(batch["targets"][row, column])
        assert plane.target_energy[row, column] == slope[target]


def test_a_refinement_that_does_not_move_has_a_plane_all_the_same():
    """Whoever starts at the right answer and stays: no direction, no nan."""
    model, params = by_formula(lambda c: 0.0 * c.sum(-1), normalize=lambda c: c)
    setup = RefineSetup(num_landscapes=2, initial_candidate="zeros")
    batch = make_batch()
    plane = compiled(
        lambda params: landscape_slice(model, setup, params, batch, KEY, points=3),
        params,
    )
    assert all(np.isfinite(array).all() for array in plane)
    assert (np.asarray(plane.path) == 0).all()


def test_a_feed_forward_model_has_one_candidate_and_no_energy():
    batch = make_batch()
    model = models.build(tiny(kind="transformer_pp", num_layers=1))
    params = model.init(KEY)
    seen = compiled(lambda p: trace_feed_forward(model, p, batch, top=2), params)
    scored = compiled(
        lambda p: feed_forward(model, ObjectiveConfig()).evaluate(p, batch, KEY, 0),
        params,
    )
    np.testing.assert_allclose(seen.nll, scored["nll"], rtol=1e-6)
    assert seen.top.shape == (1, BATCH, SEQ, 2)
    assert seen.energy is None and seen.gradient_norm is None
