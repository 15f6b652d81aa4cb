"""Other steps downhill, each against a loop written out or what it has to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from energies import gradient_at, mixed, problem, quadratic
from tiny import QUICK

from ebt_jax.accepting import refine_accepting
from ebt_jax.randomness import fold_in, normal, prediction_keys
from ebt_jax.refine import RefineConfig
from ebt_jax.thinking import (
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
CONFIG = RefineConfig(num_steps=2, num_landscapes=2)
STEP = 0.1


def initial(keys):
    return normal(keys, (*keys.shape, START.shape[1]), START.dtype)


FIRST = initial(fold_in(KEYS, 0))


def run(thinking, keys=KEYS, context=CONTEXT, step_size=STEP, normalize=jnp.tanh):
    return think(
        mixed,
        PARAMS,
        context,
        keys,
        initial=initial,
        thinking=thinking,
        step_size=step_size,
        config=CONFIG,
        normalize=normalize,
    )


def solve(thinking, **options):
    solver = jax.jit(
        lambda keys: run(thinking, keys, **options), compiler_options=QUICK
    )
    return solver(KEYS)


def by_hand(direction, steps):
    """z <- c - direction(i, g), where c = tanh(z); the second landscape is the last."""
    z = FIRST
    for i in range(steps):
        c = jnp.tanh(z)
        z = c - direction(i, gradient_at(PARAMS, CONTEXT, c, min(i, 1)))
    return z


def test_annealed_steps_fall():
    result = solve(Thinking(5, method=Annealed(0.7)))
    expected = by_hand(lambda i, g: STEP * 0.7**i * g, 5)
    np.testing.assert_allclose(result.candidate, expected, rtol=1e-5)


def test_momentum_sums_gradients():
    state = [0.0]

    def direction(i, g):
        state[0] = g + 0.8 * state[0]
        return STEP * state[0]

    result = solve(Thinking(5, method=Momentum(0.8)))
    np.testing.assert_allclose(result.candidate, by_hand(direction, 5), rtol=1e-5)


def test_adam_moves_by_its_rate_whatever_the_step_size():
    mean, square = [0.0], [0.0]

    def direction(i, g):
        mean[0] = 0.5 * mean[0] + 0.5 * g
        square[0] = 0.9 * square[0] + 0.1 * g**2
        m, v = mean[0] / (1 - 0.5 ** (i + 1)), square[0] / (1 - 0.9 ** (i + 1))
        return 0.2 * m / (jnp.sqrt(v) + 1e-8)

    result = solve(Thinking(4, method=Adam(0.2, 0.5, 0.9)), step_size=77.0)
    np.testing.assert_allclose(result.candidate, by_hand(direction, 4), rtol=1e-4)


def test_a_step_size_below_1_multiplies_and_from_1_on_replaces():
    for given, size in ((0.5, 0.5 * STEP), (1.0, 1.0)):
        result = solve(Thinking(3, step_size=given))
        expected = by_hand(lambda i, g, size=size: size * g, 3)
        np.testing.assert_allclose(result.candidate, expected, rtol=1e-5)


def test_steps_in_each_landscape():
    z = FIRST
    for landscape in (0, 0, 0, 1, 1, 1):
        c = jnp.tanh(z)
        z = c - STEP * gradient_at(PARAMS, CONTEXT, c, landscape)
    result = solve(Thinking(3, landscapes="each"))
    np.testing.assert_allclose(result.candidate, z, rtol=1e-5)
    assert result.num_steps.tolist() == [6] * len(START)


def test_langevin_noise_is_as_given():
    still = solve(Thinking(1)).candidate
    spread = []
    for std in (1e-3, 1e-2):
        moved = solve(Thinking(1, method=Langevin(std))).candidate
        spread.append(jnp.abs(moved - still).mean() / std)
    np.testing.assert_allclose(spread[0], spread[1], rtol=0.1)
    assert 0.1 < spread[0] < 2


def test_lower_never_raises_an_energy_and_shrinks_instead():
    """Steps far too large; in each landscape apart."""
    options = {"config": RefineConfig(num_steps=24, num_landscapes=2)}
    solver = jax.jit(
        lambda start: refine_accepting(
            mixed, PARAMS, CONTEXT, start, method=Lower(0.6), step_size=30.0, **options
        ),
        compiler_options=QUICK,
    )
    result = solver(3 * FIRST)
    energy, accepted = np.asarray(result.energy), np.asarray(result.accepted)
    first = mixed(PARAMS, CONTEXT, 3 * FIRST, jnp.int32(0))
    assert (energy[0] <= first).all()
    assert (np.diff(energy[1:], axis=0) <= 0).all()
    assert accepted.any(axis=0).all() and not accepted.all()
    fell = np.diff(energy[1:], axis=0) < 0
    np.testing.assert_array_equal(fell, accepted[2:])
    np.testing.assert_allclose(
        energy[-1], mixed(PARAMS, CONTEXT, result.candidate, jnp.int32(1)), rtol=1e-6
    )


def test_lower_is_descent_where_every_step_lowers():
    thinking = Thinking(6, method=Lower()), Thinking(6)
    lower, descent = (solve(t, normalize=lambda z: z) for t in thinking)
    np.testing.assert_allclose(lower.candidate, descent.candidate, rtol=1e-5)


def test_lower_finds_a_lower_energy_where_steps_of_training_do_not():
    """Of a distribution: a small step from p is no small step, but one from z is."""
    target = jax.nn.softmax(2 * CONTEXT["x"])
    energy = lambda params, context, p, landscape: jnp.square(p - target).sum(-1)
    start = jnp.log(target) + 0.1 * FIRST
    result = jax.jit(
        lambda start: refine_accepting(
            energy,
            {},
            {},
            start,
            method=Lower(0.5),
            step_size=1.0,
            config=RefineConfig(num_steps=40),
            normalize=jax.nn.softmax,
        ),
        compiler_options=QUICK,
    )(start)
    before = energy({}, {}, jax.nn.softmax(start), 0)
    assert not result.accepted[0].any()
    assert (result.energy[-1] < before / 2).all()


def test_mala_samples_the_density_of_the_energy():
    """A quadratic's is normal: mean, variance, and rejections that make it exact."""
    chains, temperature = 512, 0.5
    context = jnp.full((chains, 1), 2.0)
    keys = jax.random.split(jax.random.key(0), chains)
    solver = jax.jit(
        lambda keys: refine_accepting(
            quadratic,
            {"scale": 4.0},
            context,
            jnp.zeros((chains, 1)),
            method=Mala(temperature),
            step_size=0.35,
            config=RefineConfig(num_steps=60),
            key=keys,
        ),
        compiler_options=QUICK,
    )
    result = solver(keys)
    assert 0.5 < result.accepted.mean() < 0.95
    last = np.asarray(result.candidate)
    np.testing.assert_allclose(last.mean(), 2.0, atol=0.06)
    # Without rejections it would be 0.125 / (1 - 4 * 0.35 / 2) = 0.42.
    np.testing.assert_allclose(last.var(), temperature / 4, rtol=0.2)


