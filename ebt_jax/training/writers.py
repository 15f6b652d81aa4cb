"""Files that a run adds to, which survive a disk that is full for a while."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from ebt_jax.errors import Stopped

# Made when they are imported, which type checkers do not see.
Event, SessionLog = (getattr(event_pb2, name) for name in ("Event", "SessionLog"))


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
        self._directory = directory
        self._writer: EventsWriter | None = None
        start = SessionLog(status=SessionLog.START)
        self._waiting = [Event(step=purge_step, session_log=start)]

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
            summary = scalar(name, value)
            event = Event(wall_time=seconds, step=step, summary=summary)
            self._waiting.append(event)
        try:
            if self._writer is None:
                self._directory.mkdir(exist_ok=True)
                # Its name is the second and the host's, and this.
                suffix = f".{os.getpid()}.{step}"
                prefix = str(self._directory / "events")
                self._writer = EventsWriter(prefix, suffix)
            for event in self._waiting:
                self._writer.write_event(event)
            self._writer.flush()
        except OSError:
            self.close()  # it may end in half an event
            raise
        self._waiting.clear()

    def close(self) -> None:
        """Closes the file; what waits is lost."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()


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
