"""The Stable Diffusion autoencoder (AutoencoderKL; Rombach et al. 2022).

    vae = load_vae("sd-vae-ft-mse.safetensors")
    encode = weights.compiled(vae.encode, vae.params)
    latents = encode(images)    # [batch, side/8, side/8, 4]

Its latents have a standard deviation of about 5; times 0.18215 it is about 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebt_jax.errors import UserError
from ebt_jax.models.encoders import weights as published
from ebt_jax.models.encoders.weights import Entry, Weights, linear, norm

SCALE = 0.18215  # the published one, of Stable Diffusion 1 and 2

_KIND = "a Stable Diffusion autoencoder in the layout of diffusers or of CompVis"
_GROUPS = 32  # of every group normalisation
_EPS = 1e-6


class VaeConfig(NamedTuple):
    """Sizes, as read from the weights.

    Attributes:
      widths: channels at each resolution, from the image's downwards; each resolution
        is half of the one before.
      blocks: residual blocks at each resolution of the encoder; the decoder has one
        more.
      channels: of an image.
      latent: channels of the latents.
    """

    widths: tuple[int, ...]
    blocks: int
    channels: int
    latent: int

    @property
    def factor(self) -> int:
        """Side of an image over the side of its latents."""
        return 2 ** (len(self.widths) - 1)


class Vae(NamedTuple):
    """An autoencoder: its parameters and pure functions of them.

    Attributes:
      params: a nested dict with `encoder` and `decoder`, either usable by itself.
      config: sizes.
      encode: (params, images, scale=1.0) -> latents. Images `[batch, height, width,
        channels]` in [-1, 1], sides divisible by `config.factor`. Latents `[batch,
        height / factor, width / factor, latent]`: the mean of the posterior, times
        scale.
      decode: (params, latents, scale=1.0) -> images, not clipped; the latents are
        divided by scale first.
    """

    params: Any
    config: VaeConfig
    encode: Callable[..., jax.Array]
    decode: Callable[..., jax.Array]


def load_vae(path: str) -> Vae:
    """The autoencoder of a file of published weights.

    Args:
      path: `.safetensors`, `.npz` or a PyTorch file, in the layout of diffusers or of
        CompVis; a whole Stable Diffusion checkpoint of CompVis will do.

    Raises:
      UserError: if the file cannot be read, or naming the first array that is missing,
        not expected or of another shape.
    """
    return from_weights(published.read(path, _KIND))


def from_weights(weights: Weights) -> Vae:
    """The autoencoder of published arrays, see `load_vae`."""
    # Whole checkpoints hold a denoiser too; training checkpoints a discriminator.
    weights = weights.below("first_stage_model.").without("loss.", "model_ema.")
    names = (
        _COMPVIS if "encoder.norm_out.weight" in weights.arrays else _diffusers(weights)
    )
    config = _read_config(weights, names)
    params = published.convert(weights, _entries(config, names), _shapes(config))
    return Vae(
        params=params,
        config=config,
        encode=functools.partial(_encode, config),
        decode=functools.partial(_decode, config),
    )


def _encode(
    config: VaeConfig, params: Any, images: jax.Array, scale: float = 1.0
) -> jax.Array:
    _, height, width, channels = images.shape
    if channels != config.channels:
        raise UserError(
            f"images have {channels} channels, but the autoencoder needs "
            f"{config.channels}; convert them"
        )
    if height % config.factor or width % config.factor:
        raise UserError(
            f"images of {height} x {width} pixels cannot be encoded, whose sides have "
            f"to be multiples of {config.factor}; resize them"
        )
    mean = _Encoder(config).apply({"params": params["encoder"]}, images)
    return jnp.asarray(mean) * scale


def _decode(
    config: VaeConfig, params: Any, latents: jax.Array, scale: float = 1.0
) -> jax.Array:
    if latents.shape[-1] != config.latent:
        raise UserError(
            f"latents have {latents.shape[-1]} channels, but the autoencoder's have "
            f"{config.latent}; give latents that it encoded"
        )
    images = _Decoder(config).apply({"params": params["decoder"]}, latents / scale)
    return jnp.asarray(images)


# The networks.


class _Encoder(nn.Module):
    config: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The posterior's mean `[batch, h, w, latent]` of images."""
        c = self.config
        x = _conv(c.widths[0], "conv_in")(x)
        for level, width in enumerate(c.widths):
            for block in range(c.blocks):
                x = _Residual(width, name=f"level_{level}_block_{block}")(x)
            if level < len(c.widths) - 1:
                # One row and column of zeros, after the last ones alone.
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                name = f"level_{level}_down"
                x = nn.Conv(width, (3, 3), 2, padding="VALID", name=name)(x)
        x = _Residual(c.widths[-1], name="middle_0")(x)
        x = _Attention(name="middle_attention")(x)
        x = _Residual(c.widths[-1], name="middle_1")(x)
        x = jax.nn.silu(_norm("norm_out")(x))
        x = _conv(2 * c.latent, "conv_out")(x)
        return nn.Dense(2 * c.latent, name="quantise")(x)[..., : c.latent]


