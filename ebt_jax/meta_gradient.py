"""The inner gradient of an energy, and how to differentiate it once more.

A refinement step uses g = d sum(E(params, context, c)) / dc, so a gradient through it
needs mixed second derivatives of the energy. They are symmetric: with u the cotangent
of g, d<g, u>/d(params, context, c) is the derivative, along u in candidate space, of
the full gradient of the energy. The rule here computes just that, with one `jax.jvp` of
one `jax.grad`, and remembers nothing but the inputs. Plain autodiff of the gradient
gives the same numbers at about twice the memory; it is the reference in the tests, and
what to use where the rule does not reach: forward-mode and repeated differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class EnergyFn(Protocol):
    """An energy: one scalar for each independent prediction, lower is better."""

    def __call__(
        self,
        params: PyTree,
        context: PyTree,
        candidate: PyTree,
        landscape: jax.Array,
        /,
    ) -> jax.Array:
        """Scores a candidate.

        Args:
          params: any pytree.
          context: what is predicted from, any pytree.
          candidate: what is scored; leaves `[*batch, ...]`.
          landscape: int32 scalar, which of the model's energy landscapes to use.

        Returns:
          Energies `[*batch]`. An energy may depend on its own candidate alone.
        """
        ...


def energy_and_gradient(energy_fn: EnergyFn, meta_gradient: str = "rule") -> Callable:
    """The energy and its inner gradient, with a derivative rule of its own.

    Args:
      energy_fn: see `EnergyFn`.
      meta_gradient: "rule" for one level of reverse differentiation through the
        result, "autodiff" for any differentiation at all.

    Returns:
      `(params, context, candidate, landscape, taken) -> (energy [*batch], gradient)`;
      where `taken` is a bool scalar and False, zeros and next to no work in both
      directions. It is None for a step that is always taken.
    """

    def total(params, context, candidate, landscape):
        energy = energy_fn(params, context, candidate, landscape)
        energy = energy.astype(accumulator(energy.dtype))
        return energy.sum(), energy

    def compute(params, context, candidate, landscape):
        (_, energy), gradient = jax.value_and_grad(total, argnums=2, has_aux=True)(
            params, context, candidate, landscape
        )
        return energy, gradient

    def primal(params, context, candidate, landscape, taken):
        return _if(taken, compute, params, context, candidate, landscape)

    if meta_gradient == "autodiff":
        return primal

    def forward(params, context, candidate, landscape, taken):
        inputs = jax.tree.map(
            lambda leaf: leaf.value, (params, context, candidate, landscape, taken)
        )
        return primal(*inputs), inputs

    def backward(inputs, cotangents):
        *arguments, landscape, taken = inputs
        energy_bar, along = cotangents
        floating, merge = _partition(arguments)

        def gradients(floating, weights=None):
            def weighted(floating):
                params, context, candidate = merge(floating)
                _, energy = total(params, context, candidate, landscape)
                return energy.sum() if weights is None else (weights * energy).sum()

            return jax.grad(weighted)(floating)

        def second_order(floating, energy_bar, along):
            # d<g, along>/d(inputs) is the derivative of the full gradient along
            # `along` in candidate space: mixed partials are symmetric.
            params, context, candidate = merge(floating)
            _, bars = jax.jvp(
                lambda c: gradients(_partition((params, context, c))[0]),
                (candidate,),
                (along,),
            )
            if energy_bar is not None:
                first_order = gradients(floating, energy_bar)
                bars = jax.tree.map(jnp.add, bars, first_order)
            return bars

        symbolic = jax.custom_derivatives.SymbolicZero
        along = jax.tree.map(
            lambda u, c: jnp.zeros_like(c) if isinstance(u, symbolic) else u,
            along,
            arguments[2],
            is_leaf=lambda u: isinstance(u, symbolic),
        )
        if isinstance(energy_bar, symbolic):
            energy_bar = None
        bars = _if(taken, second_order, floating, energy_bar, along)
        return (*merge(bars, zeros=True), _zero(landscape), _zero(taken))

    rule = jax.custom_vjp(primal)
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return rule


def with_gradient(
    value_and_gradient: Callable[[PyTree], tuple[tuple[jax.Array, Any], PyTree]],
    params: PyTree,
) -> tuple[jax.Array, Any]:
    """A value whose gradient is known as soon as it is computed.

    Args:
      value_and_gradient: `(params) -> ((value, aux), gradient)`, as of
        `jax.value_and_grad(..., has_aux=True)`.
      params: the point.

    Returns:
      `(value, aux)`. Differentiating the value gives `gradient`, once and in reverse;
      aux is constant.
    """

    @jax.custom_vjp
    def value(params: PyTree) -> tuple[jax.Array, Any]:
        return value_and_gradient(params)[0]

    def backward(gradient: PyTree, cotangents: tuple[jax.Array, Any]) -> tuple[PyTree]:
        return (jax.tree.map(lambda g: cotangents[0] * g, gradient),)

    value.defvjp(value_and_gradient, backward)
    return value(params)


def _if(taken, function, *arguments):
    """`function(*arguments)`, or zeros without computing it where `taken` is False."""
    if taken is None:
        return function(*arguments)
    shape = jax.eval_shape(function, *arguments)
    zeros = lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    return jax.lax.cond(taken, function, zeros, *arguments)


def _partition(tree):
    """Float leaves of a tree, and a function that puts others in their place.

    Gradients exist for float leaves alone; a context may hold integers and masks.
    """
    leaves, treedef = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]

    def merge(floating, zeros=False):
        left = iter(floating)
        rest = map(_zero, leaves) if zeros else leaves
        return treedef.unflatten(
            [next(left) if f else x for f, x in zip(is_float, rest, strict=True)]
        )

    return [x for f, x in zip(is_float, leaves, strict=True) if f], merge


def _zero(x):
    """The zero cotangent of something that has no gradient."""
    return None if x is None else np.zeros(np.shape(x), jax.dtypes.float0)


def accumulator(dtype: Any) -> Any:
    """The dtype energies are summed and compared in: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)
