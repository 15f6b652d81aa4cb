"""Transformer blocks, as Flax Linen modules used through `init` and `apply` alone.

Llama-style: pre-norm, rotary positions, gated feed-forward, no biases. One block serves
two streams with the same weights. The context stream is an ordinary causal transformer.
In the candidate stream each position attends a part of the context and itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebt_jax.models.attention import Visible, attend, attend_in_pieces, rotate
from ebt_jax.models.config import ModelConfig

NORM_EPS = 1e-5  # sets the gain on small candidates; the published step sizes need it

# Plain normal, as torch.nn.init.xavier_normal_; Flax's own xavier_normal is truncated.
xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "elu": jax.nn.elu,
}


class Norm(nn.Module):
    """Normalisation over features: rms, layer, dyt (Zhu et al. 2025) or none."""

    kind: str
    dyt_alpha: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `[..., dim]`; statistics in float32."""
        if self.kind == "none":
            return x
        dim = x.shape[-1]
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "dyt":
            alpha = self.param("alpha", nn.initializers.constant(self.dyt_alpha), (1,))
            h = jnp.tanh(_like(alpha, h) * h)
        else:
            if self.kind == "layer":
                h = h - h.mean(axis=-1, keepdims=True)
            h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + NORM_EPS)
        h = h * _like(self.param("scale", nn.initializers.ones, (dim,)), h)
        if self.kind in ("layer", "dyt"):
            h = h + _like(self.param("bias", nn.initializers.zeros, (dim,)), h)
        return h.astype(x.dtype)


class Fused(nn.Module):
    """Several linear maps of the same input as one product.

    The kernel is `[dim, parts, features]`, each part initialised as a map of its own.
    """

    config: ModelConfig
    parts: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """Maps `[..., dim]` to so many parts `[..., features]`."""

        def init(key: jax.Array) -> jax.Array:
            keys = jax.random.split(key, self.parts)
            shape = x.shape[-1], self.features
            return jnp.stack([xavier_normal(k, shape) for k in keys], axis=1)

        kernel = self.param("kernel", init)
        dtype = _compute(self.config) or jnp.promote_types(x.dtype, kernel.dtype)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        if not self.config.fused:  # where features are split, so is each product
            return [x @ kernel[:, part] for part in range(self.parts)]
        # With the parts on an axis of their own XLA would copy the transposed kernel
        # for the derivative by x, which contracts over two axes then.
        product = jnp.einsum("...d,df->...f", x, kernel.reshape(len(kernel), -1))
        return jnp.split(product, self.parts, axis=-1)


