"""Published checkpoints and flags of image models."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from ebt_jax import interop
from ebt_jax.diffusion import make_process, q_sample
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.training.objective import build_objective

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = {
    "modality": "IMG",
    "num_layers": 2,
    "num_heads": 2,
    "dim": 8,
    "ffn_dim_multiplier": 2,
    "image_dims": [8, 8],
    "patch_size": 4,
}
MODELS = {
    "denoising": {},
    "captions": {"image_task": "t2i", "size": 8, "channels": 4, "caption_size": 6},
    "dit": {"model": "dit"},
    "dit, captions": {"model": "dit", "image_task": "t2i", "image_dims": (64, 64)},
}


def config_of(**flags):
    return interop.config_from_reference({**TINY, **flags})


def random_params(config):
    shapes = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def refuses(message):
    return pytest.raises(UserError, match="^" + re.escape(message))


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)
def test_there_and_back_is_the_identity(flags):
    config = config_of(**flags)
    params = random_params(config)
    state = interop.to_reference(params, config)
    back = interop.from_reference(state, config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert all(array.flags.c_contiguous for array in state.values())


def test_patches_are_convolutions_with_channels_first():
    config = config_of()
    params = random_params(config)
    state = interop.to_reference(params, config)
    weight = state["transformer.x_embedder.proj.weight"]
    assert weight.shape == (8, 3, 4, 4)
    ours = params["patch_embed"]["kernel"].reshape(4, 4, 3, 8)
    assert weight[5, 2, 1, 3] == ours[1, 3, 2, 5]
    qkv = state["transformer.blocks.1.attn.qkv.weight"]
    assert qkv.shape == (24, 8)
    np.testing.assert_array_equal(
        qkv[8:16].T, params["blocks"]["qkv"]["kernel"][1, :, 1]
    )


def test_positions_are_exported_and_checked_but_not_needed():
    config = config_of()
    state = interop.to_reference(random_params(config), config)
    name = "transformer.pos_embed"
    assert state[name].shape == (1, 4, 8)
    without = {key: array for key, array in state.items() if key != name}
    interop.from_reference(without, config)
    with refuses(f"the checkpoint's {name!r} (1, 4, 8) is not the fixed one (1, 4, 8)"):
        interop.from_reference({**state, name: state[name] + 0.1}, config)
    with refuses(f"the checkpoint's {name!r} (1, 9, 8) is not the fixed one (1, 4, 8)"):
        interop.from_reference({**state, name: np.zeros((1, 9, 8))}, config)


def test_frozen_encoders_are_dropped():
    config = config_of(**MODELS["captions"])
    state = interop.to_reference(random_params(config), config)
    more = {"image_encoder.a": np.zeros(1), "text_encoder.b": np.zeros(1)}
    interop.from_reference({**state, **more}, config)


def test_weights_of_another_architecture_name_the_first_array():
    energy, dit = config_of(), config_of(model="dit")
    state = interop.to_reference(random_params(energy), energy)
    with refuses("the checkpoint has no array 'diffusion_transformer.x_embedder.proj"):
        interop.from_reference(state, dit)
    with refuses(
        "the checkpoint's 'transformer.x_embedder.proj.weight' has shape (8, 3, 4, 4), "
        "but the model config needs (8, 3, 2, 2)"
    ):
        fixed = {k: v for k, v in state.items() if k != "transformer.pos_embed"}
        interop.from_reference(fixed, config_of(patch_size=2))


def test_a_vector_for_no_caption_has_no_published_counterpart():
    config = config_of(**MODELS["dit, captions"])
    dropping = dataclasses.replace(config, diffusion=DiffusionConfig())
    with refuses("diffusion.caption_dropout is 0.1, but published models are told"):
        interop.to_reference(random_params(dropping), dropping)


def test_flags_of_denoising_are_translated():
    config = config_of(
        diffusion_steps=100,
        denoise_images_noise_level=0.1,
        mcmc_num_steps=1,
        mcmc_step_size=3000.0,
        mcmc_step_size_learnable=True,
        ffn_dim_multiplier=1,
    )
    model, diffusion = config.model, config.diffusion
    assert (model.space, model.kind, model.condition) == ("image", "ebt", "none")
    assert (model.image_size, model.channels, model.patch) == (8, 3, 4)
    assert model.ffn_multiplier == 1.0
    assert diffusion.timesteps == 1000 and diffusion.noised_steps == 100
    assert not diffusion.random_level and diffusion.clip
    assert config.refine.initial_candidate == "noised"
    assert config.refine.step_size == 3000.0 and config.refine.num_steps == 1
    odd = config_of(diffusion_steps=100, denoise_images_noise_level=0.7).diffusion
    assert odd.timesteps == 142 and odd.noised_steps == 100
    some = config_of(randomize_denoise_images_noise_level=True).diffusion
    assert some.random_level


def test_flags_of_text_to_image_are_translated():
    config = interop.config_from_reference(
        {
            "modality": "IMG",
            "image_task": "t2i",
            "image_dims": [256, 256],
            "patch_size": 2,
            "clip_text_encoder_size": "large",
            "denoising_initial_condition": "zeros",
        }
    )
    model = config.model
    assert (model.image_size, model.channels, model.condition_size) == (32, 4, 768)
    assert model.ffn_multiplier == 4.0
    assert config.diffusion.noised_steps == config.diffusion.timesteps == 1000
    assert config.refine.initial_candidate == "zeros"
    assert config_of(**MODELS["captions"]).refine.initial_candidate == "noise"


def test_flags_of_dit_are_translated():
    config = config_of(
        model="dit",
        diffusion_steps=100,
        denoise_images_noise_level=0.1,
        use_deterministic_reverse=True,
        infer_recurse_diffusion_n_times=2,
    )
    assert config.model.kind == "dit"
    diffusion = config.diffusion
    assert (diffusion.sampler, diffusion.repeats, diffusion.clip) == ("ddim", 3, True)
    assert diffusion.caption_dropout == 0 and config.replay.capacity == 0
    plain = config_of(**MODELS["dit, captions"]).diffusion
    assert plain.sampler == "ddpm" and not plain.clip


@pytest.mark.parametrize(
    "flag, value, supported",
    [
        ("image_task", "colouring", "denoising, t2i are"),
        ("image_dims", [8, 16], "squares are"),
        ("layout", "NHWC", "'NCHW' is"),
        ("learn_sigma", False, "True is"),
        ("clip_text_encoder_size", "huge", "base, large are"),
        ("model", "transformer_pp", "ebt, dit are"),
    ],
)
def test_a_value_that_is_not_built_is_refused(flag, value, supported):
    with refuses(f"published flag {flag}={value!r} is not supported; only {supported}"):
        config_of(**{flag: value})


def test_flags_of_images_are_not_known_of_text():
    with refuses("published flag image_task='denoising' is not known here"):
        interop.config_from_reference({"image_task": "denoising"})


@pytest.mark.parametrize("name", ["image_denoise_s1", "image_denoise_s2"])
def test_noised_images_are_the_published_ones(name):
    with np.load(GOLDEN / f"{name}.npz") as case:
        flags = json.loads(str(case["config"]))
        diffusion = interop.config_from_reference(flags).diffusion
        assert (case["in/timestep"] == diffusion.noised_steps - 1).all()
        process = make_process(diffusion.schedule, diffusion.timesteps)
        image, noise = case["in/target"], case["in/forward_noise"]
        noised = q_sample(process, image, case["in/timestep"], noise)
        np.testing.assert_allclose(noised, case["in/noised"], atol=1e-6)
