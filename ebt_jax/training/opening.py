"""The beginning of a run: what is checked first, said first and kept for the next."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from ebt_jax.errors import UserError
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config
from ebt_jax.training.monitor import check_logging
from ebt_jax.training.sharding import check_batch, check_replay, left_whole, make_mesh


def check_setup(config: Config) -> Mesh:
    """The mesh of a run, once what needs neither data nor model is checked.

    Raises:
      UserError: for devices, batch, replay or logging that cannot be had.
    """
    check_logging(config.log)
    mesh = make_mesh(config.mesh)
    check_batch(config.train, mesh, config.data.context)
    if config.model.space in ("image", "board") and mesh.shape["seq"] > 1:
        raise UserError(
            f"mesh.seq is {mesh.shape['seq']}, but {config.model.unit} are no "
            "sequences; set it to 1 and use mesh.data or mesh.fsdp"
        )
    check_replay(config.replay, config.train, mesh)
    return mesh


def introduction(config: Config, params: PyTree, mesh: Mesh) -> str:
    """What is going to be trained, on what."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = mesh.devices.flat[0]
    axes = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    arranged = f" ({', '.join(axes)})" if axes else ""
    text = (
        f"model    {config.model.kind} {config.model.size}, {count:,} parameters\n"
        f"data     {_per_step(config)} per step\n"
        f"devices  {mesh.size} x {device.device_kind}{arranged}, jax "
        f"{jax.__version__}; the first step takes longer, it is compiled"
    )
    return "\n".join([text, *(f"warning: {line}" for line in left_whole(params, mesh))])


def _per_step(config: Config) -> str:
    """What an update is made from."""
    batch, data, model = config.train.batch_size, config.data, config.model
    if model.space == "board":
        low, high = config.board.givens
        cells = f"{model.vocab_size} x {model.vocab_size} cells"
        return f"{batch} boards of {cells}, {low} to {high} of them given,"
    if model.space == "text":
        count = f"{batch} x {data.context} tokens"
        return f"{data.path}, tokenizer {data.tokenizer}, {count}"
    if model.space == "video":
        numbers = f"frames of {model.frame_size} numbers"
        return f"{data.path}, {batch} x {data.context} {numbers}"
    side = f"{model.image_size} x {model.image_size} x {model.channels}"
    return f"{data.path}, {batch} images of {side} numbers"


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, for the next start.

    A cache that is set already, as by JAX_COMPILATION_CACHE_DIR, stays. Where the
    directory cannot be made, there is no cache: that is no reason to fail.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(root) / "ebt_jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
