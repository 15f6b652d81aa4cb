"""The optimiser: clipped AdamW in which the step size has a learning rate of its own.

With `name="muon"` the matrices in the blocks move along their orthogonalised momentum
instead (Jordan 2024), scaled to the length of Adam's steps (Liu et al. 2025, arXiv
2502.16982), so that learning rates and weight decay keep their meaning.

As in the published code: one global norm clips everything, the step size's gradient
included; the step size is never decayed and learns at `peak_lr * multiplier`; the
learning rates rise linearly for W updates and fall along a cosine until update T.
There, all cosines end at the same floor, peak_lr times the final fraction; here each
ends at that fraction of its own peak unless `final_lr_shared` is set.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ebt_jax.errors import UserError
from ebt_jax.objective_config import RefineSetup
from ebt_jax.refine import PyTree
from ebt_jax.training.config import OptimConfig

Schedule = Callable[[ArrayLike], jax.Array]

# Parameters of the refinement, not of the network: they stand at the top of the tree.
REFINEMENT = ("step_size", "noise_std")


def make_optimizer(
    config: OptimConfig, refine: RefineSetup, params: PyTree
) -> optax.GradientTransformation:
    """The optimiser of a run.

    Args:
      config: of a resolved config.
      refine: says whether the step size and the noise are learnt.
      params: the parameters, or their shapes; only the tree's structure is used.
    """
    groups = parameter_groups(params, refine)
    decayed = {
        name: _fill(tree, name not in REFINEMENT) for name, tree in params.items()
    }
    rates = {
        name: optax.scale_by_learning_rate(schedule)
        for name, schedule in learning_rates(config).items()
    }
    return optax.chain(
        clip_by_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _direction(config, params),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.partition({**rates, "fixed": optax.set_to_zero()}, groups),
    )


def _direction(config: OptimConfig, params: PyTree) -> optax.GradientTransformation:
    """What a gradient becomes before decay and learning rate."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.name == "adamw":
        return adam
    axes = lambda tree: jax.tree.map(_matrix_axes, tree)
    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map(_as_long_as_adams, updates)),
    )
    kinds = {
        name: jax.tree.map(lambda x: "muon" if x.ndim >= 3 else "adam", tree)
        if name == "blocks"
        else _fill(tree, "adam")
        for name, tree in params.items()
    }
    return optax.partition({"adam": adam, "muon": muon}, kinds)


def _matrix_axes(kernel: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    """Of `[layers, inputs, outputs]` or `[layers, inputs, parts, outputs]`.

    Layers and parts are maps of their own.
    """
    return optax.contrib.MuonDimensionNumbers(1, kernel.ndim - 1)


def _as_long_as_adams(update: jax.Array) -> jax.Array:
    """An orthogonal matrix, whose entries then have a root mean square of 0.2."""
    return update * 0.2 * max(update.shape[1], update.shape[-1]) ** 0.5


def clip_by_norm(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, by one factor for all arrays.

    Optax divides and multiplies each entry, which XLA does not repeat in each place
    where clipped gradients are used, so it stores them: another copy of the parameters.
    """

    def clip(gradient: PyTree, params: PyTree) -> PyTree:
        del params
        factor = limit / jnp.maximum(optax.tree.norm(gradient), limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), gradient)

    return optax.stateless(clip)


def parameter_groups(params: PyTree, refine: RefineSetup) -> PyTree:
    """Names what moves each parameter.

    Returns:
      The tree of `params` with a string in place of each array: `weights`, `step_size`
      (both names of `learning_rates`), or `fixed` for what is not learnt at all.
    """
    group = {
        "step_size": "step_size" if refine.step_size_learnable else "fixed",
        "noise_std": "weights" if refine.noise_learnable else "fixed",
    }
    return {
        name: _fill(tree, group[name] if name in REFINEMENT else "weights")
        for name, tree in params.items()
    }


def learning_rates(config: OptimConfig) -> dict[str, Schedule]:
    """The learning-rate schedules of `weights` and of the `step_size`.

    Each maps the number of updates already made, counted from 0, to the learning rate
    of the next one; arrays of counts give arrays, to be plotted.

    Raises:
      UserError: if `schedule_steps` is still to be resolved.
    """
    if not config.schedule_steps:
        raise UserError(
            "optim.schedule_steps is 0, which stands for train.steps; set it, or pass "
            "the config through ebt_jax.training.resolve"
        )
    peak = config.peak_lr
    step_size_peak = peak * config.step_size_lr_multiplier
    step_size_end = peak if config.final_lr_shared else step_size_peak
    return {
        "weights": warmup_cosine(config, peak, config.final_lr_fraction * peak),
        "step_size": warmup_cosine(
            config, step_size_peak, config.final_lr_fraction * step_size_end
        ),
    }


def warmup_cosine(config: OptimConfig, peak: float, end: float) -> Schedule:
    """Linear warm-up to `peak`, then a cosine to `end`, which it keeps.

    The learning rate of update k, counted from 1, with W = `warmup_steps` and
    T = `schedule_steps`, is peak k / W up to update W and
    end + (peak - end) (1 + cos(pi (k - W) / (T - W))) / 2 after it.
    """
    warmup, total = config.warmup_steps, config.schedule_steps

    def schedule(count: ArrayLike) -> jax.Array:
        k = jnp.asarray(count, jnp.float32) + 1
        done = jnp.clip((k - warmup) / max(total - warmup, 1), 0.0, 1.0)
        falling = end + (peak - end) * (1 + jnp.cos(jnp.pi * done)) / 2
        return jnp.where(k <= warmup, peak * k / max(warmup, 1), falling)

    return schedule


def _fill(tree: PyTree, value: object) -> PyTree:
    return jax.tree.map(lambda _: value, tree)
