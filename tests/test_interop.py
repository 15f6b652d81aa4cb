"""Published PyTorch checkpoints in and out."""

import dataclasses
import re
import sys
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ebt_jax import interop
from ebt_jax.errors import UserError
from ebt_jax.published_flags import OFF
from ebt_jax.training.checkpoint import named
from ebt_jax.training.initial import read_file
from ebt_jax.training.objective import build_objective

TINY = {"dim": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 11}

MODELS = {
    "default": {"ebt_type": "default"},
    "time_embed": {"ebt_type": "time_embed", "ffn_dim_multiplier": 2},
    "adaln": {"ebt_type": "adaln"},
    "adaln_zero": {"ebt_type": "adaln_zero"},
    "layer norm": {"ebt_norm": "layer"},
    "dyt": {"ebt_norm": "dyt"},
    "no norm": {"ebt_norm": "none", "ebt_type": "adaln"},
    "tied": {"vocab_to_embed_uses_prob_dist": True},
    "transformer_pp": {"model": "transformer_pp", "ebt_type": "time_embed"},
    "video": {"modality": "video", "latent_dim": 6, "ebt_type": "adaln"},
    "video transformer_pp": {
        "modality": "VID",
        "latent_dim": 6,
        "model": "transformer_pp",
    },
}


STARTS = "random_noise, zeros, most_recent_embedding"


def config_of(**flags):
    return interop.config_from_reference({**TINY, **flags})


def random_params(config):
    shapes = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def refuses(message):
    return pytest.raises(UserError, match="^" + re.escape(message))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Parameters.


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS.keys())
def test_there_and_back_is_the_identity(flags):
    config = config_of(**flags)
    params = random_params(config)
    state = interop.to_reference(params, config)
    assert sum(a.size for a in state.values()) == sum(
        a.size for a in jax.tree.leaves(params)
    )
    assert {array.dtype.name for array in state.values()} == {"float32"}
    back = interop.from_reference(state, config)
    assert_same(back, params)
    assert_same(interop.to_reference(back, config), state)


def test_linear_weights_are_out_by_in_and_layers_are_apart():
    config = config_of(ffn_dim_multiplier=2)
    params = random_params(config)
    state = interop.to_reference(params, config)
    layer = "transformer.layers.1.feed_forward"
    assert state[f"{layer}.w1.weight"].shape == (16, 8)
    np.testing.assert_array_equal(
        state[f"{layer}.w1.weight"], params["blocks"]["gate_up"]["kernel"][1, :, 0].T
    )
    assert state[f"{layer}.w2.weight"].shape == (8, 16)
    assert state["vocab_to_embed.weight"].shape == (8, 11)
    assert state["embeddings.weight"].shape == (11, 8)
    assert state["transformer.final_layer.weight"].shape == (1, 8)
    assert state["alpha"].shape == ()


def test_neighbours_that_turn_together_are_half_a_head_apart_here():
    config = config_of()
    params = random_params(config)
    heads, half = config.model.heads, config.model.head_dim // 2
    ours = params["blocks"]["qkv"]["kernel"][1]
    state = interop.to_reference(params, config)
    for part, name in enumerate(("wq", "wk")):
        theirs = state[f"transformer.layers.1.attention.{name}.weight"].T
        theirs = theirs.reshape(len(theirs), heads, half, 2)
        halves = ours[:, part].reshape(len(ours), heads, 2, half)
        np.testing.assert_array_equal(theirs[..., 0], halves[:, :, 0])
        np.testing.assert_array_equal(theirs[..., 1], halves[:, :, 1])
    values = state["transformer.layers.1.attention.wv.weight"].T
    np.testing.assert_array_equal(values, ours[:, 2])


def test_to_reference_copies():
    config = config_of()
    params = random_params(config)
    state = interop.to_reference(params, config)
    state["embeddings.weight"][:] = 0
    assert params["embed"]["embedding"].all()


def test_a_common_prefix_and_rotary_tables_are_dropped():
    config = config_of()
    params = random_params(config)
    state = interop.to_reference(params, config)
    state["transformer.freqs_cis"] = np.zeros(3, np.complex64)
    prefixed = {f"model.{name}": array for name, array in state.items()}
    assert_same(interop.from_reference(prefixed, config), params)


def test_a_missing_array_is_named():
    config = config_of()
    state = interop.to_reference(random_params(config), config)
    del state["transformer.layers.1.attention.wk.weight"]
    with refuses(
        "the checkpoint has no array 'transformer.layers.1.attention.wk.weight'"
    ):
        interop.from_reference(state, config)


def test_an_array_without_a_place_is_named():
    config = config_of(ebt_type="time_embed")
    state = interop.to_reference(random_params(config), config)
    with refuses(
        "the checkpoint has an array 'transformer.time_embeddings.weight' that this "
        "model config has no place for; check ebt_type, ebt_norm and the sizes"
    ):
        interop.from_reference(state, config_of(ebt_type="default"))


