"""Sweeps: what is expanded, the pool of processes, the array of SLURM."""

import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pool
import pytest
import rounds
import sweep
from absl import flags
from pool import Result
from rounds import Run

from ebt_jax.command import load_config
from ebt_jax.errors import UserError
from ebt_jax.training.config import from_config_dict, to_json
from ebt_jax.training.resolve import resolve

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"
TEXT = str(EXPERIMENTS / "text.py")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """The runs of a sweep name their config from there."""
    monkeypatch.chdir(EXPERIMENTS.parent)


def words(capsys):
    """What was printed, split as a shell would."""
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("flags", [[], ["--print"]])
def test_prints_a_command_a_run(flags, capsys):
    path = "--set=config.data.path=my $text;.txt"
    assert sweep.main([TEXT, path, "--only=anchored", *flags]) == 0
    lines = words(capsys)
    assert [line[:2] for line in lines] == [["ebt", "train"]] * 3
    for seed, line in enumerate(lines):
        assert f"--config.train.seed={seed}" in line
        assert "--config.data.path=my $text;.txt" in line
        assert f"--workdir=runs/fidelity/anchored-{seed}" in line


def test_a_set_flag_replaces_the_sweep_s():
    expanded = [{"config": TEXT, "workdir": "a", "config.train.seed": 1}]
    (run,) = rounds.select(expanded, rounds.settings(["config.train.seed=5"]), "")
    assert run == Run("a", [f"--config={TEXT}", "--workdir=a", "--config.train.seed=5"])


def test_shows_what_would_run_here(capsys):
    flags = ["--run=local", "--jobs=2", "--devices=3", "--only=anchored", "--dry_run"]
    assert sweep.main([TEXT, *flags]) == 0
    lines = words(capsys)
    assert len(lines) == 3
    for line in lines:
        assert {"JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=3", "train"} <= set(line)


