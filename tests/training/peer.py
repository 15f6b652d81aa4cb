"""One process of several that train the bigram model; test_distributed.py runs it.

usage: peer.py COORDINATOR COUNT INDEX WORKDIR STEP EVENT

Before the batch of STEP EVENT happens: `kill`, `term`, `mistake` or `nothing`. The exit
code is that of `ebt train`.
"""

import os
import signal
import sys
import time
from pathlib import Path

from conftest import Letters, bigram, held_out_batches, row, small_config

from ebt_jax.data.pipeline import TrainBatches
from ebt_jax.errors import Stopped, UserError, exit_code, one_line
from ebt_jax.training import distributed
from ebt_jax.training.distributed import Processes, running
from ebt_jax.training.loop import fit
from ebt_jax.training.task import show_text


class Examples:
    """An endless order of examples."""

    def __len__(self):
        return sys.maxsize

    def __getitem__(self, index):
        return row(index)


class Eventful(TrainBatches):
    """Batches of this process, before one of which something happens."""

    def __init__(self, index, step, event):
        super().__init__(
            Examples(),
            batch_size=8,
            rows=range(4 * index, 4 * index + 4),
            num_workers=0,
        )
        self.step, self.event = step, event

    def __next__(self):
        step = self.next_example // self.batch_size + 1
        time.sleep(0.05)  # a moment for signs of life and for signals
        if step == self.step:
            happen(self.event)
        return super().__next__()


def happen(event):
    """What befalls a process."""
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "nothing": 0}
    if event == "mistake":
        raise UserError("this process cannot read its data")
    os.kill(os.getpid(), signals[event])


def main():
    """Trains; returns the exit code."""
    coordinator, count, index, workdir, step, event = sys.argv[1:]
    distributed.GRACE_SECONDS = 2.0  # less patient than on a cluster
    peers = Processes(
        coordinator=coordinator,
        count=int(count),
        index=int(index),
        connect_seconds=60,
        heartbeat_seconds=6,
    )
    try:
        with running(peers):
            config = small_config(
                train={"steps": 100}, eval={"every": 0}, checkpoint={"every": 10}
            )
            batches = Eventful(int(index), int(step), event)
            objective = bigram(noise=0.3).objective
            held_out = held_out_batches()
            fit(
                config,
                Path(workdir),
                objective,
                show_text(config, Letters()),
                batches,
                held_out,
            )
    except (UserError, Stopped) as error:
        print(one_line(error), file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