class _Decoder(nn.Module):
    config: VaeConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images of latents `[batch, h, w, latent]`."""
        c = self.config
        x = nn.Dense(c.latent, name="quantise")(x)
        x = _conv(c.widths[-1], "conv_in")(x)
        x = _Residual(c.widths[-1], name="middle_0")(x)
        x = _Attention(name="middle_attention")(x)
        x = _Residual(c.widths[-1], name="middle_1")(x)
        for level, width in reversed(list(enumerate(c.widths))):
            for block in range(c.blocks + 1):
                x = _Residual(width, name=f"level_{level}_block_{block}")(x)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = _conv(width, f"level_{level}_up")(x)
        x = jax.nn.silu(_norm("norm_out")(x))
        return _conv(c.channels, "conv_out")(x)


class _Residual(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = _conv(self.features, "conv_0")(jax.nn.silu(_norm("norm_0")(x)))
        h = _conv(self.features, "conv_1")(jax.nn.silu(_norm("norm_1")(h)))
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, name="shortcut")(x)
        return x + h


class _Attention(nn.Module):
    """Every pixel attends all, with one head."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, features = x.shape
        h = _norm("norm")(x).reshape(batch, height * width, 1, features)
        query, key, value = (
            nn.Dense(features, name=name)(h) for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        return x + nn.Dense(features, name="out")(h)


def _conv(features: int, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), name=name)


def _norm(name: str) -> nn.GroupNorm:
    return nn.GroupNorm(_GROUPS, epsilon=_EPS, use_fast_variance=False, name=name)


# The published layouts.


class _Names(NamedTuple):
    """What the two layouts call their parts; decoder levels count from 0 upwards."""

    encoder_block: Callable[[int, int], str]
    decoder_block: Callable[[int, int], str]
    down: Callable[[int], str]
    up: Callable[[int], str]
    middle: tuple[str, str]
    attention: str
    projections: tuple[str, ...]  # norm, query, key, value, out
    shortcut: str
    norm_out: str


