"""Where arrays live: one mesh axis, `data`, over which the batch is split."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ebt_jax.errors import UserError
from ebt_jax.training.config import MeshConfig, TrainConfig

NumpyBatch = dict[str, np.ndarray]


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with the axis `data`.

    Raises:
      UserError: if more devices are asked for than there are.
    """
    devices = jax.devices()
    count = len(devices) if config.data == -1 else config.data
    if count > len(devices):
        raise UserError(
            f"mesh.data is {count}, but there are {len(devices)} devices "
            f"({devices[0].platform}); lower it, or set it to -1 to use all"
        )
    # Auto: the compiler chooses the sharding of what is between inputs and outputs.
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count]
    )


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Checks that every device gets equally many sequences.

    Raises:
      UserError: if not.
    """
    devices = mesh.shape["data"]
    part = config.batch_size // config.accumulation
    if part % devices:
        whole = (
            f"train.batch_size is {config.batch_size}"
            if config.accumulation == 1
            else f"train.batch_size / train.accumulation is {config.batch_size} / "
            f"{config.accumulation} = {part}"
        )
        raise UserError(
            f"{whole}, which the {devices} devices of mesh.data do not divide; make it "
            f"a multiple of {devices}, or set mesh.data to use fewer devices"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def global_batch(batch: NumpyBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays of a batch of which each process holds its own sequences.

    Args:
      batch: arrays `[sequences of this process, ...]`.
      mesh: of `make_mesh`.

    Returns:
      Arrays `[sequences of all processes, ...]`, split over `data`.
    """
    sharding = batch_sharded(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(values))
        for name, values in batch.items()
    }
