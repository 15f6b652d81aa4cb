"""DINOv2 image encoders (Oquab et al. 2023; with registers: Darcet et al. 2023).

    encoder = load_dinov2("dinov2_vitb14_pretrain.pth", "base")
    encode = weights.compiled(encoder.encode, encoder.params)
    features = encode(imagenet_normalised(images))
    features.image      # [batch, 768]
    features.patches    # [batch, side/14, side/14, 768]

Any size of images will do whose sides are multiples of a patch's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.models.encoders import weights as published
from ebt_jax.models.encoders.transformer import (
    Block,
    BlockConfig,
    BlockNames,
    block_entries,
    check_width,
    layer_norm,
)
from ebt_jax.models.encoders.weights import Entry, Weights, linear, norm

SIZES = {"small": (12, 384), "base": (12, 768), "large": (24, 1024)}  # layers, width

_EPS = 1e-6
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Dinov2Config(NamedTuple):
    """Sizes and variants, as read from the weights.

    Attributes:
      layers: blocks.
      width: features of a token.
      hidden: features inside an MLP.
      patch: side of a patch in pixels.
      channels: of an image.
      registers: tokens that only serve computation; 0 or 4.
      grid: patches along a side at which the positions were trained.
      offset: patches added to an image's sides before positions are interpolated to
        them: 0.1 where the original code adds them, for weights of its layout without
        registers.
    """

    layers: int
    width: int
    hidden: int
    patch: int
    channels: int
    registers: int
    grid: int
    offset: float


class Dinov2Features(NamedTuple):
    """What DINOv2 says of images, after the last normalisation.

    Attributes:
      image: of the whole image, the class token, `[batch, width]`.
      patches: `[batch, rows, columns, width]`.
    """

    image: jax.Array
    patches: jax.Array


class Dinov2(NamedTuple):
    """An image encoder: its parameters and a pure function of them.

    Attributes:
      params: a nested dict.
      config: sizes and variants.
      encode: (params, images) -> Dinov2Features. Images `[batch, height, width,
        channels]`, normalised as `imagenet_normalised` does, sides divisible by
        `config.patch`; positions are interpolated to their size.
    """

    params: Any
    config: Dinov2Config
    encode: Callable[..., Dinov2Features]


def load_dinov2(path: str, size: str) -> Dinov2:
    """The encoder of a file of published weights.

    Positions are interpolated as the library does that the file's layout belongs to;
    without registers the two differ in a tenth of a patch.

    Args:
      path: `.safetensors`, `.npz` or a PyTorch file, in the layout of transformers or
        of facebookresearch, with or without registers.
      size: "small", "base" or "large".

    Raises:
      UserError: for another size, if the file cannot be read, or naming the first array
        that is missing, not expected or of another shape.
    """
    if size not in SIZES:
        raise UserError(f"DINOv2 size {size!r} is unknown; choose {', '.join(SIZES)}")
    kind = f"DINOv2 {size!r} in the layout of transformers or of facebookresearch"
    weights = published.read(path, kind)
    layout = _layout(weights)
    found, (layers, width) = _read_config(weights, layout), SIZES[size]
    if found.width != width:
        weights.refuse(
            f"has {layout.token!r} of shape {(1, 1, found.width)}, where "
            f"{(1, 1, width)} is needed"
        )
    if found.layers != layers:
        weights.refuse(f"has {found.layers} blocks, where {layers} are needed")
    return from_weights(weights)


def from_weights(weights: Weights) -> Dinov2:
    """The encoder of published arrays, of any size, see `load_dinov2`."""
    layout = _layout(weights)
    config = _read_config(weights, layout)
    image = (1, config.patch * config.grid, config.patch * config.grid, config.channels)
    shapes = jax.eval_shape(
        _VisionTransformer(config).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct(image, jnp.float32),
    )
    # The mask token serves pretraining alone.
    weights = weights.without("mask_token", "embeddings.mask_token")
    params = published.convert(weights, _entries(config, layout), shapes["params"])
    return Dinov2(params, config, functools.partial(_encode, config))


def imagenet_normalised(images: jax.Array) -> jax.Array:
    """Images `[..., channels]` in [-1, 1] as DINOv2 was trained on them."""
    shape = (1,) * (images.ndim - 1) + (3,)
    mean, std = jnp.reshape(jnp.array([_IMAGENET_MEAN, _IMAGENET_STD]), (2, *shape))
    return ((images + 1) / 2 - mean) / std


def _encode(config: Dinov2Config, params: Any, images: jax.Array) -> Dinov2Features:
    _, height, width, channels = images.shape
    if channels != config.channels:
        raise UserError(
            f"images have {channels} channels, but DINOv2 needs {config.channels}; "
            "convert them"
        )
    if height % config.patch or width % config.patch or not height * width:
        raise UserError(
            f"images of {height} x {width} pixels cannot be encoded, whose sides have "
            f"to be multiples of {config.patch}; resize them"
        )
    tokens = jnp.asarray(_VisionTransformer(config).apply({"params": params}, images))
    rows, columns = height // config.patch, width // config.patch
    patches = tokens[:, 1 + config.registers :]
    return Dinov2Features(
        image=tokens[:, 0],
        patches=patches.reshape(len(tokens), rows, columns, config.width),
    )


class _VisionTransformer(nn.Module):
    config: Dinov2Config

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Tokens `[batch, 1 + registers + patches, width]` of images."""
        c, side = self.config, self.config.patch
        x = nn.Conv(c.width, (side, side), side, padding="VALID", name="patches")(
            images
        )
        batch, rows, columns, _ = x.shape
        zeros = nn.initializers.zeros
        positions = self.param("positions", zeros, (1, 1 + c.grid**2, c.width))
        x = x.reshape(batch, rows * columns, c.width)
        x = x + _interpolated(c, positions[:, 1:], rows, columns)
        first = self.param("token", zeros, (1, 1, c.width)) + positions[:, :1]
        if c.registers:
            own = self.param("registers", zeros, (1, c.registers, c.width))
            first = jnp.concatenate([first, own], axis=1)
        first = jnp.broadcast_to(first, (batch, *first.shape[1:]))
        x = jnp.concatenate([first, x], axis=1)
        block = BlockConfig(c.width, c.hidden, "gelu", _EPS, False, True)
        for layer in range(c.layers):
            x = Block(block, name=f"block_{layer}")(x)
        return layer_norm(_EPS, "norm")(x)


