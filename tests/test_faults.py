"""The pieces of tests/faults.py; the script itself is run by hand."""

import json
import os
import random
import signal
import sys
import threading

import fault_runs
import fault_signals
import faults
import numpy as np
import pytest
import saving_cost
from fault_damage import DAMAGES, array_files, cut, flip_bit, remove
from fault_runs import (
    DELAYS,
    Job,
    Lab,
    Moment,
    Start,
    Trial,
    choose_moment,
    command,
    compare,
    examples,
    last_update,
    newest_good,
)

from ebt_jax import cli
from ebt_jax.errors import StorageError
from ebt_jax.training import manifest
from ebt_jax.training.examples import example_log
from ebt_jax.training.workdir import replace_text
from ebt_jax.training.writers import storage_explained


def checkpoint(path, step, sealed=True):
    """A checkpoint of two files."""
    directory = path / "checkpoints" / str(step)
    (directory / "state" / "d").mkdir(parents=True)
    (directory / "state" / "d" / "abc").write_bytes(bytes(range(200)))
    (directory / "metadata").write_text("{}")
    if sealed:
        manifest.write(directory, saved=0.0, metrics={})
    return directory


def finished(path, loss=1.0, first=0, tokens_per_second=1.0):
    """The workdir of a run of two updates."""
    path.mkdir()
    rows = [
        {"step": 1, "train/loss": loss, "tokens_per_second": tokens_per_second},
        {"step": 2, "train/loss": None, "eval/nll": 2.0, "seconds": 3.0},
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "summary.json").write_text(json.dumps({"step": 2, "eval/nll": 2.0}))
    for index in (0, 1):
        ids = [{"step": step, "ids": [first + index, step]} for step in (1, 2)]
        text = "".join(json.dumps(row) + "\n" for row in ids)
        (path / f"examples-{index}.jsonl").write_text(text)
    return path


def test_each_damage_is_found_by_the_manifest(tmp_path):
    for number, (what, damaging) in enumerate(DAMAGES.items()):
        for step, name in enumerate(("state/d/abc", "metadata", manifest.NAME)):
            directory = checkpoint(tmp_path / f"{number}-{step}", 5)
            before = (directory / name).stat()
            damaging(directory / name, random.Random(number))
            (problem,) = manifest.verify(directory)
            assert problem.startswith(f"{name} "), what
            if damaging is flip_bit:
                after = (directory / name).stat()
                assert (after.st_size, after.st_mtime_ns) == (
                    before.st_size,
                    before.st_mtime_ns,
                )
            assert newest_good(directory.parents[1]) is None


def test_one_bit_is_one_bit(tmp_path):
    file = tmp_path / "file"
    for seed in range(20):
        file.write_bytes(bytes(50))
        flip_bit(file, random.Random(seed))
        assert sum(byte.bit_count() for byte in file.read_bytes()) == 1
    cut(file, random.Random(0))
    assert file.stat().st_size < 50
    remove(file, random.Random(0))
    assert not file.exists()


def test_array_files(tmp_path):
    assert array_files(checkpoint(tmp_path, 5)) == ["state/d/abc"]


def test_newest_good(tmp_path):
    assert newest_good(tmp_path) is None
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 15, sealed=False)
    assert newest_good(tmp_path) == 10


@pytest.mark.parametrize("kind", DELAYS)
def test_moments_are_those_of_the_seed(kind):
    moments = [choose_moment(random.Random(3), kind) for _ in range(2)]
    assert moments[0] == moments[1] and moments[0].kind == kind
    draw = random.Random(0)
    many = [choose_moment(draw, kind) for _ in range(100)]
    assert min(m.count for m in many) == 1
    assert 0 <= min(m.delay for m in many) < max(m.delay for m in many) <= DELAYS[kind]


def test_runs_are_compared(tmp_path):
    expected = finished(tmp_path / "expected")
    assert examples(expected) == {1: [0, 1, 1, 1], 2: [0, 2, 1, 2]}
    # Speed and time may differ, and nothing else.
    assert not compare(finished(tmp_path / "a", tokens_per_second=9.0), expected)
    close = finished(tmp_path / "b", loss=1.000001)
    assert compare(close, expected) == ["step 1: train/loss 1.000001 not 1.0"]
    assert not compare(close, expected, tolerance=1e-5)
    other = finished(tmp_path / "c", first=7)
    assert compare(other, expected) == ["other examples, or in another order"]
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(text.replace("eval/nll", "eval/other"))
    assert compare(other, expected)[0] == "step 2: only one has eval/nll, eval/other"
    (other / "metrics.jsonl").write_text(text.split("\n")[0] + "\n")
    assert compare(other, expected)[0].startswith("1 rows of metrics, not 2")


STUB = """
import json, os, sys, time
from pathlib import Path
path = Path(sys.argv[1])
(path / "checkpoints").mkdir(parents=True, exist_ok=True)
print(sys.argv[2], file=sys.stderr, flush=True)
for step in range(int(sys.argv[3]), 1000):
    with (path / "examples-0.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "ids": []}) + chr(10))
    if step % 5 == 0:
        (path / "checkpoints" / f"{step}.orbax-checkpoint-tmp").mkdir()
    time.sleep(0.002)
"""


def stub(monkeypatch, says, first):
    """Starts a program that behaves like a run from its update `first` on."""
    monkeypatch.setattr(
        fault_runs,
        "command",
        lambda job: [sys.executable, "-c", STUB, str(job.workdir), says, str(first)],
    )


