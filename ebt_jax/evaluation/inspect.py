"""What a config costs, without running it: parameters, FLOPs, memory.

The training step is traced and compiled from shapes alone; no array is made.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax.data import tokenizers
from ebt_jax.evaluation.flops import (
    analytic_flops,
    count_flops,
    count_non_embedding,
    count_parameters,
    formula,
)
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config, resolve
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.sharding import check_batch, make_mesh
from ebt_jax.training.step import init_state, make_step


def inspect(config: Config) -> str:
    """Describes a run: its parameters, its training step's FLOPs and memory.

    Args:
      config: of the run, resolved or not. Its tokenizer is loaded, its data is not.

    Returns:
      Text of several lines.

    Raises:
      UserError: for a config that could not be trained.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.train, mesh, config.data.context)
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = resolve(config, tokenizer.vocab_size)
    objective = build_objective(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, params)
    state = jax.eval_shape(lambda: init_state(objective, optimizer, config.train.seed))
    step = make_step(
        objective,
        optimizer,
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        mesh=mesh,
    )
    traced = step.trace(state, batch_shapes(config))
    compiled = traced.lower().compile()
    rows, length, devices = config.train.batch_size, config.data.context, mesh.size
    return "\n\n".join(
        [
            parameter_table(params),
            f"mesh     {_named(mesh.shape)} ({mesh.devices.flat[0].platform})\n"
            f"batch    {rows} x {length} = {rows * length:,} tokens, "
            f"{rows // devices} sequences per device",
            _flops(config, params, traced.jaxpr, compiled, devices),
            _memory(compiled),
        ]
    )


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch: arrays `[batch, seq]`, and `index` `[batch]`."""
    rows, length = config.train.batch_size, config.data.context
    names = ["tokens", "targets"]
    if config.data.packing == "first_fit":
        names += ["segments", "positions"]
    shapes = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}
    shapes["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    shapes["index"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return shapes


def parameter_table(params: PyTree) -> str:
    """One line for each parameter: path, shape, count, MB; and the totals.

    Args:
      params: parameters, or their shapes.
    """
    rows = [("parameter", "shape", "count", "MB")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = math.prod(leaf.shape)
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append(
            (name, shape, f"{size:,}", f"{size * leaf.dtype.itemsize / 1e6:.2f}")
        )
    total, inner = count_parameters(params), count_non_embedding(params)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  "
        f"{count:>{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, count, size in rows
    ]
    table += ["", f"total {total:,} parameters, {inner:,} of them non-embedding"]
    return "\n".join(table)


def _flops(
    config: Config, params: PyTree, traced: Any, compiled: Any, devices: int
) -> str:
    tokens = config.train.batch_size * config.data.context
    needed = analytic_flops(config, params)
    lines = [
        "FLOPs of a training step per token",
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


def _memory(compiled: Any) -> str:
    memory = compiled.memory_analysis()
    if memory is None:
        return "memory   this backend does not tell"
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return "\n".join(
        [
            "memory of the compiled training step, per device",
            f"  arguments    {_size(memory.argument_size_in_bytes)}  state and batch",
            f"  outputs      {_size(memory.output_size_in_bytes)}  of which "
            f"{_size(memory.alias_size_in_bytes).strip()} in place of arguments",
            f"  temporaries  {_size(memory.temp_size_in_bytes)}",
            f"  together     {_size(peak)}",
        ]
    )


def _size(count: int) -> str:
    if count < 2**30:
        return f"{count / 2**20:>8.1f} MiB"
    return f"{count / 2**30:>8.1f} GiB"


def _named(shape: Any) -> str:
    return ", ".join(f"{name}={size}" for name, size in shape.items())
