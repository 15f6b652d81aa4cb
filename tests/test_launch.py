"""Several processes on this host: exit codes, signals, retries, what is printed."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import local
import processes
import pytest
from processes import Outcome, Process

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
TRAIN = ["--", "train", "--config=experiments/text.py:tiny", "--workdir=runs/a"]


def shells(*scripts):
    """Processes that each run a shell script."""
    return [Process(["sh", "-c", script], {}) for script in scripts]


def supervise(*scripts, grace=5.0, retries=0):
    return processes.supervise(lambda: shells(*scripts), grace, retries, backoff=0.0)


@pytest.mark.parametrize(
    ("ended", "outcome"),
    [
        ([0, 0], Outcome(0, again=False)),
        ([75, 3, 2, -9], Outcome(3, again=False)),
        ([-9, 75, 2], Outcome(2, again=False)),
        ([1, -9, 75], Outcome(75, again=True)),
        ([0, -9, 1], Outcome(137, again=True)),
        ([1, -6], Outcome(1, again=False)),
        ([130], Outcome(130, again=False)),
    ],
)
def test_the_most_telling_exit_code(ended, outcome):
    assert processes.verdict(ended) == outcome


@pytest.mark.parametrize(
    ("scripts", "code"),
    [(("", ""), 0), (("exit 1", "exit 3"), 3), (("kill -9 $$", ""), 137)],
)
def test_exit_codes_of_processes(scripts, code):
    assert supervise(*scripts) == code


def test_the_first_that_ends_decides_and_the_rest_is_killed(capfd):
    assert supervise("exit 4", "exec sleep 60", grace=0.2) == 4
    error = capfd.readouterr().err
    assert "process 0 ended with exit code 4" in error
    assert "kills the 1 left after 0.2 s of grace" in error


def test_those_that_stop_by_themselves_are_not_killed(capfd):
    assert supervise("exit 1", "sleep 0.3; exit 75") == 75
    assert "kills" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("first", "retries", "code", "starts"),
    [
        ("exit 75", 1, 0, 2),
        ("kill -9 $$", 1, 0, 2),
        ("exit 75", 0, 75, 1),
        ("exit 1", 5, 1, 1),
        ("exit 2", 5, 2, 1),
        ("exit 3", 5, 3, 1),
    ],
)
def test_started_again_after_75_and_death_alone(
    first, retries, code, starts, tmp_path, capfd
):
    log = shlex.quote(str(tmp_path / "log"))
    script = f"echo start >> {log}; [ $(wc -l < {log}) -gt 1 ] || {{ {first}; }}"
    assert supervise(script, retries=retries) == code
    assert len((tmp_path / "log").read_text().splitlines()) == starts
    assert ("starts again in 0 s (1 of 1)" in capfd.readouterr().err) == (starts == 2)


def test_every_start_has_a_plan_of_its_own():
    plans = iter([shells("exit 75"), shells("exit 75"), shells("exit 0")])
    assert processes.supervise(lambda: next(plans), 1.0, 2, 0.0) == 0
    assert next(plans, None) is None


def test_lines_of_other_processes_are_prefixed(capfd):
    scripts = ["printf 'a\\rb'", "echo c; echo d >&2; printf e"]
    assert supervise(*scripts) == 0
    out, error = capfd.readouterr()
    assert sorted(out.replace("a\rb", "").splitlines()) == ["[1] c", "[1] e"]
    assert "a\rb" in out
    assert error.splitlines() == ["[1] d"]


@pytest.fixture(autouse=True)
def closed_terminals_are_heard():
    """Also where the tests themselves were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def launched(tmp_path, script, processes=2, before=()):
    """A launcher of that script, started, once each of its processes has begun."""
    ready = tmp_path / "ready"
    ready.mkdir()
    scripts = [
        f"{script}\ntouch {shlex.quote(str(ready / str(i)))}\n"
        "while :; do sleep 0.02; done"
        for i in range(processes)
    ]
    code = (
        "import sys\n"
        "from processes import Process, supervise\n"
        "scripts = sys.argv[1:]\n"
        "plan = lambda: [Process(['sh', '-c', s], {}) for s in scripts]\n"
        "sys.exit(supervise(plan, 30.0, 5, 0.0))"
    )
    launcher = subprocess.Popen(
        [*before, sys.executable, "-c", code, *scripts],
        env=os.environ | {"PYTHONPATH": f"{LAUNCH}:{LAUNCH.parent}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(ready.iterdir())) < processes:
        assert launcher.poll() is None
        time.sleep(0.02)
    return launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_to_all(number, tmp_path):
    launcher = launched(tmp_path, "trap 'exit 75' TERM INT")  # not HUP
    launcher.send_signal(number)
    _, error = launcher.communicate(timeout=20)
    assert launcher.returncode == 75
    assert "starts again" not in error  # it was told to stop


def test_nohup_keeps_its_meaning(tmp_path):
    launcher = launched(tmp_path, "trap 'exit 75' TERM", before=["nohup"])
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 75


def test_the_second_interrupt_kills(tmp_path):
    got = tmp_path / "got"
    launcher = launched(tmp_path, f"trap 'touch {shlex.quote(str(got))}' INT")
    launcher.send_signal(signal.SIGINT)
    while not got.exists():
        time.sleep(0.02)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=20)
    assert launcher.returncode == 137


def test_commands_of_a_run(capsys):
    flags = ["--processes=2", "--devices=3", "--port=1234", "--dry_run"]
    assert local.main([*flags, *TRAIN[:-1], "--workdir=a b"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    for i, words in enumerate(lines):
        assert {"JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=3"} <= set(words)
        at = words.index(sys.executable)
        assert words[at + 1 : at + 4] == ["-m", "ebt_jax", "train"]
        assert words[at + 5 :] == [
            "--workdir=a b",
            "--coordinator=127.0.0.1:1234",
            "--num_processes=2",
            f"--process_id={i}",
        ]


def test_one_process_needs_no_coordinator(capsys):
    assert local.main(["--dry_run", *TRAIN]) == 0
    assert "--coordinator" not in capsys.readouterr().out


def test_gpus_are_shared_out():
    share = processes.share(1, 2, 2, "cuda", {})
    assert share["CUDA_VISIBLE_DEVICES"] == "2,3"
    share = processes.share(1, 2, 1, "cuda", {"CUDA_VISIBLE_DEVICES": "5,7"})
    assert share["CUDA_VISIBLE_DEVICES"] == "7"


def test_threads_are_shared_out_unless_they_are_set():
    cores = len(os.sched_getaffinity(0))
    assert processes.share(0, 1, 1, "cpu", {})["NPROC"] == str(cores)
    assert processes.share(0, 2 * cores, 1, "cpu", {})["NPROC"] == "1"
    assert "NPROC" not in processes.share(0, 1, 1, "cpu", {"NPROC": "7"})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "behind `--` comes the command of ebt"),
        (["--", "evaluate"], "not 'evaluate'"),
        (["train"], "unexpected 'train'"),
        (["--proceses=2", *TRAIN], "Unknown command line flag 'proceses'"),
        (["--processes=0", *TRAIN], "--processes=0: 0 is not a positive integer"),
        (["--platform=tpu", *TRAIN], "one of <cpu|cuda>"),
        (["--platform=cuda", "--devices=3", *TRAIN], "names 2 GPUs, but 1 x 3"),
    ],
)
def test_mistakes(argv, message, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert local.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_help(capsys):
    assert local.main(["--help"]) == 0
    assert "--retries=N" in capsys.readouterr().out


def test_the_program_reaches_ebt():
    command = [sys.executable, LAUNCH / "local.py", "--", "train", "--config=no.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "config file 'no.py' does not exist" in done.stderr
