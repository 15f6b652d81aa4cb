"""What a config costs, without running it: parameters, FLOPs, memory.

The training step is traced and compiled from shapes alone; no array is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import partial_eval

from ebt_jax.data import tokenizers
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config, resolve
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.sharding import check_batch, make_mesh
from ebt_jax.training.step import init_state, make_step

# Parameters that grow with the vocabulary; they are not part of N.
VOCABULARY = ("embed", "candidate_embed", "output")


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
    check_batch(config.train, mesh)
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


def count_parameters(params: PyTree) -> int:
    """How many numbers there are in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_non_embedding(params: PyTree) -> int:
    """N: all parameters but the vocabulary matrices."""
    return count_parameters(
        {name: tree for name, tree in params.items() if name not in VOCABULARY}
    )


def analytic_flops(config: Config, params: PyTree) -> tuple[str, float]:
    """FLOPs of training per token by formula, attention scores left out.

    With N non-embedding parameters, V the vocabulary, D the width, T refinement steps
    and C encoded contexts (one for each landscape, or one for all where the context
    does not depend on it): 6 N C + 12 N T + 10 V D T with `backprop="per_step"`, and
    6 N + 6 V D for Transformer++.

    Args:
      config: a resolved config.
      params: parameters, or their shapes.

    Returns:
      The formula and its value.
    """
    inner = count_non_embedding(params)
    matrix = config.model.vocab_size * config.model.width
    if config.model.kind == "transformer_pp":
        return "6 N + 6 V D", 6.0 * inner + 6.0 * matrix
    steps = config.refine.num_steps
    shared = config.model.conditioning == "default"
    contexts = 1 if shared else config.refine.num_landscapes
    value = 6.0 * inner * contexts + 12.0 * inner * steps + 10.0 * matrix * steps
    return f"6 N x {contexts} + 12 N x {steps} + 10 V D x {steps}", value


def count_flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    """FLOPs of the matrix multiplications that a traced program's results need.

    Twice the multiplications; the body of a scan as often as it runs, of a conditional
    its dearest branch, of a while loop, whose end is not known, once.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: jax.extend.core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += 2.0 * math.prod(result) * math.prod(left[i] for i in contracted)
            continue
        inner = [_count(body) for body in _bodies(params.values())]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            repeats = params["length"] if equation.primitive.name == "scan" else 1
            total += repeats * sum(inner)
    return total


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _bodies(values: Iterable[Any]) -> Iterable[jax.extend.core.Jaxpr]:
    """The programs among the parameters of an equation."""
    for value in values:
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _bodies(value)


def _flops(
    config: Config, params: PyTree, traced: Any, compiled: Any, devices: int
) -> str:
    tokens = config.train.batch_size * config.data.context
    formula, value = analytic_flops(config, params)
    lines = [
        "FLOPs of a training step per token",
        f"  {count_flops(traced.jaxpr) / tokens:.3e}  matrix multiplications of the "
        "traced step, attention included",
        f"  {value:.3e}  by formula, attention left out: {formula}",
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
