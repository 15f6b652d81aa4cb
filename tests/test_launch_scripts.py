"""Scripts for TPU slices, SLURM and GKE, against stand-ins for the cloud's programs."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TRAIN = ["--", "--config=experiments/text.py:size=xl", "--workdir=/runs/x l"]
TPU = ["--name=ebt", "--zone=us-east5-a", "--accelerator=v5p-256", "--runtime=v2"]
GKE = ["--name=ebt", "--image=gcr.io/p/ebt:1", "--claim=runs", "--topology=4x4x8"]

# Notes what it is asked; the queue's state and ssh's exit codes come from files, a line
# each time, the last one for ever. `pkill` ends what `train` waits for.
GCLOUD = """#!/bin/bash
echo "$*" >> log
next() {
    head -n 1 "$1"
    [ "$(wc -l < "$1")" -le 1 ] || sed -i 1d "$1"
}
case $* in
*describe*)
    state=$(next states)
    [ "$state" != NONE ] || { echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; }
    [ "$state" != BROKEN ] || { echo "ERROR: no network" >&2; exit 1; }
    echo "$state" ;;
*pkill*) touch stopped ;;
*ebt_jax*)
    code=$(next codes)
    if [ "$code" = wait ]; then
        touch begun
        until [ -e stopped ]; do sleep 0.02; done
        exit 75
    fi
    exit "$code" ;;
