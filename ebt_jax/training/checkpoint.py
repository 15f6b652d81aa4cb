"""Checkpoints of a run: saved in the background, verified before they are used.

`WORKDIR/checkpoints/STEP/` holds the state after STEP updates, the place in the data,
the config and, written last, the manifest: sizes and SHA-256 sums of all files. Orbax
writes a checkpoint under a temporary name and renames it, then the manifest is made; a
run killed before that finds the checkpoint before. A checkpoint that is not what its
manifest says is never used, and moved to `WORKDIR/damaged/`, never deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ebt_jax.errors import StorageError, UserError
from ebt_jax.refine import PyTree
from ebt_jax.training import manifest, packed
from ebt_jax.training.config import Config
from ebt_jax.training.monitor import say
from ebt_jax.training.objective import build_objective
from ebt_jax.training.sharding import gathered_target
from ebt_jax.training.step import TrainState, saved_form
from ebt_jax.training.workdir import checkpoint_steps, open_workdir

Shapes = dict[str, tuple[int, ...]]  # name -> shape

_TEXT = 2000  # bytes that a process tells the others


class Restored(NamedTuple):
    """What a run continues with.

    Attributes:
      state: parameters, optimiser, updates made.
      next_example: its place in the data, see `pipeline.TrainBatches`.
    """

    state: TrainState
    next_example: int


def directory_of(path: Path, step: int) -> Path:
    """The directory of a checkpoint of a workdir."""
    return path / "checkpoints" / str(step)


def recover(path: Path) -> int | None:
    """Finds the newest checkpoint that is good and moves damaged newer ones aside.

    Each damage is told. Of several processes each reads a share of the files, the first
    moves, and all learn the same.

    Args:
      path: the workdir.

    Returns:
      The step; None if there is no checkpoint, or only one that was never finished.

    Raises:
      UserError: if there are checkpoints and none is good; all are left where they are.
      StorageError: if a damaged one cannot be moved.
    """
    step, damaged = _newest_good(path, _verify_together)
    unfinished = list(damaged.values()) == [[manifest.UNFINISHED]]
    if step is None and damaged and not unfinished:
        raise UserError(_none_good(path, damaged))
    for bad, problems in damaged.items():
        place = _aside(path, bad)
        say(
            f"warning: checkpoint {bad} is not used: {_in_short(problems)}; moved to "
            f"{place}"
        )
        if jax.process_index() == 0:
            _move(directory_of(path, bad), place)
    if damaged and jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are moved")
    return step


def latest_step(path: Path, step: int | None = None) -> int | None:
    """The step of the newest checkpoint that is good. Changes nothing.

    Args:
      path: the workdir.
      step: None, or the only one that is looked at.

    Returns:
      The step; None if there is no checkpoint. Damaged newer ones are told.

    Raises:
      UserError: if there are checkpoints and none is good, or there is no such one.
    """
    if step is not None:
        check_step(path, step)
    found, damaged = _newest_good(path, manifest.verify, step)
    if found is None and damaged:
        raise UserError(_none_good(path, damaged))
    for bad, problems in damaged.items():
        say(f"warning: checkpoint {bad} is not used: {_in_short(problems)}")
    return found


def check_step(path: Path, step: int) -> None:
    """Checks that a workdir has a checkpoint of a step.

    Raises:
      UserError: naming those that it has.
    """
    known = checkpoint_steps(path)
    if step not in known:
        raise UserError(
            f"{path} has no checkpoint of step {step}; it has those of "
            f"{', '.join(map(str, known)) or 'none'}"
        )


def pick_step(path: Path, step: int | None = None) -> int:
    """`latest_step`, where there has to be one; that of a model in a file."""
    if path.is_file():
        only = packed.read(path).step
        if step not in (None, only):
            raise UserError(
                f"{path} holds the model of step {only} alone, not of {step}; leave "
                "out the step"
            )
        return only
    found = latest_step(path, step)
    if found is None:
        raise UserError(f"{path} holds no checkpoint yet; train until one is saved")
    return found


def restore_params(workdir: str | os.PathLike[str], step: int | None = None) -> PyTree:
    """The parameters of a checkpoint, verified, on the first device.

    Args:
      workdir: of the run; its `config.json` says what the parameters have to look like.
      step: which checkpoint; None for the newest that is good.

    Raises:
      UserError: if there is no such checkpoint, it is damaged, or does not fit.
    """
    path, config = open_workdir(workdir)
    return load_params(path, pick_step(path, step), config)


def load_params(
    path: Path, step: int, config: Config, mesh: Mesh | None = None
) -> PyTree:
    """The parameters of a checkpoint that is known to be good.

    Args:
      path: the workdir, or a file of `packed`.
      step: of `pick_step`.
      config: says what the parameters have to look like.
      mesh: that they are put on, whole but for its axis `model`; None for the first
        device.

    Raises:
      UserError: if the checkpoint does not fit.
    """
    shapes = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    check_fit(path, step, shapes)
    if mesh is not None:
        return read_params(path, step, gathered_target(shapes, mesh))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return read_params(path, step, with_sharding(shapes, device))


def read_params(path: Path, step: int, target: PyTree) -> PyTree:
    """Parameters of a checkpoint, or some of them.

    Args:
      path: the workdir, or a file of `packed`.
      step: which checkpoint.
      target: shapes and shardings, of those wanted; what else there is is not read.
    """
    if path.is_file():
        arrays = packed.read(path).arrays
        return nested({k: put(arrays[k], s) for k, s in named(target).items()})
    wanted = {"params": target}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            directory_of(path, step) / "state",
            args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )
    return restored["params"]


def restore(path: Path, step: int, target: TrainState) -> Restored:
    """The state of a checkpoint that is known to be good, on any mesh.

    Args:
      path: the workdir.
      step: of `recover` or `latest_step`.
      target: shapes and shardings of the state, see `sharding.state_target`.

    Raises:
      UserError: if the checkpoint does not fit.
    """
    check_fit(path, step, target.params)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        restored = reader.restore(
            directory_of(path, step),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(saved_form(target)),
                data=ocp.args.JsonRestore(),
            ),
        )
    state = TrainState(**restored["state"])
    return Restored(state, restored["data"]["next_example"])


def saved_shapes(path: Path, step: int) -> Shapes:
    """Names, such as `blocks/qkv/kernel`, and shapes of a checkpoint's parameters."""
    if path.is_file():
        return {name: a.shape for name, a in packed.read(path).arrays.items()}
    state = epath.Path(directory_of(path, step) / "state")
    return shapes_of(ocp.PyTreeCheckpointHandler().metadata(state).tree["params"])


