import json
import os
import threading

import pytest

from ebt_jax.errors import UserError
from ebt_jax.training.config import LogConfig
from ebt_jax.training.watch import Watch, Watchdog


def beat(path):
    return json.loads((path / "heartbeats" / "process-00000.json").read_text())


def test_heartbeats_tell_step_and_phase(tmp_path):
    with Watch(tmp_path, LogConfig(), 3) as watch:
        assert beat(tmp_path)["phase"] == "compiling"
        watch.after_step(4, None)
        watch.logged()
        assert beat(tmp_path)["step"] == 4 and beat(tmp_path)["pid"] == os.getpid()
        with watch.phase("evaluating"):
            assert beat(tmp_path)["phase"] == "evaluating"
        assert beat(tmp_path)["phase"] == "training"
    assert beat(tmp_path)["phase"] == "ended"
    assert not list(tmp_path.glob("stacks-*"))  # nothing has hung


def test_a_workdir_that_cannot_be_written_ends_nothing(tmp_path):
    with Watch(tmp_path / "gone", LogConfig(), 0) as watch:
        watch.before_step(1)
        watch.after_step(1, None)
        watch.logged()
    assert not (tmp_path / "gone").exists()
    with Watch(tmp_path, LogConfig(), 0), pytest.raises(KeyError):
        raise KeyError
    with pytest.raises(KeyError), Watch(tmp_path, LogConfig(), 0):
        raise KeyError
    assert beat(tmp_path)["phase"] == "ended: KeyError"


def test_a_hang_is_written_down_and_told(tmp_path, capfd):
    file = tmp_path / "stacks.txt"
    dog = Watchdog(0.1, file)
    dog.start()
    dog.alive()
    told = ""
    for _ in range(200):  # a hang, until it was seen
        threading.Event().wait(0.05)
        told += capfd.readouterr().err
        if "no step has finished" in told and file.stat().st_size:
            break
    dog.stop()
    assert "warning: process 0: no step has finished for" in told
    assert "test_a_hang_is_written_down" in file.read_text()


def test_patience_while_something_longer_goes_on(tmp_path):
    dog = Watchdog(0.0, tmp_path / "stacks.txt")
    dog.start()  # 0 is off
    dog.alive()
    dog.stop()
    assert not list(tmp_path.iterdir())


def profiles(path, config, steps):
    with Watch(path, config, 0) as watch:
        for step in range(1, steps + 1):
            watch.before_step(step)
            watch.after_step(step, None)


def test_profiles_of_named_steps_and_on_request(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda d: calls.append(d))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    profiles(tmp_path, LogConfig(profile_step=3, profile_steps=2), 6)
    assert calls == [str(tmp_path / "profile-3"), "stop"]
    assert f"until 4 is in {tmp_path / 'profile-3'}" in capsys.readouterr().err
    (tmp_path / "profile").touch()
    profiles(tmp_path, LogConfig(profile_steps=50), 2)  # ends with the run
    assert calls[2:] == [str(tmp_path / "profile-1"), "stop"]
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_fails_is_told(tmp_path, monkeypatch, capsys):
    def fail(directory):
        raise RuntimeError("only one at a time")

    monkeypatch.setattr("jax.profiler.start_trace", fail)
    profiles(tmp_path, LogConfig(profile_step=1), 2)
    assert "steps from 1 on cannot be profiled: only one" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value", [("hang_seconds", -1), ("profile_step", -1), ("profile_steps", 0)]
)
def test_what_cannot_be_watched(name, value):
    with pytest.raises(UserError, match=f"log.{name} is {value}, but has to be"):
        LogConfig(**{name: value})
