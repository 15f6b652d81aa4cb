"""What a config costs, without running it: parameters, FLOPs, memory, communication.

The training step is traced and compiled from shapes alone; no array is made, and the
devices may be simulated.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from ebt_jax.evaluation.flops import (
    analytic_flops,
    count_flops,
    count_non_embedding,
    count_parameters,
    formula,
    tokens_per_sequence,
)
from ebt_jax.evaluation.planning import communication_table, memory_table
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config
from ebt_jax.training.objective import batch_shapes as whole_batch_shapes
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.resolve import scored_sequences
from ebt_jax.training.sharding import (
    batch_parts,
    batch_sharding,
    check_batch,
    check_replay,
    left_whole,
    make_mesh,
    parameter_specs,
    state_target,
)
from ebt_jax.training.step import init_state, make_step
from ebt_jax.training.task import resolved


def inspect(config: Config, memory_gib: float = 0) -> str:
    """Describes a run: parameters, and its step's FLOPs, memory and communication.

    Args:
      config: of the run, resolved or not. Its tokenizer is loaded, or its pictures;
        text is not.
      memory_gib: of a device, to be told whether it is enough; 0 not to be.

    Returns:
      Text of several lines.

    Raises:
      UserError: for a config that could not be trained.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.train, mesh, config.data.context)
    check_replay(config.replay, config.train, mesh)
    config = resolved(config)
    objective = build_objective(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, params)
    init = lambda: init_state(objective, optimizer, config.train.seed)
    state = state_target(jax.eval_shape(init), mesh)
    step = make_step(
        objective,
        optimizer,
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        mesh=mesh,
    )
    traced = step.trace(state, batch_shapes(config, mesh))
    compiled = traced.lower().compile()
    rows, devices = config.train.batch_size, mesh.size
    length = tokens_per_sequence(config)
    unit = {"image": "patches", "board": "cells"}.get(
        config.model.space, config.model.unit
    )
    parts = batch_parts(mesh)
    more = scored_sequences(config, parts) - rows
    replayed = f", {more // parts} more of them replayed" if more else ""
    return "\n\n".join(
        [
            parameter_table(params, mesh),
            f"mesh     {_named(mesh.shape)} ({mesh.devices.flat[0].platform})\n"
            f"batch    {rows} x {length} = {rows * length:,} {unit}, "
            f"{rows // parts} sequences per device{replayed}",
            _flops(config, params, traced.jaxpr, compiled, devices, parts),
            memory_table(config, state, mesh, compiled, memory_gib),
            communication_table(compiled.as_text(), params),
        ]
    )


def batch_shapes(
    config: Config, mesh: Mesh | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch: arrays `[batch, seq]`, and `index` `[batch]`.

    Args:
      config: of the run.
      mesh: that the batch is split over; None to leave that open.
    """

    def placed(s: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else batch_sharding(mesh, len(s.shape))
        return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)

    return jax.tree.map(placed, whole_batch_shapes(config))


def parameter_table(params: PyTree, mesh: Mesh) -> str:
    """One line for each parameter: path, shape, how it is split, count, MB; totals.

    Args:
      params: parameters, or their shapes.
      mesh: that they are split over.
    """
    rows = [("parameter", "shape", "split", "count", "MB")]
    specs = jax.tree.leaves(parameter_specs(params, mesh))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        size = math.prod(leaf.shape)
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        split = " ".join(axis or "-" for axis in spec)
        megabytes = f"{size * leaf.dtype.itemsize / 1e6:.2f}"
        rows.append((name, shape, split, f"{size:,}", megabytes))
    total, inner = count_parameters(params), count_non_embedding(params)
    if not any(row[2] for row in rows[1:]):
        rows = [(name, shape, "", *rest) for name, shape, _, *rest in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {split:<{widths[2]}}  "
        f"{count:>{widths[3]}}  {size:>{widths[4]}}"
        for name, shape, split, count, size in rows
    ]
    table += ["", f"total {total:,} parameters, {inner:,} of them non-embedding"]
    return "\n".join(table + left_whole(params, mesh))


def _flops(
    config: Config,
    params: PyTree,
    traced: Any,
    compiled: Any,
    devices: int,
    parts: int,
) -> str:
    tokens = scored_sequences(config, parts) * tokens_per_sequence(config)
    unit = {"image": "patch", "board": "cell"}.get(
        config.model.space, config.model.unit[:-1]
    )
    needed = analytic_flops(config, params)
    lines = [
        f"FLOPs of a training step per {unit}",
        f"  {count_flops(traced.jaxpr) / tokens:.3e}  matrix multiplications of the "
        "traced step",
        f"  {needed.total:.3e}  by formula, nothing computed twice: {formula(config)}",
        *(f"    {value:.3e}  {name}" for name, value in needed._asdict().items()),
    ]
    cost = compiled.cost_analysis()
    if cost and "flops" in cost:  # not every backend estimates
        lines.append(
            f"  {cost['flops'] * devices / tokens:.3e}  XLA's estimate; it counts a "
            "loop's body once, and layers and refinement steps are loops"
        )
    return "\n".join(lines)


def _named(shape: Any) -> str:
    return ", ".join(f"{name}={size}" for name, size in shape.items())
