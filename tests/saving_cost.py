"""What saving costs a run: updates with a save among them against updates without.

    python tests/saving_cost.py                   about 10 minutes on two cores
    python tests/saving_cost.py --preset=anchored --batch=4 --saves=3

Runs `ebt train` with a model of 50 million parameters (`size=small`, bytes) that is
saved every 100 updates. Each 50 updates with a save are compared with the 50 before and
the 50 after, which have none: what counts is all that the loop loses, be it that it
waits or that it is slowed down while threads copy, write and sum up. Prints the median
over the saves, and JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebt_jax import cli
from ebt_jax.training import manifest
from ebt_jax.training.checkpoint import directory_of
from ebt_jax.training.workdir import checkpoint_steps

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 50  # updates that are timed together
LEAD = 10  # of those, before the save


def command(path: Path, preset: str, batch: int, context: int, saves: int) -> list[str]:
    """The command line of a run, which goes on for a while after its last save."""
    return [
        "train",
        f"--config={ROOT / 'experiments' / 'text.py'}:{preset},size=small",
        f"--workdir={path}",
        f"--config.train.steps={2 * WINDOW * (saves + 1)}",
        f"--config.train.batch_size={batch}",
        "--config.train.accumulation=1",
        f"--config.data.context={context}",
        "--config.data.path=pydoc",
        "--config.data.tokenizer=bytes",
        f"--config.checkpoint.every={2 * WINDOW}",
        "--config.eval.every=0",
        "--config.eval.sequences=2",
        "--config.eval.batch_size=2",
        "--config.eval.curve_steps=0",
        "--config.eval.sample_tokens=0",
        # The numbers of an update are waited for while the next one runs, and no later.
        "--config.log.every=1",
        "--config.log.plots=false",
        "--config.log.tensorboard=false",
    ]


def windows(seconds: Sequence[float], saves: int) -> list[tuple[float, float]]:
    """Seconds of the updates with each save, and the mean of those around it.

    Args:
      seconds: when each update was made, the first of them first.
      saves: how many there were, one every two windows.
    """

    def length(first: int) -> float:
        return seconds[first + WINDOW] - seconds[first]

    starts = [2 * WINDOW * (save + 1) - LEAD for save in range(saves)]
    return [
        (length(start), (length(start - WINDOW) + length(start + WINDOW)) / 2)
        for start in starts
    ]


def measure(preset: str, batch: int, context: int, saves: int) -> dict[str, Any]:
    """Trains and tells what saving cost.

    Args:
      preset: words of experiments/text.py.
      batch: sequences of an update.
      context: tokens of a sequence.
      saves: how many are timed.

    Raises:
      RuntimeError: if training fails.
    """
    with tempfile.TemporaryDirectory(prefix="ebt-saving-") as folder:
        path = Path(folder).absolute()
        if code := cli.run(command(path, preset, batch, context, saves)):
            raise RuntimeError(f"ebt train ended with exit code {code}")
        lines = (path / "metrics.jsonl").read_text().splitlines()
        saved = manifest.read(directory_of(path, checkpoint_steps(path)[-1]))
    rows = [json.loads(line) for line in lines]
    pairs = windows([row["seconds"] for row in rows], saves)
    percent = [100 * (with_save / around - 1) for with_save, around in pairs]
    waited = [row["seconds/checkpoint"] for row in rows if row["seconds/checkpoint"]]
    return {
        "preset": preset,
        "batch": batch,
        "context": context,
        "checkpoint_mb": round(saved.bytes / 1e6, 1),
        "seconds_per_update": round(statistics.median(p[1] for p in pairs) / WINDOW, 4),
        "waited_seconds_per_save": round(statistics.median(waited), 3),
        "percent": round(statistics.median(percent), 2),
        "percent_of_each_save": [round(value, 2) for value in percent],
    }


def main(argv: Sequence[str]) -> int:
    """Runs this program; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="s1", help="words of experiments/text.py")
    parser.add_argument("--batch", type=int, default=2, help="sequences of an update")
    parser.add_argument("--context", type=int, default=128, help="tokens of each")
    parser.add_argument("--saves", type=int, default=4, help="how many are timed")
    given = parser.parse_args(argv)
    result = measure(given.preset, given.batch, given.context, given.saves)
    for name, value in result.items():
        print(f"{name:<25}{value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