POLICIES = {
    "annealed": Thinking(4, method=Annealed()),
    "momentum": Thinking(4, method=Momentum()),
    "adam": Thinking(4, method=Adam()),
    "langevin": Thinking(4, method=Langevin()),
    "lower": Thinking(4, method=Lower()),
    "mala": Thinking(4, method=Mala(0.1)),
    "until, best of": Thinking(9, best_of=2, tolerance=0.05, by="drop"),
}


@pytest.mark.parametrize("thinking", POLICIES.values(), ids=POLICIES)
def test_a_policy_is_the_same_under_jit_and_vmap_and_on_a_mesh(thinking):
    """No draw depends on the batch, so a prediction alone is the same, too."""
    whole = solve(thinking)
    one = lambda key, context: jax.tree.map(
        lambda x: x[0],
        run(thinking, key[None], jax.tree.map(lambda x: x[None], context)),
    )
    each = jax.jit(jax.vmap(one), compiler_options=QUICK)(KEYS, CONTEXT)
    np.testing.assert_allclose(each.candidate, whole.candidate, rtol=1e-4, atol=1e-6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    eight = jnp.arange(8) % len(KEYS)
    keys, context = jax.device_put(
        jax.tree.map(lambda x: x[eight], (KEYS, CONTEXT)), sharding
    )
    sharded = jax.jit(
        lambda keys, context: run(thinking, keys, context), compiler_options=QUICK
    )(keys, context)
    np.testing.assert_allclose(
        sharded.candidate, whole.candidate[eight], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("thinking", "gradients", "energies"),
    [
        (Thinking(5), 5, 0),
        (Thinking(5, best_of=3), 15, 3),
        (Thinking(5, best_of=3, by="drop"), 15, 6),
        (Thinking(5, method=Lower()), 7, 0),
        (Thinking(3, landscapes="each", method=Mala()), 8, 0),
    ],
)
def test_every_evaluation_is_counted(thinking, gradients, energies):
    effort = solve(thinking).effort
    assert effort.gradients.tolist() == [gradients] * len(START)
    assert effort.energies.tolist() == [energies] * len(START)


def test_a_prediction_that_stops_has_taken_one_evaluation_more():
    thought = solve(Thinking(200, tolerance=0.05))
    assert (thought.num_steps < 200).all()
    np.testing.assert_array_equal(thought.effort.gradients, thought.num_steps + 1)


def test_the_largest_drop_wins_and_minima_have_a_spread():
    thinking = Thinking(3, best_of=4, by="drop")
    keys = [KEYS, *(fold_in(KEYS, i) for i in range(2, 5))]
    apart = [run(Thinking(3), k).candidate for k in keys]
    final = jnp.stack(
        [final_energy(mixed, PARAMS, CONTEXT, x, CONFIG, jnp.tanh) for x in apart]
    )
    starts = [jnp.tanh(initial(fold_in(k, 0))) for k in keys]
    before = jnp.stack([mixed(PARAMS, CONTEXT, c, jnp.int32(0)) for c in starts])
    best = jnp.argmax(before - final, axis=0)
    assert (best != jnp.argmin(final, axis=0)).any()
    result = solve(thinking)
    for i, chosen in enumerate(best.tolist()):
        np.testing.assert_allclose(result.candidate[i], apart[chosen][i], rtol=1e-5)
    np.testing.assert_allclose(result.spread, final.std(axis=0), rtol=1e-4)
    assert solve(Thinking(3)).spread.tolist() == [0] * len(START)


def test_what_has_to_be_drawn_needs_a_key():
    with pytest.raises(ValueError, match="draw noise but got key=None"):
        refine_accepting(
            mixed, PARAMS, CONTEXT, FIRST, method=Mala(), step_size=1.0, config=CONFIG
        )