class Block(nn.Module):
    """One transformer block for both streams.

    A landscape's condition, where there is one, shifts and scales what enters
    attention and feed-forward, and gates what leaves them (adaLN, Peebles & Xie 2023).

    Attributes:
      config: the model's.
      piece: for forward passes over a context, see `attend_in_pieces`; 0: as
        `config.attention_block` says.
    """

    config: ModelConfig
    piece: int = 0

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        self.attention_norm = Norm(c.norm, c.dyt_alpha)
        self.mlp_norm = Norm(c.norm, c.dyt_alpha)
        self.qkv, self.out = Fused(c, 3, c.width), dense(c, c.width)
        self.gate_up, self.down = Fused(c, 2, c.hidden), dense(c, c.width)
        if c.conditioning in ("adaln", "adaln_zero"):
            self.modulation = modulation(c, 6)

    def __call__(
        self,
        x: jax.Array,
        rotation: jax.Array,
        visible: Visible,
        condition: jax.Array | None,
        past: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Either stream.

        Args:
          x: `[batch, seq, dim]`.
          rotation: of x's positions, see `attention.rotation`.
          visible: which keys each position of x sees.
          condition: `[dim]` or None.
          past: keys and values `[batch, heads, keys, head_dim]` of the context, which
            positions of x see besides themselves. None where x is the context and its
            positions see each other.

        Returns:
          `[batch, seq, dim]`, and its keys and values `[batch, heads, seq, head_dim]`.
        """
        block = self.config.attention_block
        before, after = self._modulate(condition)
        projected = self.qkv(before[0](self.attention_norm(x)))
        query, key, value = (self._heads(part) for part in projected)
        query, own = rotate(query, rotation), (rotate(key, rotation), value)
        if past is not None:
            attended = attend(query, *past, visible, own, block)
        elif self.piece:
            attended = attend_in_pieces(query, *own, visible, self.piece)
        else:
            attended = attend(query, *own, visible, block=block)
        merged = jnp.swapaxes(attended, 1, 2).reshape(x.shape)
        x = x + after[0](self.out(merged))
        return x + after[1](self._mlp(before[1](self.mlp_norm(x)))), own

    def _mlp(self, h: jax.Array) -> jax.Array:
        gate, up = self.gate_up(h)
        return self.down(ACTIVATIONS[self.config.activation](gate) * up)

    def _heads(self, h: jax.Array) -> jax.Array:
        h = h.reshape(*h.shape[:-1], self.config.heads, self.config.head_dim)
        return jnp.swapaxes(h, 1, 2)

    def _modulate(self, condition: jax.Array | None) -> Any:
        """Functions before and after attention and feed-forward."""
        if condition is None:
            return (_identity, _identity), (_identity, _identity)
        parts = jnp.split(self.modulation(jax.nn.silu(condition)), 6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        return (
            (
                lambda h: h * (1 + _like(scale_a, h)) + _like(shift_a, h),
                lambda h: h * (1 + _like(scale_m, h)) + _like(shift_m, h),
            ),
            (lambda h: _like(gate_a, h) * h, lambda h: _like(gate_m, h) * h),
        )


def dense(config: ModelConfig, features: int) -> nn.Dense:
    """A linear map without bias, Xavier-normal, in the compute dtype."""
    return nn.Dense(
        features, use_bias=False, dtype=_compute(config), kernel_init=xavier_normal
    )


def projection(config: ModelConfig, features: int) -> nn.Dense:
    """A linear map with a bias, as `dense` else."""
    return nn.Dense(features, dtype=_compute(config), kernel_init=xavier_normal)


def modulation(config: ModelConfig, parts: int) -> nn.Dense:
    """The linear map from a condition to shifts, scales and gates."""
    zero = config.conditioning == "adaln_zero"
    return nn.Dense(
        parts * config.width,
        dtype=_compute(config),
        kernel_init=nn.initializers.zeros if zero else xavier_normal,
    )


def embedding(config: ModelConfig, entries: int) -> nn.Embed:
    """A table `[entries, dim]`, N(0, 1)."""
    return nn.Embed(
        entries,
        config.width,
        dtype=_compute(config),
        embedding_init=nn.initializers.normal(1.0),
    )


def rematerialized(config: ModelConfig, layer: Callable, scanned: bool) -> Callable:
    """A layer that is recomputed in the backward pass, as much as the config says.

    Args:
      config: the model's.
      layer: a function that runs a block.
      scanned: whether it runs within a loop.
    """
    if config.remat == "none":
        return layer
    policies = jax.checkpoint_policies
    keep = {
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[config.remat]
    # Within a loop there is nothing for XLA to merge the recomputation with.
    return jax.checkpoint(layer, policy=keep, prevent_cse=not scanned)


def init_of(module: nn.Module, key: jax.Array, *inputs: Any) -> Any:
    """A module's parameters, a plain dict, for inputs like these."""
    return module.init(key, *inputs).get("params", {})


def apply(module: nn.Module, params: Any, name: str, *inputs: Any) -> Any:
    """What a module whose parameters are `params[name]` makes of inputs."""
    return module.apply({"params": params[name]}, *inputs)


def _compute(config: ModelConfig) -> Any:
    """None lets float64 parameters compute in float64, for numerical tests."""
    return jnp.bfloat16 if config.dtype == "bfloat16" else None


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _identity(x: jax.Array) -> jax.Array:
    return x
