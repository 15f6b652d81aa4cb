"""Transformer blocks, as Flax Linen modules used through `init` and `apply` alone.

Llama-style: pre-norm, rotary positions on interleaved pairs, gated feed-forward, no
biases. One block serves two streams with the same weights. The context stream is an
ordinary causal transformer. In the candidate stream each position attends a part of
the context and itself, and no other candidate (paper, appendix C.3).

Everything here is twice differentiable: a meta-gradient differentiates attention a
second time, which fused attention kernels do not support.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ebt_jax.models.config import ModelConfig

NORM_EPS = 1e-5  # sets the gain on small candidates; the published step sizes need it
ROTARY_BASE = 10000.0

# Plain normal, as torch.nn.init.xavier_normal_; Flax's own xavier_normal is truncated.
xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "elu": jax.nn.elu,
}


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding on interleaved pairs (Su et al. 2021).

    Args:
      x: `[..., seq, heads, head_dim]`, head_dim even.
      positions: `[..., seq]`, broadcast against the leading axes of x.
    """
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=dtype) / half)
    angle = jnp.einsum("...s,f->...sf", positions.astype(dtype), frequency)
    leading = (1,) * (x.ndim - angle.ndim - 1)
    angle = angle.reshape(leading + angle.shape)[..., None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs = x.astype(cos.dtype).reshape(*x.shape[:-1], half, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    own: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention in float32, over masked keys and each query's own key.

    Args:
      query: `[batch, seq, heads, head_dim]`.
      keys: `[batch, keys, heads, head_dim]`.
      values: like keys.
      mask: bool, broadcastable to `[batch, heads, seq, keys]`; True where visible.
      own: key and value `[batch, seq, heads, head_dim]` that query j alone sees.

    Returns:
      `[batch, seq, heads, head_dim]`.
    """
    accumulator = jnp.promote_types(query.dtype, jnp.float32)
    scale = query.shape[-1] ** -0.5
    scores = scale * jnp.einsum(
        "bqhd,bkhd->bhqk", query, keys, preferred_element_type=accumulator
    )
    scores = jnp.where(mask, scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    if own is not None:
        own_score = scale * jnp.einsum(
            "bqhd,bqhd->bhq", query, own[0], preferred_element_type=accumulator
        )
        top = jnp.maximum(top, own_score[..., None])
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1)
    if own is not None:
        own_weight = jnp.exp(own_score - top[..., 0])
        total = total + own_weight
    out = jnp.einsum(
        "bhqk,bkhd->bqhd",
        (weights / total[..., None]).astype(values.dtype),
        values,
        preferred_element_type=accumulator,
    )
    if own is not None:
        share = jnp.swapaxes(own_weight / total, 1, 2)[..., None]
        out = out + share * own[1].astype(accumulator)
    return out.astype(query.dtype)


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


class Block(nn.Module):
    """One transformer block for both streams.

    A landscape's condition, where there is one, shifts and scales what enters
    attention and feed-forward, and gates what leaves them (adaLN, Peebles & Xie 2023).
    """

    config: ModelConfig

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        self.attention_norm = Norm(c.norm, c.dyt_alpha)
        self.mlp_norm = Norm(c.norm, c.dyt_alpha)
        self.query, self.key, self.value, self.out = (
            dense(c, c.width) for _ in range(4)
        )
        self.gate, self.up = dense(c, c.hidden), dense(c, c.hidden)
        self.down = dense(c, c.width)
        if c.conditioning in ("adaln", "adaln_zero"):
            self.modulation = modulation(c, 6)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        condition: jax.Array | None,
        past: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Either stream.

        Args:
          x: `[batch, seq, dim]`.
          positions: rotary positions, `[seq]` or `[batch, seq]`.
          mask: bool, broadcastable to `[batch, heads, seq, keys]`; True where visible.
          condition: `[dim]` or None.
          past: keys and values `[batch, keys, heads, head_dim]` of the context, of
            which each position of x sees what the mask shows, and itself besides. None
            where x is the context and its positions see each other.

        Returns:
          `[batch, seq, dim]`, and its keys and values `[batch, seq, heads, head_dim]`.
        """
        before, after = self._modulate(condition)
        h = before[0](self.attention_norm(x))
        query = rotate(self._heads(self.query(h)), positions)
        own = rotate(self._heads(self.key(h)), positions), self._heads(self.value(h))
        if past is None:
            attended = attend(query, *own, mask)
        else:
            attended = attend(query, *past, mask, own)
        x = x + after[0](self.out(_merge(attended)))
        return x + after[1](self._mlp(before[1](self.mlp_norm(x)))), own

    def _mlp(self, h: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        return self.down(activation(self.gate(h)) * self.up(h))

    def _heads(self, h: jax.Array) -> jax.Array:
        return h.reshape(*h.shape[:-1], self.config.heads, self.config.head_dim)

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


def _compute(config: ModelConfig) -> Any:
    """None lets float64 parameters compute in float64, for numerical tests."""
    return jnp.bfloat16 if config.dtype == "bfloat16" else None


def _merge(heads: jax.Array) -> jax.Array:
    return heads.reshape(*heads.shape[:-2], -1)


def _like(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def _identity(x: jax.Array) -> jax.Array:
    return x
