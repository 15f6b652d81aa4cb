"""What options may not change, what they may change a little, and initial numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, VOCAB, tiny

from ebt_jax import models
from ebt_jax.models.blocks import ACTIVATIONS, Norm
from ebt_jax.models.config import SIZES, ModelConfig
from ebt_jax.models.text import energy_model
from ebt_jax.refine import RefineConfig, refine

KEY = jax.random.key(0)


def inputs():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(VOCAB, size=(2, 5)), jnp.int32)
    return {"tokens": tokens}, jnp.asarray(rng.normal(size=(2, 5, VOCAB)), jnp.float32)


def loss_and_gradients(config, step_size=1.0):
    """Of two fully differentiated refinement steps, with the energies of each."""
    model = energy_model(config)
    batch, start = inputs()

    def loss(params):
        result = refine(
            model.energy,
            params,
            model.encode_context(params, batch),
            start,
            step_size=step_size,
            config=RefineConfig(num_landscapes=2, backprop="full"),
            normalize=model.normalize,
        )
        energy = result.trajectory["energy"]
        return jnp.sum(jax.nn.log_softmax(result.candidate) ** 2), energy

    params = jax.jit(model.init)(KEY)
    program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)
    return program(params)


def largest_relative(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in leaves)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes_of(config):
    return jax.eval_shape(models.build(config).init, KEY)


# Precision and memory.


@pytest.fixture(scope="module")
def exact():
    return loss_and_gradients(tiny(conditioning="default"))


@pytest.mark.parametrize(
    "option", [{"remat": "dots"}, {"remat": "full"}, {"unroll": 0}]
)
def test_recomputing_or_scanning_changes_no_number(exact, option):
    remade = loss_and_gradients(tiny(conditioning="default", **option))
    assert largest_relative(remade, exact) < 1e-5


def test_bfloat16_keeps_energies_and_gradients_float32_and_near():
    """In steps that are small enough not to magnify what is rounded."""
    exact, half = (
        loss_and_gradients(tiny(conditioning="default", dtype=dtype), step_size=0.1)
        for dtype in ("float32", "bfloat16")
    )
    for leaf, like in zip(jax.tree.leaves(half), jax.tree.leaves(exact), strict=True):
        assert leaf.dtype == like.dtype == jnp.float32
        assert np.isfinite(leaf).all()
    (_, energies), (_, exact_energies) = half[0], exact[0]
    assert largest_relative(energies[0], exact_energies[0]) < 0.05
    assert largest_relative(half[0][0], exact[0][0]) < 0.01
    assert 0 < largest_relative(energies, exact_energies)


@pytest.mark.parametrize("conditioning", ["time_embed", "adaln"])
def test_every_conditioning_computes_in_bfloat16(conditioning):
    model = energy_model(tiny(conditioning=conditioning, dtype="bfloat16"))
    batch, start = inputs()
    params = jax.eval_shape(model.init, KEY)
    context = jax.eval_shape(model.encode_context, params, batch)
    assert context.keys.dtype == context.values.dtype == jnp.bfloat16
    energy = jax.eval_shape(model.energy, params, context, start, jnp.int32(0))
    assert energy.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}


# Parameters.


def test_initial_kernels_are_xavier_normal_and_embeddings_standard_normal():
    """Plain normals, not truncated ones: some lie beyond three deviations."""
    config = ModelConfig(
        size="4xs", vocab_size=256, num_landscapes=300, conditioning="adaln"
    )
    params = jax.jit(energy_model(config).init)(KEY)
    blocks = params["blocks"]
    expected = {
        "embed": (params["embed"]["embedding"], 1.0),
        "step_embed": (params["step_embed"]["embedding"], 1.0),
        "candidate_embed": (params["candidate_embed"]["kernel"], (2 / 384) ** 0.5),
        "qkv": (blocks["qkv"]["kernel"], (2 / 256) ** 0.5),
        "gate_up": (blocks["gate_up"]["kernel"], (2 / 256) ** 0.5),
        "down": (blocks["down"]["kernel"], (2 / 256) ** 0.5),
        "modulation": (blocks["modulation"]["kernel"], (2 / (7 * 128)) ** 0.5),
    }
    for name, (array, std) in expected.items():
        assert abs(float(array.std()) / std - 1) < 0.02, name
        assert abs(float(array.mean())) < 0.02 * std, name
        assert float(jnp.abs(array).max()) > 3 * std, name
    layers = blocks["qkv"]["kernel"]
    assert (layers[0] != layers[1]).all()
    assert (blocks["attention_norm"]["scale"] == 1).all()
    energy = params["energy"]["kernel"]
    assert abs(float(energy.std()) / (2 / 129) ** 0.5 - 1) < 0.25


def test_adaln_zero_starts_without_a_landscape_and_with_shut_gates():
    model = energy_model(tiny(conditioning="adaln_zero"))
    params = jax.jit(model.init)(KEY)
    assert not params["blocks"]["modulation"]["kernel"].any()
    assert not params["final_modulation"]["kernel"].any()
    batch, start = inputs()

    @jax.jit
    def energy(landscape):
        context = model.encode_context(params, batch)
        return model.energy(params, context, start, landscape)

    a, b = (energy(jnp.int32(i)) for i in (0, 1))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["ebt", "transformer_pp"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_seven_width_squared_parameters_a_layer(size, kind):
    layers, heads, width = SIZES[size]
    config = ModelConfig(
        kind=kind, size=size, vocab_size=256, num_landscapes=2, conditioning="default"
    )
    params = shapes_of(config)
    assert all(leaf.shape[0] == layers for leaf in jax.tree.leaves(params["blocks"]))
    kernels = [m["kernel"] for m in params["blocks"].values() if "kernel" in m]
    assert count(kernels) == 7 * width**2 * layers
    norms = 2 * layers * width + width
    assert count(params["blocks"]) + count(params["final_norm"]) == (
        count(kernels) + norms
    )
    assert (config.width // config.heads) * heads == width


@pytest.mark.parametrize(
    ("size", "millions"), [("xxs", 6.19), ("xs", 12.39), ("large", 396.4)]
)
def test_published_sizes_have_the_published_number_of_parameters(size, millions):
    config = ModelConfig(size=size, vocab_size=50277, num_landscapes=2)
    params = shapes_of(config)
    embeddings = ("embed", "candidate_embed", "step_embed")
    rest = {name: part for name, part in params.items() if name not in embeddings}
    assert abs(count(rest) / 1e6 / millions - 1) < 2e-3
    assert count(params) - count(rest) == (2 * 50277 + 2) * config.width


def test_a_tied_model_has_no_candidate_table():
    untied, tied = (shapes_of(tiny(tied_embedding=t)) for t in (False, True))
    assert set(untied) - set(tied) == {"candidate_embed"}
    assert count(untied) - count(tied) == VOCAB * 8


# Building blocks.


@pytest.mark.parametrize("kind", ["rms", "layer", "dyt", "none"])
def test_norms_equal_their_formulas(kind):
    rng = np.random.default_rng(0)
    x = 3 + rng.normal(size=(2, 8)).astype(np.float32)
    module = Norm(kind, 0.3)
    params = module.init(KEY, jnp.asarray(x))
    params = jax.tree.map(lambda p: p + 0.5, params)
    get = lambda name: np.asarray(params["params"][name])
    if kind == "rms":
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * get("scale")
    elif kind == "layer":
        h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        expected = h * get("scale") + get("bias")
    elif kind == "dyt":
        expected = np.tanh(get("alpha") * x) * get("scale") + get("bias")
        np.testing.assert_allclose(get("alpha"), 0.8)
    else:
        expected = x
    actual = np.asarray(module.apply(params, x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_activations_are_those_of_the_published_code():
    from math import erf, exp

    x = 0.7
    expected = {
        "silu": (x / (1 + exp(-x)), -x / (1 + exp(x))),
        "relu": (x, 0.0),
        "gelu": tuple(s * x * (1 + erf(s * x / 2**0.5)) / 2 for s in (1, -1)),
        "elu": (x, exp(-x) - 1),
    }
    for name, values in expected.items():
        actual = ACTIVATIONS[name](jnp.array([x, -x]))
        np.testing.assert_allclose(actual, values, rtol=1e-5, err_msg=name)
