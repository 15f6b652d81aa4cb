"""What a model sees of a picture or a frame: its pixels, or an encoder's latents."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.data.items import Clip
from ebt_jax.data.pictures import to_floats, to_pixels
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.errors import UserError

FIT_NUMBERS = 32_000_000  # about so many numbers of pictures are components fitted to
_BATCH = 16  # pictures that an autoencoder takes at a time
_GROUP = 256  # pictures that are encoded together


class Encoder(NamedTuple):
    """Encodes squares of pixels.

    Attributes:
      shape: of an encoded picture, such as `(rows, columns, features)`.
      encode: uint8 `[pictures, side, side, channels]` -> `[pictures, *shape]`, float32,
        or uint8 where pixels are kept.
      decode: `[..., *shape]` -> uint8 `[..., height, width, 3]`; None where there is no
        way back.
      params: what was fitted, to be kept with the latents.
    """

    shape: tuple[int, ...]
    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray] | None
    params: dict[str, np.ndarray]


def make(
    vision: VisionConfig, side: int, whole: bool, fit_on: Callable[[], np.ndarray]
) -> Encoder:
    """The encoder that `vision` names.

    Args:
      vision: `encoder` and what belongs to it, `channels`.
      side: of the squares, pixels.
      whole: encode a frame as a vector, instead of a square of features.
      fit_on: loads uint8 `[pictures, side, side, channels]` to fit components to; used
        by "pca" alone.

    Raises:
      UserError: if weights cannot be read or do not fit, or a side does not divide.
    """
    if vision.encoder == "none":
        return _pixels((side, side, vision.channels))
    if vision.encoder == "pca":
        patch = side if whole else vision.encoder_patch
        if side % patch:
            raise UserError(
                f"vision.encoder_patch is {patch}, which does not divide pictures of "
                f"{side} x {side} pixels; change it or vision.size"
            )
        return principal(fitted(fit_on(), patch, vision.encoder_features), side)
    if vision.encoder == "vae":
        return _autoencoder(vision, side)
    return _features(vision, side, whole)


def encode_all(encoder: Encoder, clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Encodes pictures or clips, some at a time: pixels are not kept longer.

    Args:
      encoder: what encodes them.
      clips: uint8 `[frames, side, side, channels]` of each.

    Yields:
      `[frames, *shape]` of each.
    """
    group: list[np.ndarray] = []
    for clip in clips:
        group.append(clip)
        if sum(map(len, group)) >= _GROUP:
            yield from _encode_together(encoder, group)
            group = []
    if group:
        yield from _encode_together(encoder, group)


def encode_items(
    encoder: Encoder, clips: Iterable[tuple[int, Clip]]
) -> Iterator[tuple[int, float, np.ndarray]]:
    """Encodes numbered pictures or clips.

    Args:
      encoder: what encodes them.
      clips: number and pixels of each.

    Yields:
      Number, seconds between frames and `[frames, *shape]` of each.
    """
    waiting: deque[tuple[int, float]] = deque()

    def pixels() -> Iterator[np.ndarray]:
        for number, clip in clips:
            waiting.append((number, clip.seconds))
            yield clip.pixels

    for frames in encode_all(encoder, pixels()):
        yield *waiting.popleft(), frames


def _encode_together(encoder: Encoder, clips: list[np.ndarray]) -> list[np.ndarray]:
    encoded = encoder.encode(np.concatenate(clips))
    ends = np.cumsum([len(clip) for clip in clips])
    # Copies: a part of an array would keep the whole of it in memory.
    return [part.copy() for part in np.split(encoded, ends[:-1])]


def fitted(pixels: np.ndarray, patch: int, features: int) -> dict[str, np.ndarray]:
    """Principal components of patches, and what makes their mean square 1.

    Args:
      pixels: uint8 `[pictures, side, side, channels]`.
      patch: side of a patch, pixels.
      features: components.

    Returns:
      `mean` and `components` as `models.encoders.patch.fit_pca`, `scale` `[]`.
    """
    from ebt_jax.models.encoders import patch as components

    floats = to_floats(pixels)
    params = components.fit_pca(floats, patch, features)
    latents = np.asarray(components.encode(params, jnp.asarray(floats)))
    scale = np.sqrt(np.mean(np.square(latents, dtype=np.float64)))
    return {**params, "scale": np.array(max(scale, 1e-6), np.float32)}


