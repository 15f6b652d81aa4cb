import dataclasses
from types import SimpleNamespace

import jax
import pytest

from ebt_jax.training import timing
from ebt_jax.training.config import Config, ModelConfig
from ebt_jax.training.objective import build_objective
from ebt_jax.training.resolve import resolve
from ebt_jax.training.timing import Stopwatch, flops_per_update, peak_flops


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def spend(watch, clock, what, seconds):
    with watch.spending(what):
        clock.now += seconds


def test_time_is_split_into_what_it_was_used_for():
    clock = Clock()
    watch = Stopwatch(
        10, flops=989e12, devices=2, device_kind="NVIDIA H200", clock=clock
    )
    spend(watch, clock, "input", 1.0)
    spend(watch, clock, "checkpoint", 2.0)
    clock.now = 10.0
    assert watch.lap(14, tokens=100.0) == {
        "tokens_per_second": 40.0,
        "seconds/input": 0.25,
        "seconds/checkpoint": 0.5,
        "seconds/step": 1.75,
        "mfu": 0.2,  # 4 updates in 10 s, each half a second's work for two devices
    }
    clock.now = 50.0
    watch.restart(14)  # an evaluation, say
    clock.now = 51.0
    assert watch.lap(15, tokens=100.0)["tokens_per_second"] == 100.0


def test_no_mfu_where_the_peak_is_not_known():
    watch = Stopwatch(0, flops=1.0, device_kind="cpu")
    assert "mfu" not in watch.lap(1, tokens=1.0)
    watch = Stopwatch(0, flops=None, device_kind="TPU v4")
    assert "mfu" not in watch.lap(1, tokens=1.0)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_flops_of_an_update(toy):
    config = Config(model=ModelConfig(num_layers=1, num_heads=2, dim=8))
    config = resolve(config, 11)
    shapes = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    once = flops_per_update(config, shapes)
    train = dataclasses.replace(config.train, batch_size=2 * config.train.batch_size)
    assert once and flops_per_update(
        dataclasses.replace(config, train=train), shapes
    ) == pytest.approx(2 * once)
    assert flops_per_update(config, {"table": shapes["blocks"]}) is None


def test_memory_of_the_fullest_device(monkeypatch):
    devices = [
        SimpleNamespace(memory_stats=lambda peak=peak: peak)
        for peak in ({"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 5}, None, {})
    ]
    monkeypatch.setattr("jax.local_devices", lambda: devices)
    assert timing.memory_peak() == {"device_memory_peak_bytes": 5.0}
    monkeypatch.setattr("jax.local_devices", lambda: devices[2:])
    assert timing.memory_peak() == {}


def test_waiting_for_input_is_told_now_and_then():
    clock, told = Clock(), []
    watch = Stopwatch(0, clock=clock)
    for step in range(1, 101):
        spend(watch, clock, "input", 3.0)
        clock.now += 7.0
        watch.lap(step, tokens=1.0)
        if line := watch.input_warning():
            told.append((clock.now, line))
    first, second = told
    assert first[0] == 30.0 and second[0] == 630.0
    assert first[1].startswith("warning: 30% of the time goes into waiting for input;")


def test_little_waiting_is_not():
    clock = Clock()
    watch = Stopwatch(0, clock=clock)
    for step in range(1, 20):
        spend(watch, clock, "input", 1.0)
        clock.now += 9.0
        watch.lap(step, tokens=1.0)
        assert watch.input_warning() is None