def test_an_array_of_another_shape_is_named_with_both_shapes():
    config = config_of()
    state = interop.to_reference(random_params(config), config)
    with refuses(
        "the checkpoint's 'transformer.layers.0.feed_forward.w1.weight' has shape "
        "(8, 8), but the model config needs (24, 8)"
    ):
        interop.from_reference(state, config_of(ffn_dim_multiplier=3))


def test_anchored_candidates_have_no_published_counterpart():
    config = config_of()
    anchored = dataclasses.replace(
        config, model=dataclasses.replace(config.model, candidate_input="anchored")
    )
    message = "model.candidate_input='anchored' has no published counterpart"
    with refuses(message):
        interop.to_reference(random_params(anchored), anchored)
    with refuses(message):
        interop.from_reference({}, anchored)


# Flags.


def test_flags_of_system_1_are_translated():
    config = config_of(
        ebt_type="time_embed",
        mcmc_num_steps=2,
        mcmc_step_size=500.0,
        mcmc_step_size_learnable=True,
        mcmc_step_size_lr_multiplier=1500.0,
        normalize_initial_condition=True,
        context_length=7,
    )
    assert config.refine.backprop == "per_step"
    assert config.objective.loss_steps == "all"
    assert config.refine.normalize_steps == "all"
    assert (config.refine.num_steps, config.refine.num_landscapes) == (2, 2)
    assert config.refine.step_size == 500.0 and config.refine.step_size_learnable
    assert config.optim.step_size_lr_multiplier == 1500.0
    assert config.model.conditioning == "time_embed"
    assert config.data.context == 7


def test_flags_of_system_2_are_translated():
    config = config_of(
        no_mcmc_detach=True,
        truncate_mcmc=True,
        mcmc_num_steps=2,
        randomize_mcmc_num_steps=2,
        randomize_mcmc_num_steps_min=1,
        randomize_mcmc_num_steps_final_landscape=True,
        randomize_mcmc_step_size_scale=2,
        langevin_dynamics_noise=3.0,
        normalize_initial_condition=True,
        normalize_initial_condition_only_first_step=True,
    )
    setup = config.refine
    assert setup.backprop == "truncated" and config.objective.loss_steps == "last"
    assert (setup.min_steps, setup.num_steps) == (2, 4)
    assert setup.final_landscape_only
    assert setup.step_size_jitter == 2.0 and setup.noise_std == 3.0
    assert setup.normalize_steps == "first" and not setup.step_size_learnable


def test_other_flags_are_translated():
    config = config_of(
        no_mcmc_detach=True,
        mcmc_num_steps=2,
        randomize_mcmc_num_steps=2,
        randomize_mcmc_num_steps_min=2,
        clamp_futures_grad=True,
        clamp_futures_grad_max_change=4.0,
        absolute_clamp=3.0,
        sharpen_predicted_distribution=0.5,
        soften_target_prob_dist=0.1,
        contrastive_loss=True,
        contrastive_loss_coeff=0.2,
        reconstruction_coeff=0.3,
        denoising_initial_condition="zeros",
        gaussian_random_noise_scaling=2.0,
        model_size="2xs",
        phase="train",
    )
    setup, objective = config.refine, config.objective
    assert setup.backprop == "full" and objective.loss_steps == "all"
    assert (setup.min_steps, setup.num_steps) == (4, 6)
    assert not setup.final_landscape_only and setup.normalize_steps == "none"
    assert (setup.gradient_clamp, setup.absolute_clamp, setup.sharpen) == (4, 3, 0.5)
    assert (setup.initial_candidate, setup.initial_scale) == ("zeros", 2.0)
    assert objective.label_smoothing == 0.1
    assert objective.contrastive_weight == 0.2
    assert objective.reconstruction_weight == 0.3
    assert config.model.size == "xxs"
    off = config_of(contrastive_loss_coeff=0.2, clamp_futures_grad_max_change=4.0)
    assert off.objective.contrastive_weight == off.refine.gradient_clamp == 0


def test_flags_of_the_optimiser_are_translated():
    config = config_of(
        peak_learning_rate=1.2e-3,
        warm_up_steps=10_000,
        max_steps=60_000,
        max_scheduling_steps=1_000_000,
        min_lr_scale=10,
        gradient_clip_val=1.0,
        weight_decay=0.02,
        mcmc_step_size_lr_multiplier=1500.0,
        seed=34,
        gpus=-1,
    )
    optim = config.optim
    assert (optim.peak_lr, optim.step_size_lr_multiplier) == (1.2e-3, 1500.0)
    assert (optim.warmup_steps, optim.schedule_steps) == (10_000, 1_000_000)
    assert (optim.final_lr_fraction, optim.final_lr_shared) == (0.1, True)
    assert (optim.clip_norm, optim.weight_decay) == (1.0, 0.02)
    assert (config.train.steps, config.train.seed) == (60_000, 34)