esac
"""


def bash(script, *arguments, cwd=LAUNCH.parent, **environment):
    """A finished run of a script."""
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def install(folder, **programs):
    """Programs in a folder of their own; the PATH with it in front."""
    place = folder / "bin"
    place.mkdir()
    for name, text in programs.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    return f"{place}:{os.environ['PATH']}"


def commands(text):
    """Lines of a dry run as words, comments left out."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    assert len(SCRIPTS) == 3
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-s", "bash", path], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tpu_pod.sh", TRAIN, "--name is missing"),
        ("tpu_pod.sh", [*TPU, "--retry=3", *TRAIN], "unexpected '--retry=3'"),
        ("tpu_pod.sh", [*TPU, "--retries=x", *TRAIN], "--retries=x is not a number"),
        ("tpu_pod.sh", [*TPU, "--poll=1s", *TRAIN], "--poll=1s is not a number"),
        ("tpu_pod.sh", TPU, "--config is missing behind --"),
        ("tpu_pod.sh", [*TPU, *TRAIN[:2]], "--workdir is missing behind --"),
        ("slurm.sbatch", ["--dry"], "unexpected '--dry'"),
        ("slurm.sbatch", ["--retries=x", *TRAIN], "--retries=x is not a number"),
        ("slurm.sbatch", ["--", "--workdir=a"], "--config is missing behind --"),
        ("slurm.sbatch", TRAIN[:2], "--workdir is missing behind --"),
        ("slurm.sbatch", TRAIN, "not a SLURM job"),
        ("slurm.sbatch", ["--runs=a", *TRAIN], "exclude each other"),
        ("slurm.sbatch", ["--runs=none"], "--runs=none cannot be read"),
        ("slurm.sbatch", ["--runs=README.md"], "--runs needs an array job"),
        ("gke.sh", TRAIN, "--name is missing"),
        ("gke.sh", [*GKE, "--topologies=a", *TRAIN], "unexpected '--topologies=a'"),
        ("gke.sh", [*GKE, "--topology=4by4", *TRAIN], "is not a topology"),
        ("gke.sh", [*GKE, "--chips=3", *TRAIN], "has 128 chips, which --chips=3"),
        ("gke.sh", [*GKE, "--slices=0", *TRAIN], "--slices=0 is not a positive"),
        ("gke.sh", [*GKE, "--retries=x", *TRAIN], "--retries=x is not a number"),
        ("gke.sh", [*GKE, '--claim=a"b', *TRAIN], "holds a character that is not"),
        ("gke.sh", GKE, "--config is missing behind --"),
        ("gke.sh", [*GKE, *TRAIN[:2], "--workdir=a"], "has to lie under /runs"),
        ("gke.sh", [*GKE, *TRAIN, "--a=b\nc"], "a flag holds a line break"),
    ],
)
def test_mistakes(script, arguments, message):
    done = bash(script, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_tpu_dry_run():
    done = bash("tpu_pod.sh", *TPU, "--spot", "--setup=a && b", "--dry_run", *TRAIN)
    assert done.returncode == 0
    create, look, setup, train, stop, again, delete = commands(done.stdout)
    assert create[:6] == [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "ebt",
    ]
    assert {"--spot", "--accelerator-type=v5p-256", "--node-id=ebt"} <= set(create)
    assert look[4] == "describe"
    assert "--worker=all" in setup
    assert setup[-1] == "--command=a && b"
    assert train == again
    assert shlex.split(train[-1].removeprefix("--command="))[5:] == [
        "-m",
        "ebt_jax",
        "train",
        *TRAIN[1:],
        "--distributed",
    ]
    assert "pkill -TERM" in stop[-1]
    assert delete[4] == "delete"


@pytest.fixture
def cloud(tmp_path):
    """Runs tpu_pod.sh against a cloud with these states and exit codes."""
    path = install(tmp_path, gcloud=GCLOUD)

    def start(states, codes, *arguments):
        (tmp_path / "states").write_text("\n".join(states) + "\n")
        (tmp_path / "codes").write_text("\n".join(codes) + "\n")
        flags = [*TPU, "--poll=0", "--setup=prepare", *arguments, *TRAIN]
        done = bash("tpu_pod.sh", *flags, cwd=tmp_path, PATH=path)
        log = tmp_path / "log"
        return done, [short(line) for line in log.read_text().splitlines()]

    return start


def short(line):
    """What a call of gcloud was for."""
    names = ("create", "describe", "delete", "prepare", "pkill", "train")
    return next(name for name in names if name in line)


def made(log):
    """The calls but for the looks at the state."""
    return [name for name in log if name != "describe"]


def test_tpu_run_from_the_request_to_the_end(cloud):
    states = ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    done, log = cloud(states, ["0"])
    assert done.returncode == 0
    assert made(log) == ["create", "prepare", "train"]
    assert "queued-resources delete ebt" in done.stderr


def test_tpu_training_starts_again_on_the_same_slice(cloud):
    done, log = cloud(["ACTIVE"], ["75", "0"])
    assert done.returncode == 0
    assert made(log) == ["train", "pkill", "train"]


@pytest.mark.parametrize("gone", ["SUSPENDED", "FAILED"])
def test_tpu_slice_that_was_taken_away_is_asked_for_again(gone, cloud):
    states = ["ACTIVE", gone, "DELETING", "NONE", "ACTIVE"]
    done, log = cloud(states, ["255", "0"])
    assert done.returncode == 0
    assert made(log) == ["train", "delete", "create", "prepare", "pkill", "train"]


def test_tpu_other_codes_count_where_the_slice_is_gone(cloud):
    done, log = cloud(["ACTIVE", "SUSPENDING", "NONE", "ACTIVE"], ["1", "0"])
    assert done.returncode == 0
    assert made(log) == ["train", "create", "prepare", "pkill", "train"]


@pytest.mark.parametrize("code", [1, 2, 3])
def test_tpu_codes_that_end_it(code, cloud):
    done, log = cloud(["ACTIVE"], [str(code)])
    assert done.returncode == code
    assert made(log) == ["train"]


def test_tpu_retries_are_counted(cloud):
    done, log = cloud(["ACTIVE"], ["75"], "--retries=2")
    assert done.returncode == 75
    assert made(log).count("train") == 3


def test_tpu_request_that_fails(cloud):
    done, log = cloud(["NONE", "FAILED"], ["0"])
    assert done.returncode == 2
    assert "error: the request for v5p-256 in us-east5-a failed" in done.stderr
    assert made(log) == ["create"]


def test_tpu_network_may_be_away_later_but_not_at_first(cloud):
    done, _ = cloud(["BROKEN"], ["0"])
    assert done.returncode == 2
    assert "error: unknown: ERROR: no network" in done.stderr
    done, log = cloud(["ACTIVE", "BROKEN", "ACTIVE"], ["75", "0"])
    assert done.returncode == 0
    assert "create" not in log


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


def test_tpu_a_signal_stops_training_on_all_hosts(tmp_path):
    path = install(tmp_path, gcloud=GCLOUD)
    (tmp_path / "states").write_text("ACTIVE\n")
    (tmp_path / "codes").write_text("wait\n")
    process = subprocess.Popen(
        ["bash", LAUNCH / "tpu_pod.sh", *TPU, *TRAIN],
        cwd=tmp_path,
        env={"PATH": path},
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "begun", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    log = (tmp_path / "log").read_text().splitlines()
    assert made(map(short, log)) == ["train", "pkill"]


def test_slurm_dry_run():
    done = bash("slurm.sbatch", "--dry_run", *TRAIN)
    train, again = commands(done.stdout)
    assert train[0] == "srun"
    end = ["python", "-m", "ebt_jax", "train", *TRAIN[1:], "--distributed"]
    assert train[-len(end) :] == end
    assert again == ["scontrol", "requeue", "JOB"]


def slurm(folder, code, *arguments, restarts="0", **environment):
    """A finished job whose tasks end with a code; what was asked of scontrol."""
    path = install(
        folder,
        srun=f'#!/bin/sh\nfor word; do echo "$word"; done > tasks\nexit {code}\n',
        scontrol='#!/bin/sh\necho "$*" > requeued\n',
    )
    done = bash(
        "slurm.sbatch",
        *(arguments or TRAIN),
        cwd=folder,
        PATH=path,
        SLURM_JOB_ID="12",
        SLURM_RESTART_COUNT=restarts,
        **environment,
    )
    requeued = folder / "requeued"
    return done.returncode, requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize(
    ("code", "again"),
    [(0, False), (1, False), (2, False), (3, False), (75, True), (137, True)]
    + [(253, False)],
)
def test_slurm_puts_back_what_can_go_on(code, again, tmp_path):
    ended, requeued = slurm(tmp_path, code)
    assert ended == code
    assert requeued == ("requeue 12\n" if again else "")


def test_slurm_restarts_are_counted(tmp_path):
    assert slurm(tmp_path, 75, "--retries=4", *TRAIN, restarts="4") == (75, "")


def test_slurm_array_takes_its_line(tmp_path):
    runs = tmp_path / "list.runs"
    lines = [["--config=a", f"--workdir=w {i}", "--x=$HOME;'"] for i in range(3)]
    runs.write_text("".join(shlex.join(line) + "\n" for line in lines))
    code, _ = slurm(tmp_path, 0, f"--runs={runs}", SLURM_ARRAY_TASK_ID="2")
    assert code == 0
    words = (tmp_path / "tasks").read_text().splitlines()
    assert words[-4:] == [*lines[2], "--distributed"]
    done = bash("slurm.sbatch", f"--runs={runs}", SLURM_ARRAY_TASK_ID="3")
    assert done.returncode == 2
    assert "has no line 3" in done.stderr


def test_slurm_signal_reaches_the_tasks(tmp_path):
    path = install(
        tmp_path,
        srun="#!/bin/sh\ntouch begun\nuntil [ -e told ]; do sleep 0.02; done; exit 75",
        scancel='#!/bin/sh\necho "$*" > told\n',
        scontrol='#!/bin/sh\necho "$*" > requeued\n',
    )
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", *TRAIN],
        cwd=tmp_path,
        env={"PATH": path, "SLURM_JOB_ID": "12"},
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "begun", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "told").read_text() == "--signal=TERM 12\n"
    assert (tmp_path / "requeued").read_text() == "requeue 12\n"


def test_gke_manifest():
    flags = [*GKE, "--slices=2", "--retries=7", "--dry_run", *TRAIN, '--x=\'&"$y"']
    done = bash("gke.sh", *flags)
    assert done.returncode == 0
    assert "@" not in done.stdout.replace("exec python", "")
    manifest = yaml.safe_load(done.stdout)
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "ebt")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (32, 32, 0)
    disrupted, ended = job["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert (disrupted["action"], ended["action"]) == ("Count", "FailJob")
    codes = ended["onExitCodes"]["values"]
    assert {2, 3} <= set(codes)
    assert 75 not in codes
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    (container,) = pod["containers"]
    assert container["name"] == ended["onExitCodes"]["containerName"]
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    words = shlex.split(container["args"][0])
    assert words[:5] == ["exec", "python", "-m", "ebt_jax", "train"]
    assert words[5:] == [*TRAIN[1:], '--x=\'&"$y"', "--distributed"]


def test_gke_applies_the_manifest(tmp_path):
    path = install(
        tmp_path, kubectl='#!/bin/sh\necho "$*" > asked\ncat > applied\nexit 5\n'
    )
    done = bash("gke.sh", *GKE, *TRAIN, cwd=tmp_path, PATH=path)
    assert done.returncode == 5
    assert (tmp_path / "asked").read_text() == "apply -f -\n"
    shown = bash("gke.sh", *GKE, "--dry_run", *TRAIN).stdout
    assert (tmp_path / "applied").read_text() == shown