def test_each_place_has_gpus_of_its_own(capsys, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    flags = ["--run=local", "--jobs=2", "--platform=cuda", "--only=anch", "--dry_run"]
    assert sweep.main([TEXT, *flags]) == 0
    gpus = [word for line in words(capsys) for word in line if "VISIBLE" in word]
    assert gpus == [f"CUDA_VISIBLE_DEVICES={i}" for i in (0, 1, 0)]


def test_shows_the_array_that_would_be_submitted(capsys, tmp_path):
    listed = tmp_path / "list.runs"
    flags = ["--run=slurm", "--jobs=2", f"--list={listed}", "--sbatch=--nodes=1 -p gpu"]
    assert sweep.main([TEXT, "--only=s1,step", *flags, "--dry_run"]) == 0
    *_, last = words(capsys)
    assert last[:5] == ["sbatch", "--array=0-2%2", "--nodes=1", "-p", "gpu"]
    assert last[5].endswith("launch/slurm.sbatch")
    assert last[6:] == ["--retries=3", f"--runs={listed}"]
    assert not listed.exists()


def test_submits_the_array(capfd, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    listed = tmp_path / "deep" / "list.runs"
    flags = ["--run=slurm", f"--list={listed}", "--only=anchored", "--retries=9"]
    assert sweep.main([TEXT, *flags, "--set=config.data.path=a b"]) == 7
    assert "--array=0-2%1" in capfd.readouterr().out
    lines = listed.read_text().splitlines()
    assert len(lines) == 3
    assert shlex.split(lines[2])[-1] == "--config.data.path=a b"


def test_no_sbatch_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ["--run=slurm", f"--list={tmp_path / 'list'}", "--only=anchored"]
    assert sweep.main([TEXT, *flags]) == 2
    assert "sbatch is not on this host's PATH" in capsys.readouterr().err


def pooled(tmp_path, scripts, jobs=2, retries=1):
    """Results of shell scripts in place of training, and their logs."""
    runs = [Run(str(tmp_path / f"run{i}"), []) for i in range(len(scripts))]
    commands = [["sh", "-c", script] for script in scripts]
    places = [{"PLACE": str(i)} for i in range(jobs)]
    results = pool.run_pool(runs, commands, places, retries, backoff=0.0)
    logs = [pathlib.Path(pool.log_of(run)).read_text() for run in runs]
    return runs, results, logs


def test_one_that_fails_stops_no_other(tmp_path, capsys):
    scripts = ["echo hello", "exit 2", "exit 1", "exit 3", "echo 'nothing to do: x'"]
    runs, results, logs = pooled(tmp_path, scripts)
    assert results == [
        Result("done", 0, 1),
        Result("mistake", 2, 1),
        Result("failed", 1, 1),
        Result("diverged", 3, 1),
        Result("was done", 0, 1),
    ]
    assert logs[0] == "hello\n"
    assert pool.exit_code(results) == 1
    header, *rows = pool.table(runs, results).splitlines()
    assert header.split() == ["workdir", "state", "exit", "starts"]
    assert rows[3].split() == [runs[3].workdir, "diverged", "3", "1"]
    assert f"[5/5] {runs[4].workdir}: was done" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["exit 75", "kill -9 $$"])
def test_what_can_go_on_is_started_again(end, tmp_path):
    mark = shlex.quote(str(tmp_path / "mark"))
    script = f"[ -e {mark} ] && echo 'nothing to do' && exit; touch {mark}; {end}"
    _, results, _ = pooled(tmp_path, [script, "exit 75"])
    assert results == [Result("was done", 0, 2), Result("stopped", 75, 2)]
    assert pool.exit_code(results) == 75


def test_logs_grow_and_an_old_line_decides_nothing(tmp_path):
    pooled(tmp_path, ["echo nothing to do"])
    _, results, logs = pooled(tmp_path, ["echo more"])
    assert results == [Result("done", 0, 1)]
    assert logs == ["nothing to do\nmore\n"]


def test_no_more_run_at_once_than_there_are_places(tmp_path):
    lock = shlex.quote(str(tmp_path / "lock"))
    script = f"mkdir {lock} || exit 1; sleep 0.1; rmdir {lock}; echo $PLACE"
    _, results, logs = pooled(tmp_path, [script] * 3, jobs=1)
    assert [result.code for result in results] == [0, 0, 0]
    assert logs == ["0\n"] * 3


def test_a_signal_reaches_what_runs_and_starts_no_more(tmp_path):
    script = (
        "import sys, pool\n"
        "from rounds import Run\n"
        "folder = sys.argv[1]\n"
        "runs = [Run(f'{folder}/run{i}', []) for i in range(2)]\n"
        "wait = 'trap \"exit 75\" TERM; echo ready; while :; do sleep 0.02; done'\n"
        "commands = [['sh', '-c', wait]] * 2\n"
        "results = pool.run_pool(runs, commands, [{}], 5, 0.0)\n"
        "print(pool.table(runs, results))\n"
        "sys.exit(pool.exit_code(results))"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        env={"PYTHONPATH": f"{pathlib.Path(sweep.__file__).parent}:."},
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run0.log"
    while not (log.exists() and "ready" in log.read_text()):
        assert program.poll() is None
        time.sleep(0.02)
    program.send_signal(signal.SIGTERM)
    out, _ = program.communicate(timeout=20)
    assert program.returncode == 75
    states = [line.split()[1:] for line in out.splitlines()[1:]]
    assert states == [["stopped", "75", "1"], ["not", "started", "-", "0"]]


def test_those_of_a_workdir_run_in_order_and_not_behind_a_failure(tmp_path):
    mark = shlex.quote(str(tmp_path / "mark"))
    scripts = [f"sleep 0.2; touch {mark}", f"[ -e {mark} ]", "exit 1", "exit 0", ""]
    names = ["a", "a", "b", "b", "c"]
    runs = [Run(str(tmp_path / name), [], "evaluate") for name in names]
    commands = [["sh", "-c", script] for script in scripts]
    results = pool.run_pool(runs, commands, [{}] * 3, 1, 0.0, done=[4])
    assert results == [
        Result("done", 0, 1),
        Result("done", 0, 1),
        Result("failed", 1, 1),
        Result("left out", None, 0),
        Result("was done", 0, 0),
    ]
    assert pool.exit_code(results) == 1
    row = pool.table(runs, results).splitlines()[4]
    assert row.split() == [runs[3].workdir, "evaluate", "left", "out", "-", "0"]
    assert not (tmp_path / "c.log").exists()


HALVING = """
def sweep(words=""):
    names = words.split("+") if words else ["a", "b"]
    return [run(name) for name in names]

def following(results, words=""):
    if any(name.endswith("2") for name in results):
        return []
    best = min(results, key=results.get)
    return [run(best + "2"), dict(verb="evaluate", workdir=best, sequences=3), run("z")]

def run(name):
    return {"config": "TEXT:tiny", "workdir": name if "/" in name else "FOLDER/" + name}
"""


@pytest.fixture
def halving(tmp_path, monkeypatch):
    """An experiment file, and in place of `ebt train` what leaves a finished run."""
    file = tmp_path / "halving.py"
    file.write_text(HALVING.replace("TEXT", TEXT).replace("FOLDER", str(tmp_path)))
    config = from_config_dict(load_config(f"{TEXT}:tiny"))
    (tmp_path / "resolved.json").write_text(to_json(resolve(config, 256)))
    script = (
        'case $2 in */z) exit 3;; esac; [ "$1" = train ] || exit 0; mkdir -p $2; '
        'echo "{\\"step\\": 6, \\"eval/nll\\": $(echo $2 | wc -c)$3}" > '
        "$2/summary.json; cp $4/resolved.json $2/config.json"
    )

    def command(run):
        last = str(ord(run.workdir[-1]))  # b's loss is higher than a's
        return ["sh", "-c", script, "sh", run.verb, run.workdir, last, str(tmp_path)]

    monkeypatch.setattr(sweep, "_command", command)
    return str(file)


def test_rounds_follow_each_other_until_there_is_none(halving, tmp_path, capsys):
    assert sweep.main([halving, "--run=local"]) == 1
    out, _ = capsys.readouterr()
    first, second = (part.splitlines() for part in out.split("workdir")[1:])
    assert [line.split()[1:] for line in first[1:]] == [["done", "0", "1"]] * 2
    assert [line.split()[1:] for line in second[1:]] == [
        ["done", "0", "1"],
        ["evaluate", "done", "0", "1"],
        ["diverged", "3", "1"],
    ]
    assert (tmp_path / "a2").is_dir() and not (tmp_path / "b2").exists()


def test_a_sweep_is_taken_up_again_where_it_was(halving, tmp_path, capsys):
    flags = [f"{halving}:{tmp_path / 'a'}+{tmp_path / 'b'}", "--only=/a"]
    assert sweep.main([*flags, "--print"]) == 0
    assert len(words(capsys)) == 1  # the first round, of which nothing is done
    assert sweep.main([*flags, "--run=local"]) == 0
    capsys.readouterr()
    assert sweep.main([halving, "--run=local", "--dry_run"]) == 0
    lines = words(capsys)
    assert lines[0] == ["#", str(tmp_path / "a"), "is", "done"]
    assert str(tmp_path / "b") in lines[1]
    assert sweep.main([halving, "--run=local", "--only=/a"]) == 0
    out, _ = capsys.readouterr()
    states = [line.split()[1:] for line in out.splitlines() if "exit" not in line]
    done, evaluated = ["was", "done", "0", "0"], ["evaluate", "done", "0", "1"]
    assert states == [done, done, evaluated]


def test_a_training_is_done_only_if_all_of_it_is(halving, tmp_path):
    given = {"config": f"{TEXT}:tiny", "workdir": str(tmp_path / "a")}

    def done(**changes):
        changed = {key.replace("_", ".", 2): x for key, x in changes.items()}
        return rounds.is_done(rounds.select([given | changed], {}, "")[0])

    assert not done()
    assert sweep.main([halving, "--run=local", "--only=/a"]) == 0
    assert done() and done(config_eval_every=1)
    assert not done(config_train_seed=1)
    assert not done(steps=7)


def test_other_verbs_are_checked_by_their_own_flags(capsys):
    given = [
        {"config": TEXT, "workdir": "a"},
        {"verb": "evaluate", "workdir": "a", "sequences": 4},
        {"verb": "evaluate", "workdir": "a", "sequences": 8},
    ]
    runs = rounds.select(given, {"config.train.seed": "1"}, "")
    assert [run.verb for run in runs] == ["train", "evaluate", "evaluate"]
    assert runs[1].arguments == ["--workdir=a", "--sequences=4"]
    assert "--config.train.seed=1" in runs[0].arguments
    with pytest.raises(UserError, match="tasks of an array wait for no training"):
        sweep.submit(runs, EXPERIMENTS, jobs=1, retries=0, sbatch=[], dry_run=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"verb": "evalute", "workdir": "a"}], "'evalute', which `ebt` does not; did"),
        ([{"verb": "evaluate", "workdir": "a", "sed": 1}], "flag 'sed'"),
        ([{"verb": "evaluate", "workdir": "a"}] * 2, "2 runs of the sweep share"),
        (
            [{"verb": "evaluate", "workdir": "a"}, {"config": TEXT, "workdir": "a"}],
            "lists an 'evaluate' of 'a' before its training",
        ),
    ],
)
def test_runs_that_cannot_be(given, message):
    with pytest.raises((UserError, flags.Error), match=message):
        rounds.select(given, {}, "")


