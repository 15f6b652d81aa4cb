import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ebt_jax.errors import Stopped, UserError
from ebt_jax.training import checkpoint
from ebt_jax.training.distributed import Processes, running

HERE = Path(__file__).parent


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_together(path, step, events):
    """Exit code and stderr of each of the processes that train in a workdir."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(HERE.parent), *sys.path[1:], str(HERE.parents[1])]
        ),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        processes = []
        for index, event in enumerate(events):
            told = stack.enter_context((path.parent / f"told-{index}").open("w"))
            peer = [str(HERE / "peer.py"), address, str(len(events)), str(index)]
            process = subprocess.Popen(
                [sys.executable, *peer, str(path), str(step), event],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=told,
            )
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        codes = [process.wait(timeout=120) for process in processes]
    return [
        (code, (path.parent / f"told-{i}").read_text()) for i, code in enumerate(codes)
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other(tmp_path, victim):
    events = ["nothing", "nothing"]
    events[victim] = "kill"
    ended = train_together(tmp_path / "run", 25, events)
    code, told = ended[1 - victim]
    assert ended[victim][0] == -signal.SIGKILL
    assert code == 75, told
    line = f"stopped: process {victim} of 2 died or cannot be reached; start all"
    assert told.count(line) == 1
    assert "Traceback" not in told
    assert checkpoint.latest_step(tmp_path / "run") in (10, 20)


def test_sigterm_to_one_stops_all_at_the_same_step_saved(tmp_path):
    ended = train_together(tmp_path / "run", 13, ["nothing", "term"])
    steps = []
    for code, told in ended:
        assert code == 75, told
        (line,) = [line for line in told.splitlines() if line.startswith("stopped: ")]
        steps.append(int(line.split(" at step ")[1].split(" ")[0]))
    assert steps[0] == steps[1] == checkpoint.latest_step(tmp_path / "run")


def test_the_mistake_of_one_ends_all(tmp_path):
    (code, told), (other_code, other) = train_together(
        tmp_path / "run", 13, ["nothing", "mistake"]
    )
    assert (code, other_code) == (75, 2)
    assert "error: this process cannot read its data" in other
    reason = "has ended (error: this process cannot read its data)"
    assert f"stopped: process 1 of 2 {reason}; start all" in told


@pytest.mark.parametrize(
    "given, message",
    [
        ({"coordinator": "a:1"}, "--num_processes is missing; several processes need"),
        ({"count": 2, "index": 0}, "--coordinator is missing"),
        ({"detect": True, "count": 2}, "but --num_processes is given, too"),
        ({"coordinator": "host", "count": 2, "index": 0}, "has to be HOST:PORT"),
        ({"coordinator": "host:0", "count": 2, "index": 0}, "has to be HOST:PORT"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "--process_id is 2, .* to 1"),
    ],
)
def test_flags_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        Processes(**given)


def test_a_single_process_starts_nothing(monkeypatch):
    monkeypatch.setattr("jax.distributed.initialize", None)
    with running(Processes()):
        pass


def test_a_coordinator_that_cannot_be_reached():
    there = Processes(coordinator="nosuch.invalid:1", count=2, index=1)
    with pytest.raises(UserError, match="there is no host 'nosuch.invalid'"):
        with running(there):
            pass
    address = f"127.0.0.1:{free_port()}"
    nobody = Processes(coordinator=address, count=2, index=1, connect_seconds=1)
    with pytest.raises(Stopped, match=f"{address} cannot be reached for 1 s; is proc"):
        with running(nobody):
            pass
