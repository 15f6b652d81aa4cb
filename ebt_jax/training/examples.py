"""Which sequences each update has seen, for those who want to know."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from ebt_jax.training.monitor import rewind
from ebt_jax.training.sharding import NumpyBatch
from ebt_jax.training.writers import Lines, check_there


@contextlib.contextmanager
def example_log(
    path: Path, wanted: bool, start: int
) -> Iterator[Callable[[int, NumpyBatch], None]]:
    """Opens `examples-PROCESS.jsonl`: one `{"step": ..., "ids": [...]}` per update.

    Lines of a run that went on after its last checkpoint are dropped when it is
    continued, those of processes that are no longer there as well. While the file
    cannot be written, as on a full disk, lines are kept in memory.

    Args:
      path: the workdir.
      wanted: else nothing is written.
      start: updates made before.

    Yields:
      A function that writes the ids, `batch["index"]`, of this process's sequences.
    """
    if not wanted:
        yield lambda step, batch: None
        return
    if jax.process_index() == 0:
        for file in path.glob("examples-*.jsonl"):
            rewind(file, start)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("lists of examples are rewound")
    name = f"examples-{jax.process_index()}.jsonl"
    lines = Lines(path / name)

    def write(step: int, batch: NumpyBatch) -> None:
        check_there(path)
        with contextlib.suppress(
            OSError
        ):  # it waits; metrics or a checkpoint will tell
            lines.write(json.dumps({"step": step, "ids": batch["index"].tolist()}))

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            lines.flush()