@pytest.mark.parametrize("kind", DELAYS)
def test_a_start_is_watched_for_a_moment(tmp_path, monkeypatch, kind):
    stub(monkeypatch, "hello", 1)
    path = tmp_path / "run"
    (path / "checkpoints" / "3").mkdir(parents=True)  # from before, never finished
    with Start(Job(path)) as start:
        assert start.wait_for_line("hello")
        if kind == "sealing":
            (path / "checkpoints" / "4").mkdir()
        assert start.wait_for(Moment("update", 1, 0.0))
        assert start.wait_for(Moment(kind, 1, 0.001))
        start.process.send_signal(signal.SIGKILL)
        assert start.end() == -signal.SIGKILL
        assert not start.wait_for(Moment("update", 10**6, 0.0))
    assert start.lost == 0 and start.damaged == [3]
    assert start.mistakes() == ["did not say that checkpoint 3 is damaged"]


def test_where_a_start_has_to_begin(tmp_path, monkeypatch):
    path = tmp_path / "run"
    checkpoint(path, 5)
    (path / "examples-0.jsonl").write_text('{"step": 7, "ids": []}\n')
    for says, mistakes, lost in (
        ("continuing at step 5", [], 2),
        ("continuing at step 4", ["continued at 4, but 5 is good"], 3),
        ("from the start", ["continued at None, but 5 is good"], 7),
    ):
        stub(monkeypatch, says, 6)
        (path / "examples-0.jsonl").write_text('{"step": 7, "ids": []}\n')
        with Start(Job(path)) as start:
            assert start.wait_for_line(says)
            while last_update(path) == 7:  # until it makes updates of its own
                pass
        assert (start.mistakes(), start.lost) == (mistakes, lost)


def test_the_command_of_a_job(tmp_path):
    alone = command(Job(tmp_path, "s1", ("--config.log.every=3",)))
    assert alone[1:4] == ["-m", "ebt_jax", "train"] and alone[-1].endswith("every=3")
    several = command(Job(tmp_path, processes=2, launcher=("--retries=1",)))
    at = several.index("--")
    assert several[at - 3 : at] == ["--processes=2", "--devices=1", "--retries=1"]
    assert several[at + 1 :] == command(Job(tmp_path))[3:]


def test_the_table_and_the_exit_code(tmp_path, monkeypatch, capsys):
    def good(lab):
        yield Trial("a", [], True, 3, True)
        yield Trial("a", [], True, 5, True)

    def bad(lab):
        yield Trial("b", ["exit code 1"], False, None, False)

    def impossible(lab):
        raise PermissionError("left out: no right to mount")
        yield

    cases = {"good": good, "bad": bad, "impossible": impossible}
    monkeypatch.setattr(faults, "CASES", cases)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "table.json"
    assert faults.main(["--only=good,impossible", f"--json={file}"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["a", *"2 2 of 2 2 5 2 of 2".split()]
    assert table[2:] == [
        "impossible: left out: no right to mount",
        "2 of 2 faults survived",
    ]
    (row,) = json.loads(file.read_text())["faults"]
    assert row["tried"] == row["survived"] == 2 and row["lost"] == 5
    assert faults.main(["--only=good,bad"]) == 1
    told = capsys.readouterr()
    assert "2 of 3 faults survived" in told.out and "NOT SURVIVED" in told.err
    with pytest.raises(SystemExit):
        faults.main(["--only=other"])
    assert "known are good, bad, impossible" in capsys.readouterr().err


def test_what_a_stopped_run_has_to_leave(tmp_path):
    lab = Lab(tmp_path, 0, quick=True)
    assert lab.some(40, 5) == 5 and lab.workdir("a") != lab.workdir("a")
    path = tmp_path / "run"
    checkpoint(path, 5)
    (path / "examples-0.jsonl").write_text('{"step": 7, "ids": []}\n')

    class Ended:
        workdir = path
        told = (
            "stopped: SIGTERM or a preemption notice at step 7 of 150, which is saved"
        )

    trial = fault_signals.stopped(Trial("x", []), Ended(), 75)
    assert trial.problems == ["5 is saved, not 7"] and trial.reported
    trial = fault_signals.stopped(Trial("x", []), Ended(), 1)
    assert trial.problems[0].startswith("exit code 1, not 75")


def test_windows_around_saves():
    seconds, now = [], 0.0
    for update in range(1, 301):
        now += 1.0 + (10.0 if update == 103 else 0.0) + (5.0 if update == 210 else 0.0)
        seconds.append(now)
    assert saving_cost.windows(seconds, saves=2) == [(60.0, 50.0), (55.0, 50.0)]


# What the script has found.


def test_examples_wait_while_they_cannot_be_written(tmp_path):
    (tmp_path / "config.json").write_text("")
    batch = {"index": np.arange(2)}
    with example_log(tmp_path, True, 0) as write:
        write(1, batch)
        file = tmp_path / "examples-0.jsonl"
        file.rename(tmp_path / "kept")
        file.mkdir()  # not writable, as a full disk
        write(2, batch)
        file.rmdir()
        (tmp_path / "kept").rename(file)
        write(3, batch)
    assert examples(tmp_path) == {1: [0, 1], 2: [0, 1], 3: [0, 1]}


def test_storage_that_fails_anywhere_is_told_in_a_line(tmp_path):
    file = tmp_path / "away" / "summary.json"
    with pytest.raises(StorageError, match="No such file or directory; make room or"):
        with storage_explained():
            replace_text(file, "text")


def test_threads_that_wait_do_not_keep_the_command_line(monkeypatch):
    codes, threads = [], [threading.main_thread()]
    monkeypatch.setattr(threading, "enumerate", lambda: threads)
    monkeypatch.setattr(cli, "run", lambda argv: 75)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 75 and not codes
    threads.append(threading.Thread(daemon=False))
    cli.main()
    assert codes == [75]
