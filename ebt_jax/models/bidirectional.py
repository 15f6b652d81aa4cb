"""Bidirectional models of images: the energy network and DiT.

An image is cut into patches that all see each other, in DiT blocks with adaLN-zero
conditioning (Peebles & Xie 2023). What conditions them, a learnt vector or a caption
and for DiT a timestep, does not depend on the candidate: the shifts, scales and gates
of all blocks are computed once for a batch, and an inner gradient passes them by.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from ebt_jax.models.attention import Visible, attend
from ebt_jax.models.blocks import rematerialized
from ebt_jax.models.config import ModelConfig
from ebt_jax.refine import PyTree

NORM_EPS = 1e-6
FREQUENCIES = 256  # numbers that a timestep is embedded by before its two maps
LONGEST_WAVE = 10000.0  # of sines and cosines, in patches or timesteps


class Modulation(NamedTuple):
    """Shifts, scales and gates; rows are the batch's, or 1 that all share.

    Attributes:
      blocks: `[layers, rows, 6, dim]`.
      final: `[rows, 2, dim]`.
    """

    blocks: jax.Array
    final: jax.Array


class Projections(nn.Module):
    """Queries, keys and values as one product, each with a bias.

    The kernel is `[dim, 3, dim]`, initialised as the one map that it is in DiT.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Maps `[..., dim]` to three times that."""
        dim = self.config.width

        def init(key: jax.Array) -> jax.Array:
            uniform = nn.initializers.xavier_uniform()
            return uniform(key, (dim, 3 * dim), jnp.float32).reshape(dim, 3, dim)

        kernel = self.param("kernel", init)
        bias = self.param("bias", nn.initializers.zeros, (3, dim))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=_compute(self.config))
        if not self.config.fused:  # where features are split, so is each product
            return [_affine(x, kernel[:, part], bias[part]) for part in range(3)]
        product = _affine(x, kernel.reshape(dim, -1), bias.reshape(-1))
        return jnp.split(product, 3, axis=-1)


class Block(nn.Module):
    """Attention among all patches, then a feed-forward part, both modulated."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, modulation: jax.Array) -> jax.Array:
        """Maps `[batch, patches, dim]`, modulated by `[rows, 6, dim]`."""
        c = self.config
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _parts(modulation)
        projected = Projections(c, name="qkv")(_modulated(x, shift_a, scale_a))
        query, key, value = (self._heads(part) for part in projected)
        count = x.shape[1]
        visible = Visible(jnp.full((1, count), count - 1))  # all of them
        attended = attend(query, key, value, visible, block=c.attention_block)
        merged = jnp.swapaxes(attended, 1, 2).reshape(x.shape)
        x = x + gate_a * dense(c, c.width, name="out")(merged)
        hidden = dense(c, c.hidden, name="up")(_modulated(x, shift_m, scale_m))
        hidden = jax.nn.gelu(hidden, approximate=True)
        return x + gate_m * dense(c, c.width, name="down")(hidden)

    def _heads(self, h: jax.Array) -> jax.Array:
        h = h.reshape(*h.shape[:-1], self.config.heads, self.config.head_dim)
        return jnp.swapaxes(h, 1, 2)


def init(config: ModelConfig, key: jax.Array, null_caption: bool = False) -> PyTree:
    """Parameters; blocks are stacked `[layers, ...]`.

    Energies, and what DiT predicts, are 0 before training.

    Args:
      config: the model's.
      key: PRNG key.
      null_caption: of DiT, whether a learnt vector stands for no caption.
    """
    keys = iter(jax.random.split(key, 8))
    dim, energy = config.width, config.kind == "ebt"
    zeros = nn.initializers.zeros
    tokens = jnp.zeros((1, 1, dim))

    def block(key: jax.Array) -> PyTree:
        params = Block(config).init(key, tokens, jnp.zeros((1, 6, dim)))["params"]
        return {**params, "modulation": _linear(key, dim, 6 * dim, zeros)}

    params: PyTree = {
        "patch_embed": _linear(next(keys), patch_numbers(config), dim),
        "blocks": jax.vmap(block)(jax.random.split(next(keys), config.layers)),
        "final_modulation": _linear(next(keys), dim, 2 * dim, zeros),
    }
    if config.condition == "caption":
        params["caption_embed"] = _linear(next(keys), config.condition_size, dim)
    if null_caption or (energy and config.condition == "none"):
        vector = jax.random.normal(next(keys), (1, dim))
        params["condition"] = {"embedding": vector if energy else 0.02 * vector}
    if energy:
        params["energy"] = {"kernel": jnp.zeros((dim, 1))}
        return params
    small = nn.initializers.normal(0.02)
    params["time_in"] = _linear(next(keys), FREQUENCIES, dim, small)
    params["time_out"] = _linear(next(keys), dim, dim, small)
    params["output"] = _linear(next(keys), dim, 2 * patch_numbers(config), zeros)
    return params


def condition(config: ModelConfig, params: PyTree, batch: PyTree) -> jax.Array | None:
    """What conditions the blocks, besides a timestep: `[rows, dim]`, or None.

    Args:
      config: the model's.
      params: its parameters.
      batch: `caption` `[batch, condition_size]` where captions are the condition.
    """
    if config.condition == "caption":
        return _map(config, params["caption_embed"], batch["caption"])
    return params["condition"]["embedding"] if config.kind == "ebt" else None