def test_a_sweep_that_would_not_end(halving, capsys):
    text = pathlib.Path(halving).read_text()
    text = text.replace("def following", "following = lambda _: sweep()\ndef other")
    pathlib.Path(halving).write_text(text)
    assert sweep.main([halving, "--run=local"]) == 2
    assert "to end a sweep it has to return []" in capsys.readouterr().err


def test_all_of_it_with_ebt_itself(tmp_path, capfd, monkeypatch):
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "def sweep():\n"
        f"    config = {TEXT + ':tiny'!r}\n"
        f"    return [{{'config': config, 'workdir': {str(tmp_path / 'a')!r},\n"
        "             'config.data.path': 'missing.txt'}]\n"
    )
    assert sweep.main([str(experiment), "--run=local"]) == 1
    out, _ = capfd.readouterr()
    assert out.splitlines()[1].split()[1:] == ["mistake", "2", "1"]
    assert "missing.txt" in (tmp_path / "a.log").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one experiment file is needed, not 0"),
        (["no.py"], "experiment file 'no.py' does not exist"),
        ([TEXT, "--only=zebra"], "none of the 12 runs contains --only='zebra'"),
        ([TEXT, "--set=seed"], "--set='seed' has no value"),
        ([TEXT, "--set=config.sed=1"], "the config has no key 'sed'"),
        ([TEXT, "--set=sed=1"], "Unknown command line flag 'sed'"),
        ([TEXT, "--set=workdir=a"], "12 runs of the sweep share the workdir 'a'"),
        ([TEXT, "--print", "--run=local"], "--print and --run exclude each other"),
        ([TEXT, "--run=cloud"], "one of <local|slurm>"),
        ([TEXT, "--jobs=0"], "--jobs=0: 0 is not a positive integer"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"defines no sweep\(\)"),
        ("sweep = lambda: {}", "has to return a list of dicts"),
        ("sweep = lambda: [1]", "has to return a list of dicts"),
    ],
)
def test_files_without_a_sweep(text, message, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        rounds.expand(str(file))


def test_words_for_a_sweep_that_takes_none():
    with pytest.raises(UserError, match="takes no words, but 'tiny' is given"):
        rounds.expand(f"{TEXT}:tiny")


def test_a_run_without_a_workdir():
    with pytest.raises(UserError, match="run 0 of the sweep has no workdir"):
        rounds.select([{"config": TEXT}], {}, "")
