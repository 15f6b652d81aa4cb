"""Files that a run adds to, which survive a disk that is full for a while."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ebt_jax.errors import Stopped, StorageError

FLUSH_SECONDS = 30.0  # between two moments when TensorBoard's file is on the disk


class Lines:
    """Adds lines to a file; those that cannot be written yet are kept in memory.

    A line is in the file whole or not at all.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._waiting: list[bytes] = []

    def write(self, line: str) -> None:
        """Adds a line, after those that are waiting.

        Raises:
          OSError: if that fails; the line waits for the next call.
        """
        self._waiting.append(line.encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes what is waiting.

        Raises:
          OSError: if that fails.
        """
        if not self._waiting:
            return
        data = b"".join(self._waiting)
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        self._waiting.clear()


class TensorBoard:
    """Scalars for TensorBoard.

    tensorboardX has a writer that works in a thread of its own. The thread dies of the
    first error, and the tenth call after that waits for it for ever; hence this.
    """

    def __init__(self, directory: Path, purge_step: int) -> None:
        """Opens nothing yet.

        Args:
          directory: is made.
          purge_step: what earlier files hold from this step on is not shown.
        """
        # Imported where it is asked for: it takes PyTorch along where there is one.
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2

        self._make_writer = record_writer.RecordWriter
        self._scalar: Callable[[str, float], Any] = summary.scalar
        self._event, log = (
            getattr(event_pb2, name) for name in ("Event", "SessionLog")
        )
        self._directory = directory
        self._writer: Any = None
        start = log(status=log.START)
        self._waiting = [self._event(step=purge_step, session_log=start)]
        self._written: list[Any] = []  # but not flushed
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Adds the scalars of a step, after those that are waiting.

        Args:
          step: updates made.
          values: by name.
          seconds: since 1970.

        Raises:
          OSError: if that fails; they wait for the next call, and for another file.
        """
        for name, value in values.items():
            summary = self._scalar(name, value)
            event = self._event(wall_time=seconds, step=step, summary=summary)
            self._waiting.append(event)
        try:
            if self._writer is None:
                self._directory.mkdir(exist_ok=True)
                # TensorBoard reads files of such names, in order.
                name = f"events.out.tfevents.{seconds:.6f}.{socket.gethostname()}"
                self._writer = self._make_writer(str(self._directory / name))
                version = self._event(wall_time=seconds, file_version="brain.Event:2")
                self._writer.write(version.SerializeToString())
            while self._waiting:
                self._writer.write(self._waiting[0].SerializeToString())
                self._written.append(self._waiting.pop(0))
            if seconds - self._flushed >= FLUSH_SECONDS:
                self._writer.flush()  # which waits for the disk
                self._flushed = seconds
                self._written.clear()
        except OSError:
            self._waiting = self._written + self._waiting
            self._written = []
            self.close()  # it may end in half an event
            raise

    def close(self) -> None:
        """Closes the file; what waits is lost."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


@contextlib.contextmanager
def storage_explained() -> Iterator[None]:
    """Around what reads and writes files: their failure can be mended, and is told so.

    Raises:
      StorageError: in place of an `OSError` that nobody has explained before.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{error.filename or 'a file'} cannot be read or written: "
            f"{error.strerror or error}; make room or repair the storage, and give the "
            "same command again"
        ) from error


def check_there(path: Path) -> None:
    """Checks that a run's workdir has not gone away under it.

    Raises:
      Stopped: if it has. It is not made again: what is missing may come back, such as
        a file system that was unmounted, and would be hidden by a new, half-empty one.
    """
    if not (path / "config.json").exists():
        what = "its config.json" if path.is_dir() else "it"
        raise Stopped(
            f"the workdir {path} has vanished: {what} is not there any more; bring it "
            "back and give the same command again, or name another to start over"
        )
