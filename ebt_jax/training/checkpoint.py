"""What a run leaves behind, and how it is found again.

A workdir holds `config.json`, the resolved config of the run, and `checkpoints/STEP/`
with the state, the place in the data and the config after STEP updates. Orbax writes a
checkpoint under a temporary name and renames it when it is complete, so that a run
killed while saving finds the one before.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath

from ebt_jax.errors import UserError
from ebt_jax.refine import PyTree
from ebt_jax.training.config import (
    CheckpointConfig,
    Config,
    differences,
    from_json,
    to_json,
)
from ebt_jax.training.objective import build_objective
from ebt_jax.training.step import TrainState

# What a run may be continued with. With another number of steps only while the
# learning rates stay what they were, that is, with the same optim.schedule_steps.
CHANGEABLE_SECTIONS = ("eval", "mesh", "checkpoint", "log")
CHANGEABLE_KEYS = ("train.steps",)


def check_workdir(workdir: str | os.PathLike[str]) -> Path:
    """The absolute path of a workdir that can be written. Creates nothing.

    Raises:
      UserError: if it cannot.
    """
    if not os.fspath(workdir):
        raise UserError("workdir is empty; name a directory for what the run writes")
    path = Path(workdir).expanduser().absolute()
    existing = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise UserError(
            f"workdir {path} cannot be made: {existing} is not a directory; name "
            "another"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"workdir {path} cannot be written: no permission in {existing}; change "
            "that, or name another"
        )
    return path


def check_config(path: Path, config: Config) -> None:
    """Checks that a workdir is new or holds a run of the same config.

    Sections `eval`, `mesh`, `checkpoint` and `log` may differ, and `train.steps` while
    `optim.schedule_steps` stays the same.

    Args:
      path: of `check_workdir`.
      config: a resolved config.

    Raises:
      UserError: naming what differs, with both values.
    """
    if not (path / "config.json").exists():
        if latest_step(path) is not None:
            raise UserError(
                f"{path} holds checkpoints but no config.json, so nobody knows of "
                "what; name another workdir"
            )
        return
    conflicts = [
        f"{key} is {there!r} there and {here!r} here"
        for key, (there, here) in differences(read_config(path), config).items()
        if key not in CHANGEABLE_KEYS and key.split(".")[0] not in CHANGEABLE_SECTIONS
    ]
    if conflicts:
        longer = any(
            conflict.startswith("optim.schedule_steps") for conflict in conflicts
        )
        hint = " (a run goes on for longer with its own optim.schedule_steps)"
        raise UserError(
            f"{path} holds a run of another config: {', '.join(conflicts)}; use the "
            f"same values{hint if longer else ''}, or name another workdir"
        )


def claim_workdir(path: Path, config: Config) -> None:
    """Creates a workdir and writes `config.json`, if it is not what is there already.

    Raises:
      UserError: if that fails.
    """
    file = path / "config.json"
    text = to_json(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            replace_text(file, text)
    except OSError as error:
        raise UserError(
            f"workdir {path} cannot be written: {error.strerror}; name another"
        ) from error


def replace_text(file: Path, text: str) -> None:
    """Writes a file in one go: at any moment there is the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, file)


def read_config(path: Path) -> Config:
    """The config of a run.

    Raises:
      UserError: if there is none, or it is not one of this version.
    """
    file = path / "config.json"
    if not file.exists():
        raise UserError(
            f"{path} holds no run: there is no config.json; name the workdir that "
            "`ebt train` was given"
        )
    try:
        return from_json(file.read_text())
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a config of this version: {error}") from error


def open_workdir(workdir: str | os.PathLike[str]) -> tuple[Path, Config]:
    """The absolute path and the config of a run that has been started.

    Raises:
      UserError: if it has not.
    """
    path = Path(workdir).expanduser().absolute()
    return path, read_config(path)


def latest_step(workdir: str | os.PathLike[str]) -> int | None:
    """The step of the newest complete checkpoint, None if there is none."""
    directory = Path(workdir).expanduser().absolute() / "checkpoints"
    steps = ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []
    return max(steps, default=None)


def restore_params(workdir: str | os.PathLike[str], step: int | None = None) -> PyTree:
    """The parameters of a checkpoint, on the first device.

    Args:
      workdir: of the run; its `config.json` says what the parameters have to look like.
      step: which checkpoint; None for the newest.

    Raises:
      UserError: if there is no such checkpoint, or it does not fit the config.
    """
    path, config = open_workdir(workdir)
    newest = latest_step(path)
    if newest is None:
        raise UserError(f"{path} holds no checkpoint yet; train until one is saved")
    known = sorted(ocp.utils.checkpoint_steps(path / "checkpoints"))
    if step is not None and step not in known:
        raise UserError(
            f"{path} has no checkpoint of step {step}; it has those of "
            f"{', '.join(map(str, known))}"
        )
    step = newest if step is None else step
    shapes = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    check_fit(path, step, shapes)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {"params": with_sharding(shapes, device)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            path / "checkpoints" / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    return restored["params"]


def check_fit(path: Path, step: int, params: PyTree) -> None:
    """Checks that a checkpoint holds parameters of the expected names and shapes.

    Args:
      path: the workdir.
      step: which checkpoint.
      params: parameters, or their shapes, that the config asks for.

    Raises:
      UserError: naming the first parameter that differs.
    """
    state = epath.Path(path / "checkpoints" / str(step) / "state")
    found = _shapes(ocp.PyTreeCheckpointHandler().metadata(state).tree["params"])
    wanted = _shapes(params)
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


def open_manager(path: Path, config: CheckpointConfig) -> ocp.CheckpointManager:
    """The checkpoints of a run; a context manager, whose end finishes the last save."""
    latest = ocp.checkpoint_managers.LatestN(config.keep_latest)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=latest, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(path / "checkpoints", options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: TrainState,
    batches: grain.DatasetIterator,
    config: Config,
) -> None:
    """Starts to save a checkpoint; it is complete when the manager says so."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(batches),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
        ),
    )


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    target: TrainState,
    batches: grain.DatasetIterator,
) -> TrainState:
    """The state of a checkpoint; `batches` is moved to where it was.

    Args:
      manager: of `open_manager`.
      step: which checkpoint.
      target: shapes and shardings of the state, see `with_sharding`.
      batches: an iterator over the same data.

    Raises:
      UserError: if the checkpoint does not fit.
    """
    check_fit(Path(manager.directory).parent, step, target.params)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            data=grain.checkpoint.CheckpointRestore(batches),
        ),
    )
    return restored["state"]


def with_sharding(shapes: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
    """Shapes of arrays that are to be put somewhere."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
