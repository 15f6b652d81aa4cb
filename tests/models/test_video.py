"""Frames as candidates: one projection, noise inside the energy, smooth L1."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK

from ebt_jax import models
from ebt_jax.composition import compose_models
from ebt_jax.models.attention import Visible, rotation
from ebt_jax.models.blocks import Block, Norm
from ebt_jax.models.config import ModelConfig
from ebt_jax.models.video import energy_model, smooth_l1, squared, transformer_pp

BATCH, SEQ, FRAME, DIM = 2, 4, 6, 8
LANDSCAPE = 1
CASES = {
    "time_embed": {"conditioning": "time_embed"},
    "anchored adaln": {"conditioning": "adaln", "candidate_input": "anchored"},
}


def tiny_video(**fields):
    return ModelConfig(
        **{
            "space": "video",
            "num_layers": 1,
            "num_heads": 2,
            "dim": DIM,
            "frame_size": FRAME,
            "num_landscapes": 2,
            **fields,
        }
    )


def lively(model):
    """Parameters without zeros and ones, so that nothing is hidden by them."""
    rng = np.random.default_rng(0)
    draw = lambda s: 0.5 * rng.standard_normal(s.shape).astype(np.float32)
    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


FRAMES, CANDIDATE = draw(0, BATCH, SEQ, FRAME), draw(1, BATCH, SEQ, FRAME)
NOISE = draw(2, BATCH, SEQ, DIM)


def program_of(config):
    """`(params, frames, candidate, noise) -> (energies, inner gradients)`."""
    model = energy_model(config)

    def program(params, frames, candidate, noise):
        def total(candidate):
            context = model.encode_context(params, {"frames": frames})
            context = model.perturbing.into(context, noise)
            energy = model.energy(params, context, candidate, jnp.int32(LANDSCAPE))
            return energy.sum(), energy

        gradient, energy = jax.grad(total, has_aux=True)(candidate)
        return energy, gradient

    return jax.jit(program, compiler_options=QUICK)


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def case(request):
    config = tiny_video(**request.param)
    return config, lively(energy_model(config)), program_of(config)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def one_at_a_time(config, params, frames, candidate, noise):
    """Energies by an ordinary causal transformer: for each candidate a sequence.

    The sequence of candidate j is [step token], frames 0..j, candidate j.
    """
    weights = params["frame_embed"]
    embed = lambda x: x @ weights["kernel"] + weights["bias"][None, None]
    embedded, ends = embed(frames), embed(candidate) + noise
    if config.candidate_input == "anchored":
        ends = ends + embedded
    condition = None
    if config.conditioning == "adaln":
        condition = params["step_embed"]["embedding"][LANDSCAPE]
    energies = []
    for j in range(SEQ):
        parts = [embedded[:, : j + 1], ends[:, j : j + 1]]
        if config.conditioning == "time_embed":
            step = params["step_embed"]["embedding"][LANDSCAPE]
            parts.insert(0, jnp.tile(step, (BATCH, 1, 1)))
        x = jnp.concatenate(parts, axis=1)
        places = jnp.arange(x.shape[1])
        turns = rotation(places, config.head_dim, x.dtype)
        layer = {"params": jax.tree.map(lambda w: w[0], params["blocks"])}
        x, _ = Block(config).apply(layer, x, turns, Visible(places[None]), condition)
        norm = Norm(config.norm, config.dyt_alpha)
        x = jnp.asarray(norm.apply({"params": params["final_norm"]}, x))[:, -1]
        if condition is not None:
            final = params["final_modulation"]
            parts = jax.nn.silu(condition) @ final["kernel"] + final["bias"]
            shift, scale = jnp.split(parts[None], 2, axis=1)
            x = x * (1 + scale) + shift
        energies.append(x @ params["energy"]["kernel"][:, 0])
    return jnp.stack(energies, axis=1)


def test_two_streams_equal_one_sequence_for_each_candidate_with_its_noise(case):
    config, params, program = case
    naive = jax.jit(functools.partial(one_at_a_time, config), compiler_options=QUICK)
    for noise in (NOISE, jnp.zeros_like(NOISE)):
        energy, gradient = program(params, FRAMES, CANDIDATE, noise)
        assert energy.shape == (BATCH, SEQ) and energy.dtype == jnp.float32
        assert (np.abs(gradient).max(axis=-1) > 0).all()
        close(energy, naive(params, FRAMES, CANDIDATE, noise), 1e-4)


def test_an_energy_depends_on_its_own_candidate_and_no_later_frame(case):
    _, params, program = case
    energy, gradient = program(params, FRAMES, CANDIDATE, NOISE)
    for b, j in ((0, 1), (1, 3)):
        others = np.ones((BATCH, SEQ), bool)
        others[b, j] = False
        new = program(params, FRAMES, CANDIDATE.at[b, j].set(3.0), NOISE)
        close(new[0][others], energy[others])
        close(new[1][others], gradient[others])
        assert abs(new[0][b, j] - energy[b, j]) > 1e-4
        new = program(params, FRAMES.at[b, j].set(3.0), CANDIDATE, NOISE)
        close(new[0][b, :j], energy[b, :j])
        close(new[0][1 - b], energy[1 - b])
        assert (np.abs(new[0][b, j:] - energy[b, j:]) > 1e-6).all()


def test_the_baseline_sees_no_later_frame_and_ends_in_two_maps():
    config = tiny_video(kind="transformer_pp")
    model = transformer_pp(config)
    params = lively(model)
    shapes = {name: jax.tree.map(jnp.shape, params[name]) for name in params}
    del shapes["blocks"]
    assert shapes == {
        "frame_embed": {"kernel": (FRAME, DIM), "bias": (DIM,)},
        "final_norm": {"scale": (DIM,)},
        "readout": {"kernel": (DIM, DIM)},
        "frame_output": {"kernel": (DIM, FRAME), "bias": (FRAME,)},
    }
    predict = jax.jit(model.predict, compiler_options=QUICK)
    frames = predict(params, {"frames": FRAMES})
    assert frames.shape == FRAMES.shape and frames.dtype == jnp.float32
    moved = predict(params, {"frames": FRAMES.at[0, 2].set(3.0)})
    close(moved[0, :2], frames[0, :2])
    close(moved[1], frames[1])
    assert (np.abs(moved[0, 2:] - frames[0, 2:]).max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize("kind", ["ebt", "transformer_pp"])
def test_bfloat16_stays_near_with_float32_results(kind):
    config, half = (tiny_video(kind=kind, dtype=d) for d in ("float32", "bfloat16"))
    params = lively(models.build(config))

    def result(config):
        if kind == "ebt":
            return program_of(config)(params, FRAMES, CANDIDATE, NOISE)
        predict = jax.jit(transformer_pp(config).predict, compiler_options=QUICK)
        return [predict(params, {"frames": FRAMES})]

    for exact, near in zip(result(config), result(half), strict=True):
        assert near.dtype == jnp.float32
        assert 0 < np.abs(exact - near).max() < 0.1 * np.abs(exact).max()


def test_smooth_l1_is_quadratic_near_and_linear_far():
    batch = {"targets": jnp.zeros((1, 2, 2))}
    frames = jnp.array([[[0.5, -3.0], [1.0, 0.0]]])
    close(smooth_l1(frames, batch), [[(0.125 + 2.5) / 2, 0.25]])
    close(squared(frames, batch)["mse"], [[(0.25 + 9) / 2, 0.5]])
    slope = jax.grad(lambda frames: smooth_l1(frames, batch).sum())(frames)
    close(slope, [[[0.25, -0.5], [0.5, 0.0]]])


def test_refinement_starts_from_noise_or_from_the_frame_before():
    model = energy_model(tiny_video())
    batch = {"frames": FRAMES}
    noise = model.initial_candidate(jax.random.key(0), batch)
    assert noise.shape == FRAMES.shape and noise.dtype == jnp.float32
    keys = jax.random.split(jax.random.key(1), (BATCH, SEQ))
    own = model.initial_candidate(keys, batch)
    close(model.initial_candidate(keys[:, 1:3], {"frames": FRAMES[:, :2]}), own[:, 1:3])
    assert set(model.starts) == {"most_recent"}
    np.testing.assert_array_equal(model.starts["most_recent"](batch), FRAMES)


def test_a_frame_needs_a_size():
    with pytest.raises(
        ValueError, match="model.frame_size is 0; set it to the numbers"
    ):
        models.build(tiny_video(frame_size=0))


def test_models_that_are_summed_up_take_noise_of_their_own():
    config = tiny_video(conditioning="default", num_landscapes=1)
    small = dataclasses.replace(config, dim=4)
    members = [energy_model(config), energy_model(small)]
    both = compose_models(members, [1.0, -0.5])
    noises = [NOISE, 2 * NOISE[..., :4]]
    assert jax.tree.map(jnp.shape, both.perturbing.like(CANDIDATE)) == [
        noise.shape for noise in noises
    ]

    def energy_of(model, params, noise):
        context = model.encode_context(params, {"frames": FRAMES})
        context = model.perturbing.into(context, noise)
        return model.energy(params, context, CANDIDATE, jnp.int32(0))

    params = lively(both)
    first, second = (
        energy_of(*member)
        for member in zip(members, params["members"], noises, strict=True)
    )
    close(energy_of(both, params, noises), first - 0.5 * second, 1e-4)