def modulations(
    config: ModelConfig, params: PyTree, condition: jax.Array
) -> Modulation:
    """Shifts, scales and gates of all blocks.

    Args:
      config: the model's.
      params: its parameters.
      condition: `[rows, dim]`; for DiT that of `timed`.
    """
    bent, rows = jax.nn.silu(condition), len(condition)
    of_block = params["blocks"]["modulation"]
    blocks = jax.vmap(lambda weights: _map(config, weights, bent))(of_block)
    final = _map(config, params["final_modulation"], bent)
    dim = config.width
    return Modulation(blocks.reshape(-1, rows, 6, dim), final.reshape(rows, 2, dim))


def timed(
    config: ModelConfig,
    params: PyTree,
    timestep: jax.Array,
    condition: jax.Array | None,
) -> jax.Array:
    """The condition `[rows, dim]` of DiT.

    Args:
      config: the model's.
      params: its parameters.
      timestep: `[batch]`, or `[1]` for all.
      condition: of `condition`.
    """
    half = FREQUENCIES // 2
    frequency = jnp.exp(-math.log(LONGEST_WAVE) * jnp.arange(half) / half)[None]
    angle = timestep.astype(frequency.dtype)[:, None] * frequency
    waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    time = jax.nn.silu(_map(config, params["time_in"], waves))
    time = _map(config, params["time_out"], time)
    return time if condition is None else time + condition


def hidden_patches(
    config: ModelConfig, params: PyTree, modulation: Modulation, image: jax.Array
) -> jax.Array:
    """Patches after the last block, `[batch, patches, dim]`: features of an image.

    Args:
      config: the model's.
      params: its parameters.
      modulation: of `modulations`.
      image: `[batch, side, side, channels]`.
    """
    x = _map(config, params["patch_embed"], patches(config, image))
    x = x + positions(config)[None].astype(x.dtype)
    blocks = {k: v for k, v in params["blocks"].items() if k != "modulation"}

    def layer(x: jax.Array, inputs: Any) -> Any:
        weights, modulation = inputs
        return Block(config).apply({"params": weights}, x, modulation), None

    scanned = config.layers > config.unroll
    layer = rematerialized(config, layer, scanned)
    return jax.lax.scan(layer, x, (blocks, modulation.blocks), unroll=not scanned)[0]


def energy_map(
    config: ModelConfig, params: PyTree, modulation: Modulation, image: jax.Array
) -> jax.Array:
    """Energies `[batch, patches]` of the patches, in rows from the top left; float32.

    Their mean is the energy of the image. Arguments are those of `hidden_patches`.
    """
    x = hidden_patches(config, params, modulation, image)
    x = _modulated(x, *_parts(modulation.final))
    head = params["energy"]["kernel"]
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) @ head[:, 0]


def noise_and_variance(
    config: ModelConfig, params: PyTree, modulation: Modulation, image: jax.Array
) -> jax.Array:
    """What DiT predicts, `[batch, side, side, 2 channels]`, float32.

    The noise and, behind it, where the logarithm of the variance lies between its least
    (-1) and its most (1). Arguments are those of `hidden_patches`.
    """
    x = hidden_patches(config, params, modulation, image)
    x = _map(config, params["output"], _modulated(x, *_parts(modulation.final)))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    side, patch = config.image_size // config.patch, config.patch
    x = x.reshape(len(x), side, side, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(len(x), config.image_size, config.image_size, -1)


def patches(config: ModelConfig, image: jax.Array) -> jax.Array:
    """The patches `[batch, patches, patch * patch * channels]` of images."""
    side, patch = config.image_size // config.patch, config.patch
    x = image.reshape(len(image), side, patch, side, patch, -1).swapaxes(2, 3)
    return x.reshape(len(x), side * side, -1)


def patch_numbers(config: ModelConfig) -> int:
    """Numbers in a patch."""
    return config.patch * config.patch * config.channels


def positions(config: ModelConfig) -> np.ndarray:
    """Fixed sines and cosines of columns, then of rows, `[patches, dim]`."""
    quarter = config.width // 4
    frequency = LONGEST_WAVE ** (-np.arange(quarter) / quarter)
    angle = np.arange(config.image_size // config.patch)[:, None] * frequency
    waves = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    side = len(waves)
    columns = np.broadcast_to(waves[None], (side, *waves.shape))
    both = np.concatenate([columns, columns.swapaxes(0, 1)], axis=-1)
    return both.reshape(side * side, -1).astype(np.float32)


def dense(config: ModelConfig, features: int, name: str) -> nn.Dense:
    """A linear map with a bias, Xavier-uniform, in the compute dtype."""
    return nn.Dense(
        features,
        dtype=_compute(config),
        kernel_init=nn.initializers.xavier_uniform(),
        name=name,
    )


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalises `[..., dim]`, without gain or bias; statistics in float32."""
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    h = h - h.mean(axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + NORM_EPS)
    return h.astype(x.dtype)


def _modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return layer_norm(x) * (1 + scale) + shift


def _parts(modulation: jax.Array) -> list[jax.Array]:
    """`[rows, parts, dim]` as parts that multiply `[batch, patches, dim]`."""
    return [modulation[:, i, None] for i in range(modulation.shape[1])]


def _linear(
    key: jax.Array, inputs: int, outputs: int, kernel_init: Any = None
) -> PyTree:
    kernel_init = kernel_init or nn.initializers.xavier_uniform()
    kernel = kernel_init(key, (inputs, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _map(config: ModelConfig, weights: PyTree, x: jax.Array) -> jax.Array:
    x, kernel, bias = promote_dtype(
        x, weights["kernel"], weights["bias"], dtype=_compute(config)
    )
    return _affine(x, kernel, bias)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ kernel + bias.reshape(*(1 for _ in x.shape[1:]), -1)


def _compute(config: ModelConfig) -> Any:
    """None lets float64 parameters compute in float64, for numerical tests."""
    return jnp.bfloat16 if config.dtype == "bfloat16" else None
