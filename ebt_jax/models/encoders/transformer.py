"""The transformer block that DINOv2 and CLIP share, and its published names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax

from ebt_jax.models.encoders.weights import Entry, Weights, linear, norm

HEAD_WIDTH = 64  # in every published size

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class BlockConfig(NamedTuple):
    """Sizes and variants of a block.

    Attributes:
      width: features of a token.
      hidden: features between the two maps of the MLP.
      activation: "gelu" or "quick_gelu".
      eps: of the layer normalisations.
      causal: whether a token attends itself and those before alone.
      layer_scale: whether the outputs of attention and MLP are scaled by feature.
    """

    width: int
    hidden: int
    activation: str
    eps: float
    causal: bool
    layer_scale: bool


class Block(nn.Module):
    """Pre-norm attention and MLP, with biases."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, seq, width]` to the same."""
        c = self.config
        h = layer_norm(c.eps, "norm_0")(x)
        heads = (*x.shape[:-1], c.width // HEAD_WIDTH, HEAD_WIDTH)
        query, key, value = (
            nn.Dense(c.width, name=name)(h).reshape(heads)
            for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value, is_causal=c.causal)
        h = nn.Dense(c.width, name="out")(h.reshape(x.shape))
        x = x + self._scaled(h, "scale_0")
        h = nn.Dense(c.hidden, name="mlp_0")(layer_norm(c.eps, "norm_1")(x))
        h = nn.Dense(c.width, name="mlp_1")(ACTIVATIONS[c.activation](h))
        return x + self._scaled(h, "scale_1")

    def _scaled(self, h: jax.Array, name: str) -> jax.Array:
        if not self.config.layer_scale:
            return h
        scale = self.param(name, nn.initializers.ones, (self.config.width,))
        return h * scale.reshape(1, 1, -1)


class BlockNames(NamedTuple):
    """What a published layout calls the parts of a block.

    Attributes:
      norms: before attention and MLP.
      qkv: the maps to query, key and value; one where theirs is one for all.
      out: the map after attention.
      mlp: its two maps.
      scales: the layer scales of attention and MLP, or none.
      joint: what is between the name in `qkv` and "weight" or "bias".
    """

    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    mlp: tuple[str, str]
    scales: tuple[str, ...] = ()
    joint: str = "."


def block_entries(
    theirs: str, path: tuple[str, ...], names: BlockNames
) -> Iterator[Entry]:
    """Every array of a block.

    Args:
      theirs: the published block's name, with a dot at its end.
      path: of our block.
      names: of the block's parts.
    """
    for i in range(2):
        yield from norm(theirs + names.norms[i], (*path, f"norm_{i}"))
        yield from linear(theirs + names.mlp[i], (*path, f"mlp_{i}"))
    for i, name in enumerate(names.scales):
        yield Entry(theirs + name, (*path, f"scale_{i}"))
    yield from linear(theirs + names.out, (*path, "out"))
    parts = 3 // len(names.qkv)
    for i, ours in enumerate(("query", "key", "value")):
        name = names.qkv[i // parts]
        for entry in linear(theirs + name, (*path, ours), joint=names.joint):
            yield entry._replace(part=(i % parts, parts))


def check_width(weights: Weights, name: str, width: int) -> None:
    """Refuses a width that does not split into heads.

    Raises:
      UserError: naming the array that the width was read from.
    """
    if width % HEAD_WIDTH:
        weights.refuse(
            f"has {name!r} of width {width}, which does not split into heads of "
            f"{HEAD_WIDTH}"
        )


def layer_norm(eps: float, name: str) -> nn.LayerNorm:
    """A layer normalisation with scale and bias, its variance computed exactly."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)
