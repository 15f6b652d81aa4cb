"""CLIP's text encoder (Radford et al. 2021).

    encoder = load_clip_text("clip-vit-large-patch14/model.safetensors")
    tokenizer = load_clip_bpe("bpe_simple_vocab_16e6.txt.gz")
    encode = weights.compiled(encoder.encode, encoder.params)
    encode(tokenizer.batch(["a pink flower"])).pooled    # [1, 768]

Of a whole CLIP model the image encoder is left out.
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
from ebt_jax.models.encoders.transformer import (
    ACTIVATIONS,
    Block,
    BlockConfig,
    BlockNames,
    block_entries,
    check_width,
    layer_norm,
)
from ebt_jax.models.encoders.weights import Entry, Weights, norm

_KIND = "a CLIP text encoder in the layout of transformers or of OpenAI"
_EPS = 1e-5
# Of whole CLIP models: the image encoder, and numbers that shapes tell as well.
_NOT_TEXT = (
    "visual.",
    "vision_model.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
)


class ClipTextConfig(NamedTuple):
    """Sizes and variants, as read from the weights.

    Attributes:
      layers: blocks.
      width: features of a token.
      hidden: features inside an MLP.
      vocab: tokens; the last one ends a text.
      context: tokens of a text at most.
      projected: features after the projection to the space shared with images; 0:
        the weights have none.
      activation: "quick_gelu" of OpenAI's models, or "gelu".
    """

    layers: int
    width: int
    hidden: int
    vocab: int
    context: int
    projected: int
    activation: str


class ClipTextFeatures(NamedTuple):
    """What CLIP says of texts.

    Attributes:
      tokens: after the last normalisation, `[batch, seq, width]`.
      pooled: that of the token which ends the text, `[batch, width]`.
      projected: `pooled` in the space shared with images, `[batch, projected]`, not
        normalised; None where the weights have no projection.
    """

    tokens: jax.Array
    pooled: jax.Array
    projected: jax.Array | None


class ClipText(NamedTuple):
    """A text encoder: its parameters and a pure function of them.

    Attributes:
      params: a nested dict.
      config: sizes and variants.
      encode: (params, tokens) -> ClipTextFeatures. Tokens int32 `[batch, seq]` as
        `clip_bpe.ClipBpe` makes them, seq at most `config.context`.
    """

    params: Any
    config: ClipTextConfig
    encode: Callable[..., ClipTextFeatures]


def load_clip_text(path: str, activation: str = "quick_gelu") -> ClipText:
    """The text encoder of a file of published weights.

    Args:
      path: `.safetensors`, `.npz` or a PyTorch file, of a text encoder or of a whole
        CLIP model, in the layout of transformers or of OpenAI (also OpenCLIP); a whole
        Stable Diffusion 1 checkpoint of CompVis will do.
      activation: "quick_gelu" for OpenAI's models, "gelu" for most of OpenCLIP's: the
        one thing that the weights do not tell.

    Raises:
      UserError: for another activation, if the file cannot be read, or naming the first
        array that is missing, not expected or of another shape.
    """
    if activation not in ACTIVATIONS:
        raise UserError(
            f"CLIP activation {activation!r} is unknown; choose "
            f"{' or '.join(ACTIVATIONS)}"
        )
    return from_weights(published.read(path, _KIND), activation)


def from_weights(weights: Weights, activation: str = "quick_gelu") -> ClipText:
    """The text encoder of published arrays, see `load_clip_text`."""
    weights = weights.below("cond_stage_model.transformer.").without(*_NOT_TEXT)
    layout = _OPENAI if _OPENAI.positions in weights.arrays else _transformers(weights)
    if layout is not _OPENAI:  # some files keep the positions' indices, too
        weights = weights.without(f"{layout.prefix}embeddings.position_ids")
    config = _read_config(weights, layout, activation)
    shapes = jax.eval_shape(
        _TextTransformer(config).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, config.context), jnp.int32),
    )
    params = published.convert(weights, _entries(config, layout), shapes["params"])
    return ClipText(params, config, functools.partial(_encode, config))


def _encode(config: ClipTextConfig, params: Any, tokens: jax.Array) -> ClipTextFeatures:
    length = tokens.shape[1]
    if not 1 <= length <= config.context:
        raise UserError(
            f"texts have {length} tokens, but the CLIP text encoder takes 1 to "
            f"{config.context}; cut them"
        )
    found: Any = _TextTransformer(config).apply({"params": params}, tokens)
    return found


class _TextTransformer(nn.Module):
    config: ClipTextConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> ClipTextFeatures:
        """The features of `[batch, seq]` tokens."""
        c = self.config
        zeros = nn.initializers.zeros
        table = self.param("tokens", zeros, (c.vocab, c.width))
        positions = self.param("positions", zeros, (c.context, c.width))
        x = jnp.asarray(table)[tokens] + positions[None, : tokens.shape[1]]
        block = BlockConfig(c.width, c.hidden, c.activation, _EPS, True, False)
        for layer in range(c.layers):
            x = Block(block, name=f"block_{layer}")(x)
        x = layer_norm(_EPS, "norm")(x)
        # The token which ends a text has the highest number; what follows pads.
        ends = jnp.argmax(tokens, axis=1)
        pooled = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
        projected = None
        if c.projected:
            projected = pooled @ self.param("projection", zeros, (c.width, c.projected))
        return ClipTextFeatures(x, pooled, projected)


# The published layouts.


class _Layout(NamedTuple):
    prefix: str
    tokens: str
    positions: str
    block: str
    norm: str
    projection: str
    projection_axes: tuple[int, ...] | None
    names: BlockNames


_OPENAI = _Layout(
    prefix="",
    tokens="token_embedding.weight",
    positions="positional_embedding",
    block="transformer.resblocks.{}.",
    norm="ln_final",
    projection="text_projection",
    projection_axes=None,
    names=BlockNames(
        norms=("ln_1", "ln_2"),
        qkv=("attn.in_proj",),
        out="attn.out_proj",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        joint="_",
    ),
)


def _transformers(weights: Weights) -> _Layout:
    """The names of transformers, which has two depths of them."""
    nested = any(name.startswith("text_model.") for name in weights.arrays)
    prefix = "text_model." if nested else ""
    return _Layout(
        prefix=prefix,
        tokens=f"{prefix}embeddings.token_embedding.weight",
        positions=f"{prefix}embeddings.position_embedding.weight",
        block=f"{prefix}encoder.layers.{{}}.",
        norm=f"{prefix}final_layer_norm",
        projection="text_projection.weight",
        projection_axes=published.LINEAR,
        names=BlockNames(
            norms=("layer_norm1", "layer_norm2"),
            qkv=tuple(f"self_attn.{part}_proj" for part in "qkv"),
            out="self_attn.out_proj",
            mlp=("mlp.fc1", "mlp.fc2"),
        ),
    )


def _read_config(weights: Weights, layout: _Layout, activation: str) -> ClipTextConfig:
    vocab, width = weights.shape(layout.tokens, 2)
    check_width(weights, layout.tokens, width)
    first = f"{layout.block.format(0)}{layout.names.mlp[0]}.weight"
    projected = 0
    if layout.projection in weights.arrays:
        projected = weights.shape(layout.projection, 2)[1 if layout is _OPENAI else 0]
    return ClipTextConfig(
        layers=weights.count(f"{layout.block}{layout.names.norms[0]}.weight"),
        width=width,
        hidden=weights.shape(first, 2)[0],
        vocab=vocab,
        context=weights.shape(layout.positions, 2)[0],
        projected=projected,
        activation=activation,
    )


def _entries(config: ClipTextConfig, layout: _Layout) -> Iterator[Entry]:
    """Every array of a text encoder."""
    yield Entry(layout.tokens, ("tokens",))
    yield Entry(layout.positions, ("positions",))
    for i in range(config.layers):
        theirs, path = layout.block.format(i), (f"block_{i}",)
        yield from block_entries(theirs, path, layout.names)
    yield from norm(layout.norm, ("norm",))
    if config.projected:
        yield Entry(layout.projection, ("projection",), layout.projection_axes)
