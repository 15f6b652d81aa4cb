import errno
import json
import os
import sys
import types

import pytest

from ebt_jax.errors import Stopped, StorageError, UserError
from ebt_jax.training.config import LogConfig
from ebt_jax.training.monitor import (
    Monitor,
    check_logging,
    progress_line,
    rewind,
    short_count,
    short_duration,
)
from ebt_jax.training.writers import TensorBoard


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def rows(path):
    return [
        json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()
    ]


def test_one_object_per_step(workdir, toy):
    clock = Clock()
    with Monitor(workdir, toy.config(), start=0, clock=clock) as monitor:
        clock.now = 2.0
        monitor.record(4, {"train/loss": 2.5, "tokens_per_second": 200.0})
        clock.now = 6.0
        monitor.record(5, {"eval/perplexity": float("inf"), "tokens_per_second": 9.0})
    assert rows(workdir) == [
        {"step": 4, "train/loss": 2.5, "tokens_per_second": 200.0, "seconds": 2.0},
        {"step": 5, "eval/perplexity": None, "tokens_per_second": 9.0, "seconds": 6.0},
    ]


def test_later_lines_are_dropped_and_seconds_go_on(workdir, toy):
    lines = [{"step": s, "seconds": 10.0 * s} for s in (1, 2, 4, 6)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 8, "sec')
    clock = Clock()
    with Monitor(workdir, toy.config(), start=4, clock=clock) as monitor:
        clock.now = 3.0
        monitor.record(6, {"tokens_per_second": 1.0})
    assert rows(workdir) == [
        *lines[:3],
        {"step": 6, "tokens_per_second": 1.0, "seconds": 43.0},
    ]


@pytest.mark.parametrize(
    "text, kept", [("", 0), ('{"step": 1, "seconds": 1}\n{"st', 1)]
)
def test_half_a_line_is_dropped(tmp_path, text, kept):
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    assert rewind(file, 9) == float(kept)
    assert len(file.read_text().splitlines()) == kept
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_files(workdir, toy):
    config = toy.config(log={"tensorboard": True})
    with Monitor(workdir, config, start=0) as monitor:
        row = {"train/loss": 1.0, "eval/perplexity": float("nan")}
        monitor.record(1, {**row, "tokens_per_second": 1.0})
    (file,) = (workdir / "tensorboard").iterdir()
    written = file.read_bytes()
    assert b"train/loss" in written and b"eval/perplexity" not in written


def test_a_full_disk_keeps_numbers_in_memory(workdir, toy, monkeypatch, capsys):
    room, write = [10**6], os.write

    def limited(descriptor, data):
        part = data[: room[0]]
        room[0] -= len(part)
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, part)

    config = toy.config(log={"tensorboard": True})
    monkeypatch.setattr("os.write", limited)
    with Monitor(workdir, config, start=0) as monitor:
        for step in range(1, 7):
            room[0] = {3: 5, 4: 0, 5: 0}.get(step, 10**6)
            monitor.record(step, {"train/loss": 1.0, "tokens_per_second": 1.0})
            written = (workdir / "metrics.jsonl").read_text()
            assert not written or written.endswith("\n")
            if step in (3, 4, 5):
                assert len(rows(workdir)) == 2
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    told = capsys.readouterr().err
    assert told.count("cannot be written: No space left on device; numbers are") == 1
    assert told.count("numbers are written again, also those that were kept") == 1