def _interpolated(
    config: Dinov2Config, positions: jax.Array, rows: int, columns: int
) -> jax.Array:
    """Positions `[1, grid * grid, width]` at another size."""
    if rows == columns == config.grid:
        return positions
    grid = positions.reshape(config.grid, config.grid, -1)
    vertical, horizontal = (
        resampling(config.grid, size, config.offset, antialias=config.registers > 0)
        for size in (rows, columns)
    )
    grid = jnp.einsum("ri,ck,ikd->rcd", vertical, horizontal, grid)
    return grid.reshape(1, rows * columns, -1)


def resampling(before: int, after: int, offset: float, antialias: bool) -> np.ndarray:
    """The matrix of PyTorch's bicubic interpolation along one axis.

    Args:
      before: points that there are.
      after: points to compute.
      offset: added to `after` where the distance of the points is computed.
      antialias: whether the kernel is widened where there are fewer points than before;
        PyTorch takes another kernel then, and other borders.

    Returns:
      `[after, before]`, each row summing up to 1, float32.
    """
    step = before / (after + offset)
    centres = step * (np.arange(after) + 0.5) - 0.5
    if not antialias:
        first = np.floor(centres).astype(int) - 1
        taps = first[:, None] + np.arange(4)
        weights = _cubic(taps - centres[:, None], -0.75)
        matrix = np.zeros((after, before))
        rows = np.broadcast_to(np.arange(after)[:, None], taps.shape)
        np.add.at(matrix, (rows, taps.clip(0, before - 1)), weights)
    else:
        distances = (np.arange(before) - centres[:, None]) / max(step, 1.0)
        matrix = _cubic(distances, -0.5)
        matrix /= matrix.sum(axis=1, keepdims=True)
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys's cubic convolution kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


# The published layouts.


class _Layout(NamedTuple):
    token: str
    registers: str
    positions: str
    patches: str
    block: str
    norm: str
    names: BlockNames
    offset: float


_TRANSFORMERS = _Layout(
    token="embeddings.cls_token",
    registers="embeddings.register_tokens",
    positions="embeddings.position_embeddings",
    patches="embeddings.patch_embeddings.projection",
    block="encoder.layer.{}.",
    norm="layernorm",
    names=BlockNames(
        norms=("norm1", "norm2"),
        qkv=tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        out="attention.output.dense",
        mlp=("mlp.fc1", "mlp.fc2"),
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    ),
    offset=0.0,
)

_FACEBOOK = _Layout(
    token="cls_token",
    registers="register_tokens",
    positions="pos_embed",
    patches="patch_embed.proj",
    block="blocks.{}.",
    norm="norm",
    names=BlockNames(
        norms=("norm1", "norm2"),
        qkv=("attn.qkv",),
        out="attn.proj",
        mlp=("mlp.fc1", "mlp.fc2"),
        scales=("ls1.gamma", "ls2.gamma"),
    ),
    offset=0.1,
)


def _layout(weights: Weights) -> _Layout:
    return _FACEBOOK if _FACEBOOK.token in weights.arrays else _TRANSFORMERS


def _read_config(weights: Weights, layout: _Layout) -> Dinov2Config:
    width = weights.shape(layout.token, 3)[-1]
    check_width(weights, layout.token, width)
    registers = 0
    if layout.registers in weights.arrays:
        registers = weights.shape(layout.registers, 3)[1]
    _, channels, patch, _ = weights.shape(f"{layout.patches}.weight", 4)
    first = f"{layout.block.format(0)}{layout.names.mlp[0]}.weight"
    return Dinov2Config(
        layers=weights.count(f"{layout.block}{layout.names.norms[0]}.weight"),
        width=width,
        hidden=weights.shape(first, 2)[0],
        patch=patch,
        channels=channels,
        registers=registers,
        grid=math.isqrt(weights.shape(layout.positions, 3)[1] - 1),
        offset=0.0 if registers else layout.offset,
    )


def _entries(config: Dinov2Config, layout: _Layout) -> Iterator[Entry]:
    """Every array of an encoder."""
    yield Entry(layout.token, ("token",))
    yield Entry(layout.positions, ("positions",))
    if config.registers:
        yield Entry(layout.registers, ("registers",))
    yield from linear(layout.patches, ("patches",), axes=published.CONV)
    for i in range(config.layers):
        theirs, path = layout.block.format(i), (f"block_{i}",)
        yield from block_entries(theirs, path, layout.names)
    yield from norm(layout.norm, ("norm",))
