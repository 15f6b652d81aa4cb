"""The trained model that a verb works with, on the devices that it is to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ebt_jax.command import Flag, suggest
from ebt_jax.errors import UserError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from ebt_jax.data.tokenizers import Tokenizer
    from ebt_jax.interfaces import Objective
    from ebt_jax.refine import PyTree
    from ebt_jax.training.config import Config, MeshConfig
    from ebt_jax.training.sharding import NumpyBatch

MESH = Flag("mesh", "devices to use, such as data=4,model=2; else one")


class Trained(NamedTuple):
    """A checkpoint that is ready to predict.

    Attributes:
      path: the workdir.
      config: of the run, resolved.
      tokenizer: of the run.
      step: of the checkpoint.
      objective: what predicts.
      params: its parameters; matrices and caches are split over the mesh's `model`.
      mesh: where they are.
    """

    path: Path
    config: Config
    tokenizer: Tokenizer
    step: int
    objective: Objective
    params: PyTree
    mesh: Mesh


class Loaded(NamedTuple):
    """A checkpoint on its devices; see `Trained`, which it is part of."""

    step: int
    objective: Objective
    params: PyTree
    mesh: Mesh


def open_trained(
    path: Path, config: Config, mesh_text: str | None, step: int | None
) -> Trained:
    """Loads a checkpoint onto devices.

    Args:
      path: the workdir.
      config: of the run, see `workdir.open_workdir`.
      mesh_text: of --mesh.
      step: of the checkpoint; None for the newest good one.

    Raises:
      UserError: if there is no such checkpoint, or there are no such devices.
    """
    from ebt_jax.data import tokenizers
    from ebt_jax.training.resolve import resolve

    config = dataclasses.replace(config, mesh=parse_mesh(mesh_text))
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = resolve(config, tokenizer.vocab_size)
    loaded = load_resolved(path, config, step)
    return Trained(
        path,
        config,
        tokenizer,
        loaded.step,
        loaded.objective,
        loaded.params,
        loaded.mesh,
    )


def load_resolved(path: Path, config: Config, step: int | None) -> Loaded:
    """Loads a checkpoint of a resolved config onto the devices of its mesh.

    Args:
      path: the workdir.
      config: resolved, with the mesh to use.
      step: of the checkpoint; None for the newest good one.

    Raises:
      UserError: as `open_trained`.
    """
    from ebt_jax.training import checkpoint
    from ebt_jax.training.objective import build_objective
    from ebt_jax.training.sharding import make_mesh

    mesh = make_mesh(config.mesh)
    step = checkpoint.pick_step(path, step)
    objective = build_objective(config)
    return Loaded(
        step, objective, checkpoint.load_params(path, step, config, mesh), mesh
    )


def parse_mesh(text: str | None) -> MeshConfig:
    """What `--mesh` says: `data=4,model=2`; one device without it.

    Raises:
      UserError: for an axis that there is not, or a size that is not a number.
    """
    from ebt_jax.training.config import MeshConfig

    axes = ("data", "fsdp", "seq", "model")
    sizes = {"data": 1}
    for part in (text or "").split(","):
        name, _, size = part.partition("=")
        if not part:
            continue
        if name not in axes:
            raise UserError(
                f"--mesh names {name!r}{suggest(name, axes)} Known: {', '.join(axes)}"
            )
        if not size.removeprefix("-").isdecimal():
            raise UserError(
                f"--mesh has {part!r}; an axis takes a number of devices, as data=4"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


class Spread:
    """Batches of which each device gets its part, as often as wanted."""

    def __init__(self, batches: Iterable[NumpyBatch], mesh: Mesh) -> None:
        """Takes batches that can be iterated over more than once."""
        self._batches, self._mesh = batches, mesh

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """The batches on their devices."""
        from ebt_jax.training.sharding import global_batch

        return (global_batch(batch, self._mesh) for batch in self._batches)
