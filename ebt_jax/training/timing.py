"""Where the time goes: input, updates, checkpoints; and what it is worth."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import jax

from ebt_jax.evaluation.flops import analytic_flops, tokens_per_sequence
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config
from ebt_jax.training.resolve import scored_sequences

# Dense bf16 FLOP/s of a device, by the beginning of its `device_kind`. A chip of TPU v4
# and v5p is one device.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
INPUT_SHARE = 0.2  # of the time; beyond it a run is said to wait for its input
INPUT_SECONDS = 30.0  # over which that is judged
INPUT_SILENCE = 600.0  # between two warnings


def peak_flops(device_kind: str) -> float | None:
    """bf16 FLOP/s of a kind of device; None where it is not known."""
    found = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def flops_per_update(config: Config, params: PyTree) -> float | None:
    """FLOPs that the mathematics needs for one update, over all devices.

    With a replay buffer: once there is enough in it.

    Args:
      config: resolved.
      params: shapes of the parameters; None is returned for those of other models.
    """
    if "blocks" not in params:
        return None
    tokens = scored_sequences(config) * tokens_per_sequence(config)
    return analytic_flops(config, params).total * tokens


def memory_peak() -> dict[str, float]:
    """`device_memory_peak_bytes`, the largest of this process's devices, if known."""
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    return {"device_memory_peak_bytes": float(max(peaks))} if peaks else {}


class Stopwatch:
    """Splits the time between two logged steps into what it was used for.

    Nothing is waited for: what is neither input nor checkpoint counts as update, also
    while the device works and the host prepares the next batch.
    """

    def __init__(
        self,
        step: int,
        *,
        flops: float | None = None,
        devices: int = 1,
        device_kind: str = "",
        unit: str = "tokens",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the first window.

        Args:
          step: updates made before.
          flops: of an update, over all devices; None if not known.
          devices: how many there are.
          device_kind: what they are.
          unit: what is counted per second: tokens, frames or images.
          clock: seconds.
        """
        peak = peak_flops(device_kind)
        self._seconds_at_peak = flops / (peak * devices) if flops and peak else None
        self._clock, self._rate = clock, f"{unit}_per_second"
        self._input_bound = _InputBound()
        self.restart(step)

    def restart(self, step: int) -> None:
        """Leaves what happened until now out of the next window."""
        self._step, self._began = step, self._clock()
        self._spent = {"input": 0.0, "checkpoint": 0.0}

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Counts the time inside for `input` or `checkpoint`."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent[what] += self._clock() - began

    def lap(self, step: int, tokens: float) -> dict[str, float]:
        """Numbers of the window that ends here; the next one begins.

        Args:
          step: updates made.
          tokens: predictions scored in each of them.

        Returns:
          `tokens_per_second`, or of another unit; per update `seconds/input`,
          `seconds/checkpoint` and `seconds/step`, which is the rest; `mfu`, model
          FLOP/s over the devices' peak, and `device_memory_peak_bytes` where they are
          known.
        """
        updates = max(step - self._step, 1)
        total = max(self._clock() - self._began, 1e-9)
        rest = max(total - sum(self._spent.values()), 0.0)
        numbers = {self._rate: round(tokens * updates / total, 1)}
        for what, seconds in {**self._spent, "step": rest}.items():
            numbers[f"seconds/{what}"] = round(seconds / updates, 6)
        if self._seconds_at_peak is not None:
            numbers["mfu"] = round(self._seconds_at_peak * updates / total, 4)
        self._input_bound.add(self._spent["input"], total)
        self.restart(step)
        return numbers | memory_peak()

    def input_warning(self) -> str | None:
        """A line, now and then, if updates wait for their input; else None."""
        return self._input_bound.warning(self._clock())


class _InputBound:
    """Judges over many steps whether they wait for their input."""

    def __init__(self) -> None:
        self._waited = self._total = 0.0
        self._said: float | None = None

    def add(self, waited: float, total: float) -> None:
        self._waited += waited
        self._total += total

    def warning(self, now: float) -> str | None:
        if self._total < INPUT_SECONDS:
            return None
        share = self._waited / self._total
        self._waited = self._total = 0.0
        silent = self._said is not None and now - self._said < INPUT_SILENCE
        if share <= INPUT_SHARE or silent:
            return None
        self._said = now
        return (
            f"warning: {share:.0%} of the time goes into waiting for input; raise "
            "data.num_workers, or let `ebt prepare` tokenize or encode the data once"
        )
