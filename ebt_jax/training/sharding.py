"""Where arrays live on many devices.

A mesh has four axes, each of which may be 1:

    data    the batch is split; parameters are copied
    fsdp    the batch is split; parameters and optimiser state are split, too, gathered
            when a step begins, and gradients are summed to where their part lives
    seq     the places of each sequence are split
    model   the vocabulary, heads and hidden features are split

`PARAMETERS` says how each parameter is split; the optimiser's state follows it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ebt_jax.errors import UserError
from ebt_jax.refine import PyTree
from ebt_jax.replay import ReplayConfig
from ebt_jax.training.config import MeshConfig, TrainConfig

P = PartitionSpec

NumpyBatch = dict[str, np.ndarray]

AXES = ("data", "fsdp", "seq", "model")
BATCH_AXES = ("data", "fsdp")  # over which sequences are split

# Each parameter matches exactly one pattern. Blocks are stacked `[layers, ...]`.
PARAMETERS = (
    ("embed/embedding", P("model", "fsdp")),  # [vocab, dim]
    ("candidate_embed/kernel", P("model", "fsdp")),  # [vocab, dim]
    ("output/kernel", P("fsdp", "model")),  # [dim, vocab]
    ("frame_embed/kernel", P("model", "fsdp")),  # [frame, dim]
    ("frame_embed/bias", P()),
    ("readout/kernel", P("fsdp", None)),  # [dim, dim]
    ("frame_output/kernel", P("fsdp", "model")),  # [dim, frame]
    ("frame_output/bias", P()),
    ("blocks/qkv/kernel", P(None, "fsdp", None, "model")),  # [layers, dim, 3, dim]
    ("blocks/out/kernel", P(None, "model", "fsdp")),  # [layers, dim, dim]
    ("blocks/gate_up/kernel", P(None, "fsdp", None, "model")),  # [.., dim, 2, hidden]
    ("blocks/down/kernel", P(None, "model", "fsdp")),  # [layers, hidden, dim]
    ("blocks/modulation/kernel", P(None, "fsdp")),  # [layers, dim, 6 dim]
    ("blocks/modulation/bias", P()),
    ("blocks/*_norm/*", P()),
    ("final_norm/*", P()),
    ("final_modulation/*", P()),
    ("step_embed/embedding", P()),  # [landscapes, dim]
    ("energy/kernel", P()),  # [dim, 1]
    ("energy_scale", P()),  # [landscapes]
    # Of images.
    ("blocks/qkv/bias", P(None, None, "model")),  # [layers, 3, dim]
    ("blocks/out/bias", P()),
    ("blocks/up/kernel", P(None, "fsdp", "model")),  # [layers, dim, hidden]
    ("blocks/up/bias", P(None, "model")),  # [layers, hidden]
    ("blocks/down/bias", P()),
    ("patch_embed/kernel", P(None, "fsdp")),  # [patch patch channels, dim]
    ("patch_embed/bias", P()),
    ("caption_embed/kernel", P(None, "fsdp")),  # [condition_size, dim]
    ("caption_embed/bias", P()),
    ("condition/embedding", P()),  # [1, dim]
    ("time_in/kernel", P(None, "fsdp")),  # [256, dim]
    ("time_in/bias", P()),
    ("time_out/kernel", P(None, "fsdp")),  # [dim, dim]
    ("time_out/bias", P()),
    ("output/bias", P()),  # [2 patch patch channels]
    # Of boards.
    ("candidate_embed/embedding", P("model", "fsdp")),  # [digits, dim]
    ("row_embed/embedding", P()),  # [digits, dim]
    ("column_embed/embedding", P()),
    ("box_embed/embedding", P()),
    ("step_size", P()),
    ("noise_std", P()),
)


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh of all devices, or of as many as the config names.

    Raises:
      UserError: if the axes do not fit the devices.
    """
    devices = jax.devices()
    shape = mesh_shape(config, len(devices), devices[0].platform)
    used = math.prod(shape)
    if used < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh {_named(config)} uses {used} of {len(devices)} devices, but with "
            f"{jax.process_count()} processes it has to use all; set one axis to -1"
        )
    # Auto: the compiler chooses the sharding of what is between inputs and outputs.
    kinds = (AxisType.Auto,) * len(AXES)
    if config.slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices[:used])
    return Mesh(arrange(devices[:used], shape, config.slices), AXES, axis_types=kinds)