def test_tensorboard_goes_on_in_another_file(tmp_path, monkeypatch):
    board = TensorBoard(tmp_path / "board", 1)
    board.write(1, {"first": 1.0}, 100.0)
    monkeypatch.setattr(board._writer, "flush", full)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space"):
            board.write(step, {"a": 1.0}, 100.0 * step)
        monkeypatch.setattr(board, "_make_writer", full)
    monkeypatch.undo()
    board.write(4, {"last": 1.0}, 401.0)
    board.close()
    first, second = sorted((tmp_path / "board").iterdir())
    assert b"last" not in first.read_bytes() and b"last" in second.read_bytes()
    assert second.read_bytes().count(b"a") >= 2  # those that had to wait


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_workdir_that_is_not_the_same_any_more(workdir, toy):
    with Monitor(workdir, toy.config(), start=0) as monitor:
        (workdir / "config.json").unlink()
        with pytest.raises(Stopped, match="has vanished: its config.json is not there"):
            monitor.record(1, {"train/loss": 1.0, "tokens_per_second": 1.0})
    assert not (workdir / "metrics.jsonl").exists()


def test_numbers_that_cannot_be_read(workdir, toy, monkeypatch):
    (workdir / "metrics.jsonl").write_text("")
    monkeypatch.setattr("pathlib.Path.read_text", full)
    with pytest.raises(StorageError, match="cannot be read or written: No space"):
        Monitor(workdir, toy.config(), start=0)


def test_missing_wandb_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_logging(LogConfig())
    with pytest.raises(UserError, match=r"pip install 'ebt-jax\[wandb\]'"):
        check_logging(LogConfig(wandb_project="p"))


def test_wandb_sees_one_run_even_when_continued(workdir, monkeypatch, toy):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda exit_code: calls.append(exit_code),
    )

    def init(**settings):
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = toy.config(log={"wandb_project": "p"})
    for start in (0, 1):
        with Monitor(workdir, config, start=start) as monitor:
            row = {"train/loss": 1.0, "tokens_per_second": 1.0}
            monitor.record(start + 1, row)
    first, (step, values), code, second, *_ = calls
    assert first["project"] == "p" and first["id"] == second["id"]
    assert first["config"]["train"]["steps"] == 12
    assert step == 1 and values["train/loss"] == 1.0 and code == 0


def watch(workdir, toy, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    clock = Clock()
    with Monitor(workdir, toy.config(), start=0, clock=clock) as monitor:
        for step in (1, 2, 4, 6):
            clock.now += 4.0
            row = {"train/loss": 2.0, "tokens_per_second": 5.0}
            monitor.record(step, row)
        monitor.say("hello")
        monitor.record(12, row)


def test_progress_on_a_terminal_is_rewritten(workdir, toy, monkeypatch, capsys):
    watch(workdir, toy, monkeypatch, terminal=True)
    first, hello, last, end = capsys.readouterr().err.split("\n")
    assert first.count("\r\x1b[K") == 4 and hello == "hello" and end == ""
    assert last == "\r\x1b[Kstep 12/12 100% | loss 2 | 5 tok/s | 0s left"


def test_progress_in_a_file_is_a_line_now_and_then(workdir, toy, monkeypatch, capsys):
    watch(workdir, toy, monkeypatch, terminal=False)
    assert capsys.readouterr().err.splitlines() == [
        "step 1/12 8% | loss 2 | 5 tok/s",
        "step 6/12 50% | loss 2 | 5 tok/s | 14s left",
        "hello",
        "step 12/12 100% | loss 2 | 5 tok/s | 0s left",
    ]


def test_progress_line():
    row = {"train/loss": 2.3149, "train/nll": 2.29, "tokens_per_second": 41234.0}
    assert progress_line(1200, 5000, row, 192.4) == (
        "step 1200/5000 24% | loss 2.315 | nll 2.29 | 41k tok/s | 3m12s left"
    )


@pytest.mark.parametrize(
    "number, text",
    [(0, "0"), (950, "950"), (4120, "4.1k"), (41234, "41k"), (2e6, "2.0M")],
)
def test_short_count(number, text):
    assert short_count(number) == text


@pytest.mark.parametrize(
    "seconds, text", [(44.6, "45s"), (192, "3m12s"), (7530, "2h05m")]
)
def test_short_duration(seconds, text):
    assert short_duration(seconds) == text
