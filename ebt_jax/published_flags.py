"""The flags of the published PyTorch code, as a config of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebt_jax.data.config import DataConfig
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES, ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.published_image_flags import (
    IMAGE_ALIASES,
    IMAGE_DEFAULTS,
    image_diffusion,
    image_model,
    image_start,
)
from ebt_jax.replay import ReplayConfig
from ebt_jax.training.config import Config, OptimConfig, TrainConfig

# The published code's own defaults of every flag that is translated.
PUBLISHED_DEFAULTS: dict[str, Any] = {
    "modality": "text",
    "backbone_type": "vae",
    "latent_dim": 3136,
    "model": "ebt",
    "model_size": "xxs",
    "embedding_dim": 0,
    "num_transformer_blocks": 0,
    "multiheaded_attention_heads": 0,
    "ffn_dim_multiplier": None,
    "context_length": 256,
    "vocab_size": 50277,
    "ebt_type": "default",
    "ebt_norm": "rms",
    "ebt_act_func": "silu",
    "dyt_alpha_init": 0.5,
    "vocab_to_embed_uses_prob_dist": False,
    "mcmc_num_steps": 2,
    "randomize_mcmc_num_steps": 0,
    "randomize_mcmc_num_steps_min": 0,
    "randomize_mcmc_num_steps_final_landscape": False,
    "mcmc_step_size": 60.0,
    "mcmc_step_size_learnable": False,
    "mcmc_step_size_lr_multiplier": 5000.0,
    "max_steps": 1_000_000,
    "max_scheduling_steps": -1,
    "min_lr_scale": 10,
    "seed": 33,
    "randomize_mcmc_step_size_scale": 1.0,
    "no_mcmc_detach": False,
    "truncate_mcmc": False,
    "mcmc_replay_buffer": False,
    "mcmc_replay_buffer_sample_bs_percent": 0.5,
    "mcmc_replay_buffer_size": 192,
    "langevin_dynamics_noise": 0.0,
    "langevin_dynamics_noise_learnable": False,
    "normalize_initial_condition": False,
    "normalize_initial_condition_only_first_step": False,
    "denoising_initial_condition": "random_noise",
    "gaussian_random_noise_scaling": 1.0,
    "clamp_futures_grad": False,
    "clamp_futures_grad_max_change": 9.0,
    "absolute_clamp": 0.0,
    "sharpen_predicted_distribution": 0.0,
    "soften_target_prob_dist": 0.0,
    "reconstruction_coeff": 1.0,
    "contrastive_loss": False,
    "contrastive_loss_coeff": 0.0005,
}

# Flags of things that are not built: an error unless at the value that means "off".
OFF: dict[str, Any] = {
    "clamp_max_after_warm_up": 0.0,
    "discrete_contrastive_loss_true_logit_val": 0,
    "energy_loss_coeff": 0.0,
    "infer_accept_lower_energies": False,
    "infer_alpha_final_landscape": False,
    "infer_ebt_advanced": False,
    "infer_ebt_num_steps": 1,
    "infer_ebt_override_alpha": 0,
    "infer_energy_sampling_technique": "min",
    "infer_generated_samples": 1,
    "infer_increase_steps": 0,
    "infer_langevin_dynamics_noise": 0,
    "infer_langevin_first_step": False,
    "infer_steps_final_landscape": False,
    "learnable_process_memory": False,
    "lr_scaling_rule": False,
    "no_langevin_during_eval": False,
    "optimizer": "adamw",
    "warm_up_base_lr_divider": -1,
    "weight_initialization": "xavier",
    "weight_initialization_gain": 1.0,
}

# Flags of the optimiser that are translated where they are given.
OPTIMIZER = {
    "peak_learning_rate": "peak_lr",
    "mcmc_step_size_lr_multiplier": "step_size_lr_multiplier",
    "warm_up_steps": "warmup_steps",
    "gradient_clip_val": "clip_norm",
    "weight_decay": "weight_decay",
    "beta1": "beta1",
    "beta2": "beta2",
}

# Flags that say how a run was carried out, not what its parameters compute.
NOT_OF_THE_MODEL = frozenset(
    {
        "accumulate_grad_batches",
        "batch",
        "batch_size_per_device",
        "check_val_every_n_epoch",
        "compile_model",
        "custom_image_normalization",
        "dataset_name",
        "float_precision",
        "gpus",
        "image_dims",
        "infer_debug_sample_distances",
        "infer_max_gen_len",
        "infer_temp",
        "infer_topk",
        "infer_topp",
        "log_every_n_steps",
        "log_gradients",
        "log_model_archi",
        "model_name",
        "num_workers",
        "patch_size",
        "phase",
        "preencode_video",
        "save_top_k",
        "sdxl_vae_standardization",
        "set_matmul_precision",
        "time_between_frames",
        "tokenizer",
        "vae_normalization",
        "val_check_interval",
        "validation_split_pct",
        "vit_backbone_size",
        "wandb_watch",
    }
)

MODALITIES = {
    "text": "text",
    "NLP": "text",
    "video": "video",
    "VID": "video",
    "image": "image",
    "IMG": "image",
}

STARTS = {
    "random_noise": "noise",
    "zeros": "zeros",
    "most_recent_embedding": "most_recent",
}

ALIASES = {
    "num_layers": "num_transformer_blocks",
    "num_heads": "multiheaded_attention_heads",
    "dim": "embedding_dim",
}


def config_from_reference(flags: Mapping[str, Any]) -> Config:
    """Translates the published code's flags.

    Args:
      flags: flag names and values (hparams); those left out have their published
        defaults. `dim`, `num_layers`, `num_heads`, `vocab_size` and, of video,
        `latent_dim`, the numbers in an encoded frame, are sizes; those of images are in
        `published_image_flags.IMAGE_DEFAULTS`.

    Returns:
      A config with `model`, `refine`, `objective`, `replay`, `optim`, `train.steps`,
      `train.seed` and `data.context` filled in. The published buffer's size is that of
      each device; `replay.capacity` is over all devices, here one.

    Raises:
      UserError: naming the flag, for one that is unknown or not supported.
    """
    defaults, aliases = PUBLISHED_DEFAULTS, ALIASES
    if "modality" in flags and flags["modality"] in ("image", "IMG"):
        defaults, aliases = defaults | IMAGE_DEFAULTS, aliases | IMAGE_ALIASES
    flags = {aliases[k] if k in aliases else k: v for k, v in flags.items()}
    known = {*defaults, *OPTIMIZER, *OFF, *NOT_OF_THE_MODEL}
    for name, value in flags.items():
        if name in OFF and value != OFF[name]:
            raise UserError(
                f"published flag {name}={value!r} is not supported; "
                f"only {OFF[name]!r} is"
            )
        if name not in known:
            raise UserError(f"published flag {name}={value!r} is not known here")
    f = {**defaults, **flags}
    _one_of(f, "modality", *MODALITIES)
    _one_of(f, "backbone_type", "vae")
    space = MODALITIES[f["modality"]]
    _one_of(f, "model", "ebt", "dit" if space == "image" else "transformer_pp")
    _one_of(f, "model_size", *SIZES, "2xs")
    _one_of(f, "ebt_type", "default", "time_embed", "adaln", "adaln_zero")
    _one_of(f, "ebt_norm", "rms", "layer", "dyt", "none")
    _one_of(f, "ebt_act_func", "silu", "relu", "gelu", "elu")
    _one_of(f, "denoising_initial_condition", *STARTS)
    landscapes = f["mcmc_num_steps"]
    fewest, most, extra_in_last = 0, landscapes, True
    if f["randomize_mcmc_num_steps"]:
        low = f["randomize_mcmc_num_steps_min"] or 1
        high = f["randomize_mcmc_num_steps"] + 1
        extra_in_last = (
            f["randomize_mcmc_num_steps_final_landscape"] or f["mcmc_num_steps"] == 1
        )
        if extra_in_last:
            fewest, most = landscapes - 1 + low, landscapes - 1 + high
        else:
            fewest, most = landscapes * low, landscapes * high
    backprop, loss_steps = "per_step", "all"
    if f["no_mcmc_detach"]:
        backprop = "truncated" if f["truncate_mcmc"] else "full"
    if f["truncate_mcmc"]:
        loss_steps = "last"
    normalize = "all" if f["normalize_initial_condition"] else "none"
    if normalize == "all" and f["normalize_initial_condition_only_first_step"]:
        normalize = "first"
    start = STARTS[f["denoising_initial_condition"]]
    model: dict[str, Any] = {"ffn_multiplier": float(f["ffn_dim_multiplier"] or 1)}
    if space == "image":
        start, model = image_start(f), image_model(f)
    return Config(
        model=ModelConfig(
            **model,
            kind=f["model"],
            space=space,
            size="xxs" if f["model_size"] == "2xs" else f["model_size"],
            num_layers=f["num_transformer_blocks"],
            num_heads=f["multiheaded_attention_heads"],
            dim=f["embedding_dim"],
            vocab_size=f["vocab_size"] if space == "text" else 0,
            frame_size=f["latent_dim"] if space == "video" else 0,
            num_landscapes=landscapes,
            conditioning=f["ebt_type"],
            tied_embedding=f["vocab_to_embed_uses_prob_dist"],
            norm=f["ebt_norm"],
            dyt_alpha=f["dyt_alpha_init"],
            activation=f["ebt_act_func"],
        ),
        refine=RefineSetup(
            num_steps=most,
            min_steps=fewest,
            num_landscapes=landscapes,
            final_landscape_only=extra_in_last,
            backprop=backprop,
            normalize_steps=normalize,
            noise_std=f["langevin_dynamics_noise"],
            noise_learnable=f["langevin_dynamics_noise_learnable"],
            step_size=f["mcmc_step_size"],
            step_size_learnable=f["mcmc_step_size_learnable"],
            step_size_jitter=float(f["randomize_mcmc_step_size_scale"]),
            initial_candidate=start,
            initial_scale=f["gaussian_random_noise_scaling"],
            gradient_clamp=f["clamp_futures_grad_max_change"]
            if f["clamp_futures_grad"]
            else 0.0,
            absolute_clamp=f["absolute_clamp"],
            sharpen=f["sharpen_predicted_distribution"],
        ),
        objective=ObjectiveConfig(
            loss_steps=loss_steps,
            reconstruction_weight=f["reconstruction_coeff"],
            label_smoothing=f["soften_target_prob_dist"],
            contrastive_weight=f["contrastive_loss_coeff"]
            if f["contrastive_loss"]
            else 0.0,
        ),
        replay=ReplayConfig(
            capacity=f["mcmc_replay_buffer_size"] if f["mcmc_replay_buffer"] else 0,
            fraction=float(f["mcmc_replay_buffer_sample_bs_percent"]),
        ),
        diffusion=image_diffusion(f) if space == "image" else DiffusionConfig(),
        optim=OptimConfig(
            schedule_steps=max(f["max_scheduling_steps"], 0),
            final_lr_fraction=1 / f["min_lr_scale"],
            final_lr_shared=True,
            **{ours: f[theirs] for theirs, ours in OPTIMIZER.items() if theirs in f},
        ),
        data=DataConfig(context=f["context_length"]),
        train=TrainConfig(steps=f["max_steps"], seed=f["seed"]),
    )


def _one_of(flags: Mapping[str, Any], name: str, *supported: str) -> None:
    if flags[name] not in supported:
        raise UserError(
            f"published flag {name}={flags[name]!r} is not supported; "
            f"only {', '.join(supported)} are"
        )