def test_replay_flags():
    assert config_of().replay.capacity == 0
    flags = {"mcmc_replay_buffer": True, "mcmc_replay_buffer_sample_bs_percent": 0.25}
    replay = config_of(**flags).replay
    assert (replay.capacity, replay.fraction, replay.top_k) == (192, 0.25, 0)
    assert config_of(**flags, mcmc_replay_buffer_size=96).replay.capacity == 96


@pytest.mark.parametrize(
    ("flag", "value", "off"),
    [
        ("clamp_max_after_warm_up", 0.5, "0.0"),
        ("discrete_contrastive_loss_true_logit_val", 1, "0"),
        ("energy_loss_coeff", 0.1, "0.0"),
        ("learnable_process_memory", True, "False"),
        ("no_langevin_during_eval", True, "False"),
        ("weight_initialization_gain", 0.5, "1.0"),
    ],
)
def test_a_flag_that_is_not_built_is_refused_unless_off(flag, value, off):
    with refuses(f"published flag {flag}={value!r} is not supported; only {off} is"):
        config_of(**{flag: value})
    assert config_of(**{flag: OFF[flag]}) == config_of()


@pytest.mark.parametrize(
    ("flag", "value", "supported"),
    [
        ("model", "rnn", "ebt, transformer_pp"),
        ("model_size", "huge", "4xs, 3xs, xxs, xs, small, medium, large, xl, 2xs"),
        ("ebt_type", "film", "default, time_embed, adaln, adaln_zero"),
        ("ebt_norm", "batch", "rms, layer, dyt, none"),
        ("ebt_act_func", "tanh", "silu, relu, gelu, elu"),
        ("denoising_initial_condition", "real_embeddings", STARTS),
    ],
)
def test_a_value_that_is_not_built_is_refused(flag, value, supported):
    with refuses(
        f"published flag {flag}={value!r} is not supported; only {supported} are"
    ):
        config_of(**{flag: value})


def test_modalities_have_two_names_each_and_others_are_refused():
    with refuses("published flag modality='sound' is not supported; only text, NLP"):
        config_of(modality="sound")
    assert config_of(modality="NLP") == config_of()
    video = config_of(modality="VID")
    assert config_of(modality="video") == video
    assert video.model.space == "video" and video.model.frame_size == 3136
    start = "most_recent_embedding"
    video = config_of(modality="VID", denoising_initial_condition=start)
    assert video.refine.initial_candidate == "most_recent"


def test_frames_that_were_not_encoded_by_a_vae_are_refused():
    with refuses("published flag backbone_type='dinov2' is not supported; only vae"):
        config_of(modality="VID", backbone_type="dinov2")


def test_the_frozen_encoder_of_a_video_checkpoint_is_left_out():
    config = config_of(**MODELS["video"])
    params = random_params(config)
    state = interop.to_reference(params, config)
    assert state["encoder_down_projection.weight"].shape == (8, 6)
    encoder = {"image_encoder.quant_conv.weight": np.zeros(3)}
    assert_same(interop.from_reference(state | encoder, config), params)


@pytest.mark.parametrize("name", ["time_embed", "video", "video transformer_pp"])
def test_a_run_may_begin_with_a_published_file(name, tmp_path):
    config = config_of(**MODELS[name])
    params = random_params(config)
    file = tmp_path / "published.npz"
    np.savez(file, **interop.to_reference(params, config))
    assert_same(read_file(str(file), config), named(params))


def test_an_unknown_flag_is_refused_by_name():
    with refuses("published flag ebt_colour='red' is not known here"):
        config_of(ebt_colour="red")


# Files.


def test_npz_and_safetensors_hold_the_same(tmp_path):
    config = config_of()
    params = random_params(config)
    state: dict[str, Any] = interop.to_reference(params, config)
    np.savez(tmp_path / "model.npz", **state)
    save_file(state, tmp_path / "model.safetensors")
    for name in ("model.npz", "model.safetensors"):
        read, flags = interop.read_checkpoint(str(tmp_path / name))
        assert flags == {}
        assert_same(interop.from_reference(read, config), params)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with refuses(f"checkpoint {str(path)!r} does not exist or is not a file"):
            interop.read_checkpoint(str(path))


def test_an_unknown_suffix_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.touch()
    with refuses(
        f"checkpoint {str(path)!r} has suffix '.bin', expected .npz, .safetensors, "
        ".ckpt, .pt or .pth"
    ):
        interop.read_checkpoint(str(path))


@pytest.mark.parametrize(
    ("suffix", "module", "message"),
    [
        (".ckpt", "torch", "reading .ckpt needs torch: `pip install 'ebt-jax[torch]'`"),
        (".pt", "torch", "reading .pt needs torch: `pip install 'ebt-jax[torch]'`"),
        (
            ".safetensors",
            "safetensors.numpy",
            "reading .safetensors needs `pip install 'ebt-jax[torch]'`",
        ),
    ],
)
def test_a_reader_that_is_not_installed_is_named(
    tmp_path, monkeypatch, suffix, module, message
):
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"model{suffix}"
    path.touch()
    with refuses(message):
        interop.read_checkpoint(str(path))
