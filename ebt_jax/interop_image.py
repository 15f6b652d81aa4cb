"""Arrays of published image models. Theirs are NCHW, ours NHWC."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.interop_entry import Entry
from ebt_jax.models.bidirectional import positions
from ebt_jax.models.config import ModelConfig

# Frozen encoders, which published checkpoints of text-to-image models hold, too.
ENCODERS = ("image_encoder.", "text_encoder.")


def image_entries(config: ModelConfig, diffusion: DiffusionConfig) -> Iterator[Entry]:
    """Every learnt array of a published checkpoint of an image model.

    Raises:
      UserError: for DiT with caption dropout, whose vector for no caption published
        models do not have.
    """
    dim, energy = config.width, config.kind == "ebt"
    top = prefix(config)
    conv = dim, config.channels, config.patch, config.patch
    pixels_first = (2, 3, 1, 0)  # rows and columns, channels, features
    name = f"{top}x_embedder.proj"
    path = ("patch_embed", "kernel")
    yield Entry(f"{name}.weight", path, shape=conv, axes=pixels_first)
    yield Entry(f"{name}.bias", ("patch_embed", "bias"))
    maps = {
        "attn.proj": "out",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
        "adaLN_modulation.1": "modulation",
    }
    for i in range(config.layers):
        block = f"{top}blocks.{i}."
        name, path = f"{block}attn.qkv", ("blocks", "qkv")
        shape = 3 * dim, dim
        yield Entry(f"{name}.weight", (*path, "kernel"), i, shape=shape, axes=(1, 0))
        yield Entry(f"{name}.bias", (*path, "bias"), i, shape=(3 * dim,), axes=(0,))
        for theirs, ours in maps.items():
            path = ("blocks", ours)
            yield Entry(f"{block}{theirs}.weight", (*path, "kernel"), i, True)
            yield Entry(f"{block}{theirs}.bias", (*path, "bias"), i)
    yield from _linear(f"{top}final_layer.adaLN_modulation.1", "final_modulation")
    if config.condition == "caption":
        yield from _linear("text_embeddings_projector", "caption_embed")
    if energy:
        yield Entry("alpha", ("step_size",))
        yield Entry("langevin_dynamics_noise_std", ("noise_std",))
        head = f"{top}final_layer.linear.weight"
        yield Entry(head, ("energy", "kernel"), None, True)
        if config.condition == "none":
            yield Entry("learned_adaln_condition.weight", ("condition", "embedding"))
        return
    if config.condition == "caption" and diffusion.caption_dropout:
        raise UserError(
            f"diffusion.caption_dropout is {diffusion.caption_dropout}, but published "
            "models are told every caption; with 0 parameters can be exchanged"
        )
    yield from _linear(f"{top}t_embedder.mlp.0", "time_in")
    yield from _linear(f"{top}t_embedder.mlp.2", "time_out")
    yield from _linear(f"{top}final_layer.linear", "output")


def fixed_arrays(config: ModelConfig) -> dict[str, np.ndarray]:
    """Published arrays that are not learnt, and that we compute."""
    return {f"{prefix(config)}pos_embed": positions(config)[None]}


def prefix(config: ModelConfig) -> str:
    """What the published names of the network begin with."""
    return "transformer." if config.kind == "ebt" else "diffusion_transformer."


def _linear(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (ours, "kernel"), None, True)
    yield Entry(f"{theirs}.bias", (ours, "bias"))