def mesh_shape(config: MeshConfig, devices: int, kind: str) -> tuple[int, ...]:
    """Sizes of `AXES`, with an axis of -1 taking what the others leave.

    Args:
      config: of a run.
      devices: how many there are.
      kind: what they are, for messages.

    Raises:
      UserError: if that cannot be.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % given:
            raise UserError(
                f"mesh {_named(config)}: the other axes make {given}, which does not "
                f"divide the {devices} devices ({kind}); change them"
            )
        sizes[sizes.index(-1)] = devices // given
    elif given > devices:
        raise UserError(
            f"mesh {_named(config)} takes {given} devices, but there are {devices} "
            f"({kind}); lower it, or set one axis to -1 to fill it"
        )
    if sizes[0] % config.slices:
        raise UserError(
            f"mesh.data is {sizes[0]}, which mesh.slices ({config.slices}) does not "
            "divide; slices share the batch, so each takes a part of that axis"
        )
    return tuple(sizes)


def arrange(devices: Sequence[Any], shape: tuple[int, ...], slices: int) -> np.ndarray:
    """Devices of several slices, `shape`: only `data` crosses from slice to slice.

    Args:
      devices: all of them. Where they have no `slice_index`, as on GPUs, the devices
        of one process count as a slice.
      shape: sizes of `AXES`.
      slices: how many there are.

    Raises:
      UserError: if there are not so many slices.
    """
    inner = (shape[0] // slices, *shape[1:])
    outer = (slices, *(1 for _ in shape[1:]))
    by_process = not hasattr(devices[0], "slice_index")
    try:
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, process_is_granule=by_process
        )
    except ValueError as error:
        name = "process_index" if by_process else "slice_index"
        found = len({getattr(device, name) for device in devices})
        what = "processes" if by_process else "slices"
        raise UserError(
            f"mesh.slices is {slices}, but the {len(devices)} devices belong to "
            f"{found} {what}; set it to {found}, or to 1"
        ) from error


def check_batch(config: TrainConfig, mesh: Mesh, context: int) -> None:
    """Checks that every device gets equally much of a batch.

    Args:
      config: of the run.
      mesh: of `make_mesh`.
      context: predictions of a sequence.

    Raises:
      UserError: if not.
    """
    devices = batch_parts(mesh)
    part = config.batch_size // config.accumulation
    if part % devices:
        whole = (
            f"train.batch_size is {config.batch_size}"
            if config.accumulation == 1
            else f"train.batch_size / train.accumulation is {config.batch_size} / "
            f"{config.accumulation} = {part}"
        )
        raise UserError(
            f"{whole}, which the {devices} devices of mesh.data x mesh.fsdp do not "
            f"divide; make it a multiple of {devices}, or use fewer devices"
        )
    if context % mesh.shape["seq"]:
        raise UserError(
            f"data.context is {context}, which mesh.seq ({mesh.shape['seq']}) does not "
            "divide; change one of them"
        )


def check_replay(replay: ReplayConfig, config: TrainConfig, mesh: Mesh) -> None:
    """Checks that every device's share of a replay buffer suits its share of a batch.

    Each device keeps, and samples from, what it refined itself: `capacity / devices`
    sequences. So which sequences are replayed depends on the number of devices.

    Args:
      replay: how much is kept, over all devices.
      config: of the run.
      mesh: of `make_mesh`.

    Raises:
      UserError: if not.
    """
    capacity, devices = replay.capacity, batch_parts(mesh)
    if not capacity:
        return
    if capacity % devices:
        raise UserError(
            f"replay.capacity is {capacity}, which the {devices} devices of mesh.data "
            f"x mesh.fsdp do not divide; make it a multiple of {devices}"
        )
    share = config.batch_size // config.accumulation // devices
    if capacity // devices < share:
        raise UserError(
            f"replay.capacity is {capacity}, {capacity // devices} for each of "
            f"{devices} devices, but a device's share of a batch is {share} sequences "
            "(train.batch_size / train.accumulation / devices); raise it to at least "
            f"{share * devices}, or set it to 0"
        )
    if not replay.count(share):
        raise UserError(
            f"replay.fraction is {replay.fraction}, which of a device's share of a "
            f"batch, {share} sequences, is none; raise it to at least {1 / share:.3g}, "
            "use fewer devices, or set replay.capacity to 0"
        )


def batch_parts(mesh: Mesh) -> int:
    """Parts that the sequences of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def parameter_specs(params: PyTree, mesh: Mesh) -> PyTree:
    """How each parameter is split, by `PARAMETERS`.

    An axis of the mesh that does not divide an axis of the array leaves it whole, as do
    axes of size 1.

    Args:
      params: parameters, or their shapes.
      mesh: of `make_mesh`.

    Returns:
      A tree of `PartitionSpec`.

    Raises:
      ValueError: for a parameter that no pattern or more than one matches, where there
        is anything to split.
    """

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        if mesh.shape["fsdp"] == mesh.shape["model"] == 1:
            return P()
        name = _name(path)
        found = [p for pattern, p in PARAMETERS if fnmatch.fnmatchcase(name, pattern)]
        if len(found) != 1:
            raise ValueError(
                f"parameter {name} matches {len(found)} patterns of "
                "sharding.PARAMETERS; each has to match one"
            )
        return _fitting(found[0], leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, params)


