"""What one device holds during a training step, and what devices send each other."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from ebt_jax.errors import UserError
from ebt_jax.evaluation.collectives import count_collectives
from ebt_jax.evaluation.flops import (
    count_parameters,
    entries,
    tokens_per_sequence,
)
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config
from ebt_jax.training.resolve import scored_sequences
from ebt_jax.training.sharding import batch_parts
from ebt_jax.training.step import TrainState

# Arrays `[predictions, vocab]` that a step works with at a time: p and z', or z' and
# softmax(z') (`categorical.py`); Transformer++ has logits and their gradient.
CANDIDATES = 2


def simulate_devices(count: int) -> None:
    """Makes JAX believe in so many CPU devices, to compile for; runs nothing.

    Args:
      count: devices of the machine that is planned for.

    Raises:
      UserError: if JAX has counted its devices already.
    """
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise UserError(
            f"{count} devices cannot be simulated any more: JAX has started with those "
            "that are there; plan in a process of its own"
        ) from error


def memory_table(
    config: Config, state: TrainState, mesh: Mesh, compiled: Any, memory_gib: float
) -> str:
    """Bytes of one device during a training step, by what they are for.

    What lives between steps follows from shapes and shardings. During a step come the
    temporaries that the compiler planned; what of them are whole parameters, gradients
    and candidates follows from shapes, and the rest are activations.

    Args:
      config: of the run.
      state: shapes with shardings.
      mesh: of the run.
      compiled: the training step.
      memory_gib: that a device has; 0 to say nothing about it.
    """
    held = {
        "parameters": local_bytes(state.params),
        "optimiser state": local_bytes(state.opt_state),
    }
    if config.replay.capacity:
        held["replay buffer"] = local_bytes(state.replay)
    lines = [
        "bytes per device",
        *(f"  {name:<19}{size_text(size)}" for name, size in held.items()),
    ]
    memory = compiled.memory_analysis()
    if memory is None:
        return "\n".join([*lines, "  this backend does not tell what a step takes"])
    temporary = memory.temp_size_in_bytes
    split = mesh.shape["fsdp"] > 1
    parts = {
        "gathered parameters": whole_bytes(state.params, mesh) if split else 0,
        "gradients": whole_bytes(state.params, mesh),
        "candidates": CANDIDATES * candidate_bytes(config, mesh),
        "kept candidates": kept_bytes(config, state, mesh),
    }
    parts["activations"] = max(temporary - sum(parts.values()), 0)
    between = sum(held.values())
    kept = memory.argument_size_in_bytes - between  # batch, counters
    total = between + max(kept, 0) + temporary
    rows, places = candidate_shape(config, mesh)
    notes = {
        "gathered parameters": "for the time of a step",
        "gradients": "whole, before they are summed",
        "candidates": f"{CANDIDATES} arrays {rows:,} x {places:,}, float32",
        "kept candidates": "of one part of a batch, on their way to the buffer",
        "activations": "what is left of the compiled step's temporaries, "
        f"{size_text(temporary).strip()}",
    }
    lines += [
        f"  {name:<19}{size_text(size)}  {notes[name]}"
        for name, size in parts.items()
        if size
    ]
    lines.append(f"  {'together':<19}{size_text(total)}  at the step's peak")
    if memory_gib:
        share = total / (memory_gib * 2**30)
        verdict = "fits" if share <= 1 else "DOES NOT FIT"
        lines.append(f"{verdict} in {memory_gib:g} GiB: {share:.0%} of it")
    return "\n".join(lines)


def communication_table(text: str, params: PyTree) -> str:
    """Collectives of one training step.

    Args:
      text: the compiled step.
      params: parameters, or their shapes, for comparison.
    """
    traffic = count_collectives(text)
    if not traffic:
        return "communication   none"
    whole = 4 * count_parameters(params)
    lines = [
        "communication of a step: arrays that each device takes part in, and their "
        f"bytes (all parameters are {size_text(whole).strip()})"
    ]
    for kind, (count, size) in traffic.items():
        lines.append(f"  {kind:<19}{size_text(size)}  in {count:,}")
    return "\n".join(lines)


def local_bytes(tree: PyTree) -> int:
    """Bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def whole_bytes(params: PyTree, mesh: Mesh) -> int:
    """Bytes of parameters that are gathered along the batch's axes."""

    def size(leaf: Any) -> int:
        spread = any(axis == "model" for axis in leaf.sharding.spec)
        split = mesh.shape["model"] if spread else 1
        return math.prod(leaf.shape) * leaf.dtype.itemsize // split

    return sum(size(leaf) for leaf in jax.tree.leaves(params))


def candidate_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
    """Predictions that a device works on at a time, and its part of their entries.

    Those of text are distributions over the vocabulary; of images a patch is one.
    """
    rows, text = local_sequences(config, mesh), config.model.space == "text"
    predictions = rows * tokens_per_sequence(config) // mesh.shape["seq"]
    if config.refine.block and config.model.kind == "ebt" and text:
        predictions = min(predictions, config.refine.block)
    numbers, split = entries(config), mesh.shape["model"] if text else 1
    return predictions, numbers if numbers % split else numbers // split


def candidate_bytes(config: Config, mesh: Mesh) -> int:
    """Bytes of one array of candidates on one device."""
    return 4 * math.prod(candidate_shape(config, mesh))


def local_sequences(config: Config, mesh: Mesh) -> int:
    """Sequences that a device takes at a time, replayed ones included."""
    parts = batch_parts(mesh)
    return scored_sequences(config, parts) // config.train.accumulation // parts


def kept_bytes(config: Config, state: TrainState, mesh: Mesh) -> int:
    """Bytes of the final candidates of one device, in the form of its buffer."""
    if not config.replay.capacity:
        return 0
    rows = config.replay.capacity // batch_parts(mesh)
    item = local_bytes(state.replay.candidate) // rows
    return item * local_sequences(config, mesh)


def size_text(count: int) -> str:
    """`   12.3 MiB`."""
    if count < 2**30:
        return f"{count / 2**20:>10,.1f} MiB"
    return f"{count / 2**30:>10,.1f} GiB"