def principal(params: dict[str, np.ndarray], side: int) -> Encoder:
    """The encoder of `fitted` components, for pictures of so many pixels a side."""
    from ebt_jax.models.encoders import patch as components

    features, patch, _, _ = params["components"].shape
    scale = params["scale"]

    encode = jax.jit(lambda images: components.encode(params, images) / scale)

    def decode(latents: np.ndarray) -> np.ndarray:
        return to_pixels(
            np.asarray(components.decode(params, jnp.asarray(latents * scale)))
        )

    shape = side // patch, side // patch, features
    return Encoder(shape, _batched(encode, _GROUP), decode, params)


def _pixels(shape: tuple[int, int, int]) -> Encoder:
    return Encoder(shape, lambda pixels: pixels, to_pixels, {})


def _autoencoder(vision: VisionConfig, side: int) -> Encoder:
    from ebt_jax.models.encoders.vae import load_vae
    from ebt_jax.models.encoders.weights import compiled

    vae = load_vae(vision.encoder_path)
    factor, channels = vae.config.factor, vae.config.channels
    if side % factor:
        raise UserError(
            f"pictures have {side} x {side} pixels, but the autoencoder needs a "
            f"multiple of {factor}; set vision.size to one"
        )
    if vision.channels != channels:
        raise UserError(
            f"vision.channels is {vision.channels}, but the autoencoder "
            f"{vision.encoder_path} takes {channels}; set it to that"
        )
    scale = vision.encoder_scale
    encode = compiled(functools.partial(vae.encode, scale=scale), vae.params)
    decode_batch = compiled(functools.partial(vae.decode, scale=scale), vae.params)

    def decode(latents: np.ndarray) -> np.ndarray:
        shape = latents.shape[-3:]
        flat = in_batches(decode_batch, _BATCH, np.reshape(latents, (-1, *shape)))
        return to_pixels(flat.reshape(*latents.shape[:-3], *flat.shape[1:]))

    shape = side // factor, side // factor, vae.config.latent
    return Encoder(shape, _batched(encode, _BATCH), decode, {})


def _features(vision: VisionConfig, side: int, whole: bool) -> Encoder:
    """DINOv2's: of whole frames as vectors, or of patches as squares of features."""
    from ebt_jax.models.encoders.dinov2 import imagenet_normalised, load_dinov2
    from ebt_jax.models.encoders.weights import compiled

    if vision.channels != 3:
        raise UserError(
            f"vision.channels is {vision.channels}, but DINOv2 takes 3; set it to that"
        )
    dino = load_dinov2(vision.encoder_path, vision.encoder_size)
    patch, width = dino.config.patch, dino.config.width
    if side % patch:
        raise UserError(
            f"pictures have {side} x {side} pixels, but DINOv2 needs a multiple of "
            f"{patch}; set vision.size to one"
        )

    def encode(params: Any, images: jax.Array) -> jax.Array:
        features = dino.encode(params, imagenet_normalised(images))
        return features.image[:, None, None] if whole else features.patches

    shape = (1, 1, width) if whole else (side // patch, side // patch, width)
    return Encoder(shape, _batched(compiled(encode, dino.params), _BATCH), None, {})


def _batched(
    encode: Callable[[np.ndarray], jax.Array], size: int
) -> Callable[[np.ndarray], np.ndarray]:
    as_floats = lambda pixels: encode(to_floats(pixels))
    return functools.partial(in_batches, as_floats, size)


def in_batches(
    function: Callable[[np.ndarray], jax.Array], size: int, rows: np.ndarray
) -> np.ndarray:
    """Applies a function to some rows at a time, always as many: compiled once.

    Args:
      function: of an array of `size` rows.
      size: rows at a time.
      rows: `[rows, ...]`.
    """
    done = []
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        filled = np.zeros((size, *batch.shape[1:]), batch.dtype)
        filled[: len(batch)] = batch
        done.append(np.asarray(function(filled))[: len(batch)])
    return np.concatenate(done)