def _diffusers(weights: Weights) -> _Names:
    """Diffusers' names; it counts the decoder's levels in the order of computation."""
    last = weights.count("decoder.up_blocks.{}.resnets.0.conv1.weight") - 1
    attention = "mid_block.attentions.0"
    newer = f"encoder.{attention}.to_q.weight" in weights.arrays
    return _Names(
        encoder_block=lambda level, i: f"down_blocks.{level}.resnets.{i}",
        decoder_block=lambda level, i: f"up_blocks.{last - level}.resnets.{i}",
        down=lambda level: f"down_blocks.{level}.downsamplers.0.conv",
        up=lambda level: f"up_blocks.{last - level}.upsamplers.0.conv",
        middle=("mid_block.resnets.0", "mid_block.resnets.1"),
        attention=attention,
        projections=("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        if newer
        else ("group_norm", "query", "key", "value", "proj_attn"),
        shortcut="conv_shortcut",
        norm_out="conv_norm_out",
    )


_COMPVIS = _Names(
    encoder_block=lambda level, i: f"down.{level}.block.{i}",
    decoder_block=lambda level, i: f"up.{level}.block.{i}",
    down=lambda level: f"down.{level}.downsample.conv",
    up=lambda level: f"up.{level}.upsample.conv",
    middle=("mid.block_1", "mid.block_2"),
    attention="mid.attn_1",
    projections=("norm", "q", "k", "v", "proj_out"),
    shortcut="nin_shortcut",
    norm_out="norm_out",
)


def _read_config(weights: Weights, names: _Names) -> VaeConfig:
    def first(level: int) -> str:
        return f"encoder.{names.encoder_block(level, 0)}.conv1.weight"

    channels = weights.shape("encoder.conv_in.weight", 4)[1]
    latent = weights.shape("post_quant_conv.weight", 4)[0]
    widths = [weights.shape(first(0), 4)[0]]
    while first(len(widths)) in weights.arrays:
        widths.append(weights.shape(first(len(widths)), 4)[0])
    for level, width in enumerate(widths):
        if width % _GROUPS:
            weights.refuse(
                f"has {first(level)!r} of {width} channels, which are not a multiple "
                f"of {_GROUPS}"
            )
    blocks = 1
    while f"encoder.{names.encoder_block(0, blocks)}.conv1.weight" in weights.arrays:
        blocks += 1
    return VaeConfig(tuple(widths), blocks, channels, latent)


def _entries(config: VaeConfig, names: _Names) -> Iterator[Entry]:
    """Every array of an autoencoder."""
    widths, last = config.widths, len(config.widths) - 1
    conv = functools.partial(linear, axes=published.CONV)
    for half in ("encoder", "decoder"):
        encoder = half == "encoder"
        yield from conv(f"{half}.conv_in", (half, "conv_in"))
        for level in range(last + 1):
            before = max(level - 1, 0) if encoder else min(level + 1, last)
            block = names.encoder_block if encoder else names.decoder_block
            for i in range(config.blocks + (not encoder)):
                path = (half, f"level_{level}_block_{i}")
                shortcut = i == 0 and widths[before] != widths[level]
                yield from _block(f"{half}.{block(level, i)}", path, names, shortcut)
            if encoder and level < last:
                name = f"{half}.{names.down(level)}"
                yield from conv(name, (half, f"level_{level}_down"))
            if not encoder and level > 0:
                yield from conv(
                    f"{half}.{names.up(level)}", (half, f"level_{level}_up")
                )
        for i, name in enumerate(names.middle):
            yield from _block(f"{half}.{name}", (half, f"middle_{i}"), names, False)
        theirs, path = f"{half}.{names.attention}", (half, "middle_attention")
        yield from norm(f"{theirs}.{names.projections[0]}", (*path, "norm"))
        ours = ("query", "key", "value", "out")
        for own, name in zip(ours, names.projections[1:], strict=True):
            yield from linear(f"{theirs}.{name}", (*path, own))
        yield from norm(f"{half}.{names.norm_out}", (half, "norm_out"))
        yield from conv(f"{half}.conv_out", (half, "conv_out"))
    yield from linear("quant_conv", ("encoder", "quantise"))
    yield from linear("post_quant_conv", ("decoder", "quantise"))


def _block(
    theirs: str, path: tuple[str, ...], names: _Names, shortcut: bool
) -> Iterator[Entry]:
    for i in range(2):
        yield from norm(f"{theirs}.norm{i + 1}", (*path, f"norm_{i}"))
        name = f"{theirs}.conv{i + 1}"
        yield from linear(name, (*path, f"conv_{i}"), axes=published.CONV)
    if shortcut:
        yield from linear(f"{theirs}.{names.shortcut}", (*path, "shortcut"))


def _shapes(config: VaeConfig) -> dict[str, Any]:
    side = config.factor
    image = jax.ShapeDtypeStruct((1, side, side, config.channels), jnp.float32)
    latent = jax.ShapeDtypeStruct((1, 1, 1, config.latent), jnp.float32)
    key = jax.random.key(0)
    return {
        "encoder": jax.eval_shape(_Encoder(config).init, key, image)["params"],
        "decoder": jax.eval_shape(_Decoder(config).init, key, latent)["params"],
    }
