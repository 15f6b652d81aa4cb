"""What a run ran on, for who reads its numbers later."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ebt_jax.training.workdir import replace_text

NAME = "environment.json"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def record_environment(path: Path, mesh: Mesh, step: int) -> None:
    """Adds devices and versions to `environment.json`, if they are not the last there.

    Of several processes the first writes.

    Args:
      path: the workdir.
      mesh: of the run.
      step: updates made before.

    Raises:
      OSError: if that fails.
    """
    if jax.process_index():
        return
    device = mesh.devices.flat[0]
    now = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    before = read_environments(path)
    if before and before[-1] == {"step": before[-1]["step"], **now}:
        return
    entries = [*before, {"step": step, **now}]
    replace_text(path / NAME, json.dumps(entries, indent=1) + "\n")


def read_environments(path: Path) -> list[dict[str, Any]]:
    """What a run ran on, from the first of its updates on; empty if nobody knows.

    Each has the `step` from which on it did, `device`, `devices` and versions.
    """
    try:
        entries = json.loads((path / NAME).read_text())
    except (FileNotFoundError, ValueError):
        return []  # of an older version, or damaged: no run depends on it
    known = isinstance(entries, list) and all(
        isinstance(entry, dict) and "step" in entry for entry in entries
    )
    return entries if known else []