def left_whole(params: PyTree, mesh: Mesh) -> list[str]:
    """What would be split over an axis of the mesh but that does not divide it."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for pattern, wanted in PARAMETERS:
            if not fnmatch.fnmatchcase(_name(path), pattern):
                continue
            for size, axis in zip(leaf.shape, wanted, strict=False):
                if axis is not None and size % mesh.shape[axis]:
                    lines.append(
                        f"{_name(path)} stays whole over mesh.{axis}: "
                        f"{mesh.shape[axis]} does not divide its {size}"
                    )
    return lines


def state_shardings(state: PyTree, mesh: Mesh) -> PyTree:
    """How a training state is split.

    Args:
      state: a `TrainState`, or its shapes. What in it has the path and shape of a
        parameter, as the optimiser's moments, is split as that is, a replay buffer as
        a batch is; all else is copied.
      mesh: of `make_mesh`.

    Returns:
      A tree of `NamedSharding`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    specs = jax.tree.leaves(
        parameter_specs(state.params, mesh), is_leaf=lambda x: isinstance(x, P)
    )
    known = {
        _name(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(leaves, specs, strict=True)
    }

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if _name(path).startswith("replay/"):
            return NamedSharding(mesh, P(BATCH_AXES))
        for start in range(len(path)):
            name = _name(path[start:])
            if name in known and known[name][0] == leaf.shape:
                return NamedSharding(mesh, known[name][1])
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def state_target(state: PyTree, mesh: Mesh) -> PyTree:
    """Shapes of a state with their shardings, to restore or to compile for."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        state,
        state_shardings(state, mesh),
    )


def gathered_target(params: PyTree, mesh: Mesh) -> PyTree:
    """Shapes of parameters that are whole along the batch's axes.

    Args:
      params: parameters, or their shapes.
      mesh: of `make_mesh`.
    """

    def target(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, without_batch_axes(spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(target, params, parameter_specs(params, mesh))


def gathered(params: PyTree, mesh: Mesh) -> PyTree:
    """Parameters whole along the batch's axes, as evaluation reads them many times."""
    target = gathered_target(params, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(lambda same: same, out_shardings=shardings)(params)


def on_first_device(params: PyTree, mesh: Mesh) -> PyTree:
    """Whole parameters on this process's first device, to generate with.

    Every process has to call this.
    """
    whole = jax.jit(lambda same: same, out_shardings=replicated(mesh))(params)
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def without_batch_axes(spec: PartitionSpec) -> PartitionSpec:
    """What is left of a spec when a parameter is gathered along the batch's axes."""
    return P(*(None if axis in BATCH_AXES else axis for axis in spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """The sharding of an array `[batch, ...]` or `[batch, seq, ...]` of a batch."""
    return NamedSharding(mesh, P(BATCH_AXES, "seq") if ndim > 1 else P(BATCH_AXES))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The sequences of a batch that this process's devices hold, in rising order."""
    places = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,))
    rows: set[int] = set()
    for index in places.values():
        assert index is not None  # no device is left out of a mesh's sharding
        rows.update(range(*index[0].indices(batch_size)))
    return sorted(rows)


def global_batch(
    batch: NumpyBatch, mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """Global arrays of a batch of which each process holds its own sequences.

    Args:
      batch: arrays `[sequences of this process, ...]`, those of `local_rows`.
      mesh: of `make_mesh`.
      batch_size: sequences of all processes; None where each holds all of them.

    Returns:
      Arrays `[sequences of all processes, ...]`. Where the devices cannot share the
      sequences equally each holds all of them.
    """
    count = len(next(iter(batch.values())))
    size = count if batch_size is None else batch_size
    shares = size % batch_parts(mesh) == 0
    rows = local_rows(mesh, size) if batch_size is not None else range(size)
    place = {row: i for i, row in enumerate(rows)}

    def put(values: np.ndarray) -> jax.Array:
        sharding = batch_sharding(mesh, values.ndim) if shares else replicated(mesh)

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            here = slice(place[first], place[last - 1] + 1)
            return values[(here, *index[1:])]

        shape = (size, *values.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(np.asarray(values)) for name, values in batch.items()}


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = [
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, spec, strict=False)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(config: MeshConfig) -> str:
    return " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
