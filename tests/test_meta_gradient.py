"""What each backprop mode differentiates: hand-written unrolls, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from energies import BATCH, DIM, gradient_at, mixed, problem
from jax.test_util import check_grads
from tiny import QUICK

from ebt_jax.meta_gradient import energy_and_gradient
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.text import energy_model
from ebt_jax.refine import RefineConfig, refine

STEPS, JITTER = 4, 1.5
MODES = ["per_step", "truncated", "full"]
RULES = ["rule", "autodiff"]


def arguments():
    """Everything a loss is differentiated by, float64; call inside `enable_x64`."""
    params, context, start = problem(np.float64)
    step_size = jnp.linspace(0.02, 0.1, BATCH)
    return params, context["x"], start, step_size, jnp.asarray(0.3)


def draws():
    rng = np.random.default_rng(5)
    noise = jnp.asarray(rng.standard_normal((STEPS, BATCH, DIM)))
    return noise, jnp.asarray(rng.uniform(size=BATCH))


def context_of(x):
    return {"x": x, "mask": jnp.arange(BATCH) < BATCH - 1}


def step_loss(after, energy):
    """Of the refined candidate and of the energy itself, both differentiated."""
    return jnp.sum(jnp.sin(after)) + jnp.sum(jnp.cos(energy))


def with_refine(mode, rule, params, x, start, step_size, noise_std):
    noise, jitter = draws()
    config = RefineConfig(
        num_steps=STEPS,
        num_landscapes=2,
        backprop=mode,
        meta_gradient=rule,
        step_size_jitter=JITTER,
    )
    result = refine(
        mixed,
        params,
        context_of(x),
        start,
        step_size=step_size,
        config=config,
        noise=noise,
        jitter=jitter,
        noise_std=noise_std,
        normalize=jax.nn.softmax,
        observe=lambda step: step_loss(step.after, step.energy),
    )
    return result.trajectory.sum() + jnp.sum(result.candidate**2)


def by_hand(mode, params, x, start, step_size, noise_std):
    noise, jitter = draws()
    low, high = step_size / JITTER, step_size * JITTER
    sizes = (low + jitter * (high - low))[:, None]
    z, loss, context = start, 0.0, context_of(x)
    for i in range(STEPS):
        if mode == "per_step":
            z = jax.lax.stop_gradient(z)
        c = jax.nn.softmax(z + noise_std * noise[i])
        landscape = min(i, 1)
        gradient = gradient_at(params, context, c, landscape)
        if mode == "truncated" and i < STEPS - 1:
            gradient = jax.lax.stop_gradient(gradient)
        z = c - sizes * gradient
        loss += step_loss(z, mixed(params, context, c, jnp.int32(landscape)))
    return loss + jnp.sum(z**2)


@functools.cache
def loss_and_gradients(function, *bound):
    """Float64 loss and its gradients by all five arguments, as NumPy arrays."""
    loss = lambda *inputs: function(*bound, *inputs)
    with jax.enable_x64(True):
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))
        return jax.device_get(program(*arguments()))


def largest_difference(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() for x, y in leaves)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_equals_its_unroll_in_float64(mode, rule):
    expected = loss_and_gradients(by_hand, mode)
    actual = loss_and_gradients(with_refine, mode, rule)
    assert largest_difference(actual, expected) < 1e-9
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(expected[1][0]))


def test_the_modes_differ_in_gradient_alone():
    results = [loss_and_gradients(with_refine, mode, "rule") for mode in MODES]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        np.testing.assert_allclose(results[a][0], results[b][0], rtol=1e-12)
        assert largest_difference(results[a][1][0], results[b][1][0]) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_only_per_step_cuts_the_path_to_the_initial_candidate(mode):
    _, gradients = loss_and_gradients(with_refine, mode, "rule")
    assert np.any(gradients[2]) == (mode != "per_step")


def test_full_equals_finite_differences():
    loss = lambda *inputs: with_refine("full", "rule", *inputs)
    as_arrays = lambda *inputs: loss(*jax.tree.map(jnp.asarray, inputs))
    with jax.enable_x64(True):
        check_grads(jax.jit(as_arrays), arguments(), 1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("seen", ["energy", "gradient", "both"])
def test_the_rule_takes_either_cotangent_alone(seen):
    """Energies alone, gradients alone, or both reach the loss."""

    def loss(rule, params, x, candidate):
        function = energy_and_gradient(mixed, rule)
        energy, gradient = function(
            params, context_of(x), candidate, jnp.int32(1), None
        )
        parts = {"energy": jnp.sin(energy).sum(), "gradient": (gradient**3).sum()}
        return parts["energy"] + parts["gradient"] if seen == "both" else parts[seen]

    with jax.enable_x64(True):
        inputs = arguments()[:3]
        rule, autodiff = (
            jax.grad(lambda *a, r=r: loss(r, *a), argnums=(0, 1, 2))(*inputs)
            for r in RULES
        )
    assert largest_difference(rule, autodiff) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_is_not_taken_is_zero_and_has_no_gradient(rule):
    params, context, candidate = problem()
    function = jax.jit(energy_and_gradient(mixed, rule))

    def loss(params, taken):
        seen = function(params, context, candidate, jnp.int32(0), taken)
        return sum(x.sum() for x in jax.tree.leaves(seen)), seen

    gradients, seen = jax.grad(loss, has_aux=True)(params, jnp.array(False))
    assert not any(x.any() for x in jax.tree.leaves((seen, gradients)))
    gradients, _ = jax.grad(loss, has_aux=True)(params, jnp.array(True))
    always, _ = jax.grad(loss, has_aux=True)(params, None)
    assert largest_difference(gradients, always) < 1e-6


def test_forward_mode_needs_autodiff():
    """And gets there what reverse mode gives."""
    inputs = problem()

    def loss(a, rule):
        config = RefineConfig(backprop="full", meta_gradient=rule)
        return jnp.sum(refine(mixed, *inputs, step_size=a, config=config).candidate)

    forward = jax.jacfwd(loss)(0.1, "autodiff")
    np.testing.assert_allclose(forward, jax.grad(loss)(0.1, "rule"), rtol=1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jacfwd(loss)(0.1, "rule")


def test_the_rule_works_under_vmap():
    params, context, start = problem()
    sizes = jnp.array([0.02, 0.1])
    config = RefineConfig(num_steps=2, backprop="full")

    def loss(step_size, params):
        result = refine(
            mixed, params, context, start, step_size=step_size, config=config
        )
        return jnp.sum(result.candidate**2)

    gradient = jax.grad(loss, argnums=(0, 1))
    together = jax.vmap(gradient, in_axes=(0, None))(sizes, params)
    for i, size in enumerate(sizes):
        alone = gradient(size, params)
        part = jax.tree.map(lambda x, i=i: x[i], together)
        assert largest_difference(part, alone) < 1e-5


def test_low_precision_energies_are_summed_in_float32():
    def half(params, context, candidate, landscape):
        return candidate.sum(axis=-1).astype(jnp.bfloat16)

    function = energy_and_gradient(half)
    energy, gradient = function(None, None, jnp.ones((2, 3)), jnp.int32(0), None)
    assert energy.dtype == gradient.dtype == jnp.float32


@pytest.mark.parametrize(
    ("conditioning", "candidate_input"),
    [
        ("default", "embedding"),
        ("time_embed", "embedding"),
        ("adaln", "anchored"),
    ],
)
def test_the_rule_equals_autodiff_on_the_causal_model(conditioning, candidate_input):
    """In float64, by parameters, step size and the initial candidate."""
    model = energy_model(
        ModelConfig(
            num_layers=2,
            num_heads=2,
            dim=8,
            vocab_size=5,
            num_landscapes=2,
            conditioning=conditioning,
            candidate_input=candidate_input,
        )
    )

    def loss(params, start, step_size, rule):
        batch = {"tokens": jnp.array([[1, 2, 3], [4, 0, 2]])}
        config = RefineConfig(
            num_steps=2, num_landscapes=2, backprop="full", meta_gradient=rule
        )
        result = refine(
            model.energy,
            params,
            model.encode_context(params, batch),
            start,
            step_size=step_size,
            config=config,
            normalize=model.normalize,
            observe=lambda step: jnp.sum(step.energy**2),
        )
        return jnp.sum(result.candidate**2) + result.trajectory.sum()

    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        start = jnp.asarray(rng.standard_normal((2, 3, 5)))
        both = jax.jit(
            lambda *inputs: [
                jax.grad(loss, argnums=(0, 1, 2))(*inputs, rule) for rule in RULES
            ],
            compiler_options=QUICK,
        )
        rule, autodiff = jax.device_get(both(params, start, jnp.float64(0.5)))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(autodiff))
    assert largest_difference(rule, autodiff) < 1e-9 * scale