def check_fit(path: Path, step: int, params: PyTree) -> None:
    """Checks that a checkpoint holds parameters of the expected names and shapes.

    Args:
      path: the workdir.
      step: which checkpoint.
      params: parameters, or their shapes, that the config asks for.

    Raises:
      UserError: naming the first parameter that differs.
    """
    found = saved_shapes(path, step)
    wanted = shapes_of(params)
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            what = f"lacks the parameter {name}"
        elif name not in wanted:
            what = f"has a parameter {name}, which the config's model has not"
        elif found[name] != wanted[name]:
            what = f"has {name} of shape {found[name]}, not {wanted[name]}"
        else:
            continue
        raise UserError(
            f"checkpoint {step} in {path} does not fit the config: it {what}; use the "
            "config and the version it was made with"
        )


def with_sharding(shapes: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
    """Shapes of arrays that are all to be put somewhere."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of a nested dict by names such as `blocks/qkv/kernel`, in order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: dict[str, Any]) -> PyTree:
    """The inverse of `named`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf
    return tree


def put(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
    """An array where and as what a target says."""
    sharding, cast = target.sharding, np.asarray(array, target.dtype)
    assert isinstance(sharding, jax.sharding.Sharding)
    return jax.make_array_from_callback(cast.shape, sharding, cast.__getitem__)


def shapes_of(tree: PyTree) -> Shapes:
    """Names and shapes of parameters."""
    return {name: tuple(leaf.shape) for name, leaf in named(tree).items()}


def agree(text: str | None) -> str | None:
    """What any of the processes has to say; all have to call this.

    Args:
      text: lines of this process, None if nothing. What several say is said once.
    """
    if jax.process_count() == 1:
        return text
    mine = np.zeros(_TEXT, np.uint8)
    said = (text or "").encode()[:_TEXT]
    mine[: len(said)] = np.frombuffer(said, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(mine))
    texts = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
    lines = [line for text in texts for line in text.split("\n") if line]
    return "\n".join(dict.fromkeys(lines)) or None


def _newest_good(
    path: Path, verify: Callable[[Path], list[str]], only: int | None = None
) -> tuple[int | None, dict[int, list[str]]]:
    """The newest good step, and what is wrong with the newer ones."""
    damaged = {}
    for step in reversed(checkpoint_steps(path)):
        if only is not None and step != only:
            continue
        problems = verify(directory_of(path, step))
        if not problems:
            return step, damaged
        damaged[step] = problems
    return None, damaged


def _verify_together(directory: Path) -> list[str]:
    index, count = jax.process_index(), jax.process_count()
    problems = manifest.verify(directory, share=index, shares=count)
    told = agree("\n".join(problems) or None)
    return told.split("\n") if told else []


def _aside(path: Path, step: int) -> Path:
    """The first of WORKDIR/damaged/STEP-1, STEP-2, ... that is free."""
    number = 1
    while (path / "damaged" / f"{step}-{number}").exists():
        number += 1
    return path / "damaged" / f"{step}-{number}"


def _move(directory: Path, place: Path) -> None:
    try:
        place.parent.mkdir(exist_ok=True)
        directory.rename(place)
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be moved to {place}: {error.strerror}; make room or "
            "repair the storage, and give the same command again"
        ) from error


def _in_short(problems: list[str]) -> str:
    more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + more


def _none_good(path: Path, damaged: dict[int, list[str]]) -> str:
    told = "; ".join(f"{step}: {_in_short(p)}" for step, p in damaged.items())
    return (
        f"no checkpoint in {path} is good ({told}); put back a copy of one, or name "
        "another workdir to start over"
    )
