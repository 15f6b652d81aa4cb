import functools

import jax
import numpy as np
import optax
import pytest

from ebt_jax.training.config import MeshConfig
from ebt_jax.training.optim import learning_rates, make_optimizer
from ebt_jax.training.sharding import global_batch, make_mesh, replicated
from ebt_jax.training.step import init_state, make_step, mean_gradient


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_the_whole_batch(toy, parts):
    # Sequences differ in how many tokens count, so a plain mean of parts would not do.
    objective = toy.bigram().objective
    params = objective.init(jax.random.key(0))
    batch = next(toy.training_batches(8))
    key = jax.random.key(1)
    whole, numbers, _ = mean_gradient(objective, params, batch, key, 1)
    split, split_numbers, _ = mean_gradient(objective, params, batch, key, parts)
    assert_close(split, whole, rtol=1e-5, atol=1e-7)
    assert_close(split_numbers, numbers, rtol=1e-6)


def test_a_batch_without_tokens_changes_nothing(toy):
    objective = toy.bigram().objective
    params = objective.init(jax.random.key(0))
    batch = next(toy.training_batches(8))
    batch["weights"] = np.zeros_like(batch["weights"])
    for parts in (1, 2):
        gradient, numbers, _ = mean_gradient(
            objective, params, batch, jax.random.key(0), parts
        )
        assert optax.tree.norm(gradient) == 0 and numbers["loss"] == 0


def run(toy, devices, accumulation=1, steps=4, noise=0.0):
    """State, numbers of each step, and how often the loss was traced."""
    fake = toy.bigram(noise=noise)
    config = toy.config()
    mesh = make_mesh(MeshConfig(data=devices))
    shapes = jax.eval_shape(fake.objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    train_step = make_step(
        fake.objective,
        optimizer,
        seed=3,
        accumulation=accumulation,
        rates=learning_rates(config.optim),
        mesh=mesh,
    )
    init = lambda: init_state(fake.objective, optimizer, 3)
    state = jax.jit(init, out_shardings=replicated(mesh))()
    batches, rows = toy.training_batches(16), []
    for _ in range(steps):
        state, numbers = train_step(state, global_batch(next(batches), mesh))
        rows.append(jax.device_get(numbers))
    return jax.device_get(state), rows, len(fake.traces)


@pytest.fixture(scope="module")
def on_one_device(toy):
    return run(toy, 1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_eight_devices_equal_one(toy, on_one_device, accumulation):
    one, rows, _ = on_one_device
    eight, other_rows, _ = run(toy, 8, accumulation)
    assert_close(one.params, eight.params, rtol=1e-5, atol=1e-5)
    assert_close(rows, other_rows, rtol=1e-5)


def test_numbers_of_a_step(toy, on_one_device):
    state, rows, traces = on_one_device
    assert traces == 1 and state.step == 4
    rates = learning_rates(toy.config().optim)
    for count, numbers in enumerate(rows):
        for name in ("weights", "step_size"):
            logged = numbers[f"learning_rate/{name}"]
            np.testing.assert_allclose(logged, rates[name](count), rtol=1e-6)
    norm = optax.tree.norm(state.params)
    np.testing.assert_allclose(rows[-1]["parameter_norm"], norm, rtol=1e-6)


def test_draws_follow_from_seed_and_step(toy, on_one_device):
    first, again = (run(toy, 1, steps=2, noise=0.5)[1] for _ in range(2))
    losses = [numbers["loss"] for numbers in first]
    assert losses == [numbers["loss"] for numbers in again]
    assert losses[0] != on_one_device[1][0]["loss"]


def test_seeds_share_one_program(toy):
    """What JAX's cache knows a program by, of an update and of the first state."""
    fake, config = toy.bigram(noise=0.5), toy.config()
    mesh = make_mesh(MeshConfig(data=2))
    shapes = jax.eval_shape(fake.objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    init = lambda key: init_state(fake.objective, optimizer, key)
    batch = global_batch(next(toy.training_batches(16)), mesh)
    programs = set()
    for seed in (3, 2**32 - 1):
        step = make_step(fake.objective, optimizer, seed=seed, mesh=mesh)
        state = jax.eval_shape(init, step.key)
        lowered = (step.lower(state, batch), jax.jit(init).lower(step.key))
        programs.add(tuple(program.as_text() for program in lowered))
        constant = functools.partial(init_state, fake.objective, optimizer, seed)
        assert_close(jax.jit(init)(step.key), jax.jit(constant)(), rtol=0)
    assert len(programs) == 1
