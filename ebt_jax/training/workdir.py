"""The folder of a run: whether it can be written, what it is of, how it is found.

A workdir holds `config.json`, the resolved config of the run, and what the run writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path

from ebt_jax.errors import UserError
from ebt_jax.training import packed
from ebt_jax.training.config import Config, differences, from_json, to_json
from ebt_jax.training.resolve import resolve_like

# What a run may be continued with. With another number of steps only while the
# learning rates stay what they were, that is, with the same optim.schedule_steps.
CHANGEABLE_SECTIONS = ("eval", "mesh", "checkpoint", "log")
CHANGEABLE_KEYS = (
    "train.steps",
    "train.spike_factor",
    "train.max_skipped",
    "train.max_rollbacks",
)


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

    Sections `eval`, `mesh`, `checkpoint` and `log` may differ, what is done about
    updates that are not finite, and `train.steps` while `optim.schedule_steps` stays
    the same.

    Args:
      path: of `check_workdir`.
      config: a resolved config.

    Raises:
      UserError: naming what differs, with both values.
    """
    if not (path / "config.json").exists():
        if checkpoint_steps(path):
            raise UserError(
                f"{path} holds checkpoints but no config.json, so nobody knows of "
                "what; name another workdir"
            )
        return
    check_same(path, config, CHANGEABLE_KEYS)


def check_origin(path: Path, config: Config) -> None:
    """Checks that a new run can begin with the state of another one.

    As `check_config`; where the other one's parameters came from may differ, too.

    Args:
      path: the workdir of the other one.
      config: a resolved config, of the new one.

    Raises:
      UserError: if there is no other run, or naming what differs, with both values.
    """
    check_same(path, config, (*CHANGEABLE_KEYS, "train.init_from", "train.init_vocab"))


def check_same(path: Path, config: Config, changeable: tuple[str, ...]) -> None:
    """Checks that a workdir's config is the one given, but for what may change.

    Args:
      path: the workdir.
      config: a resolved config.
      changeable: keys that may differ besides the sections that may.

    Raises:
      UserError: if there is no run, or naming what differs, with both values.
    """
    conflicts = [
        f"{key} is {there!r} there and {here!r} here"
        for key, (there, here) in differences(read_config(path), config).items()
        if key not in changeable and key.split(".")[0] not in CHANGEABLE_SECTIONS
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


def is_finished(path: Path, config: Config) -> bool:
    """Whether `ebt train` would find nothing to do, without data and devices.

    Args:
      path: the workdir.
      config: of the run, resolved or not.
    """
    try:
        step = json.loads((path / "summary.json").read_text())["step"]
        check_config(path, resolve_like(config, read_config(path)))
    except (OSError, ValueError, KeyError, TypeError):
        return False  # training says what is wrong, if anything is
    return step >= config.train.steps


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
    # Not named by the process id: those of several hosts are often the same.
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text)
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_config(path: Path) -> Config:
    """The config of a run, in its workdir or in a file of `packed`.

    Raises:
      UserError: if there is none, or it is not one of this version.
    """
    if path.is_file() or path.suffix == packed.SUFFIX and not path.exists():
        return packed.read(path).config
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

    Args:
      workdir: of the run, or a trained model in a file, see `packed`.

    Raises:
      UserError: if it has not.
    """
    path = Path(workdir).expanduser().absolute()
    return path, read_config(path)


def checkpoint_steps(path: Path) -> list[int]:
    """Steps of the checkpoints in a workdir, complete ones or not, in order."""
    directory = path / "checkpoints"
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())
