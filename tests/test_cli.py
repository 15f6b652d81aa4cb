"""The command line: every verb, every message, every exit code."""

import json
import os
import subprocess
import sys

import pytest

from ebt_jax import cli
from ebt_jax.errors import TrainingDiverged, UserError

CONFIG = """
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.training import config as c

def get_config(arg=""):
    if arg not in ("", "feed_forward"):
        raise UserError(f"there is no preset {arg!r}")
    kind = "transformer_pp" if arg else "ebt"
    return c.to_config_dict(c.Config(
        model=ModelConfig(
            kind=kind, num_layers=1, num_heads=1, dim=8, conditioning="default"
        ),
        data=DataConfig(path="CORPUS", context=16),
        train=c.TrainConfig(steps=2, batch_size=8),
        eval=c.EvalConfig(batch_size=8, curve_steps=0, sample_tokens=0),
        mesh=c.MeshConfig(data=1),
        log=c.LogConfig(tensorboard=False, plots=False, compilation_cache=False),
    ))
"""
SENTENCE = "Energy falls until the answer no longer changes. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus and a config file that names it."""
    path = tmp_path_factory.mktemp("cli")
    (path / "corpus.txt").write_text(SENTENCE * 40)
    (path / "config.py").write_text(CONFIG.replace("CORPUS", str(path / "corpus.txt")))
    return path


@pytest.fixture(scope="module")
def workdir(folder):
    """A trained run."""
    workdir = folder / "run"
    flags = [f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
    assert cli.run(["train", *flags]) == 0
    return workdir


@pytest.fixture
def fails(capsys):
    """Runs a command line that has to end in one line of error and print no more."""

    def check(argv, code=2):
        assert cli.run([str(word) for word in argv]) == code
        seen = capsys.readouterr()
        assert not seen.out
        assert seen.err.startswith("error: ") and seen.err.count("\n") == 1
        return seen.err

    return check


def output(capsys, *argv):
    assert cli.run([str(word) for word in argv]) == 0
    return capsys.readouterr().out


# Help ---------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_verb(capsys, argv):
    text = output(capsys, *argv)
    for name, verb in cli.VERBS.items():
        assert name in text and verb.summary in text


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_help_lists_every_flag_and_an_example(capsys, name):
    text = output(capsys, name, "--workdir=x", "--help")
    verb = cli.VERBS[name]
    for flag in verb.flags:
        assert f"--{flag.name} " in text and flag.help in text
    assert verb.example in text
    assert ("--config.KEY=VALUE" in text) == (verb.config != "none")
    assert max(map(len, text.splitlines())) <= 88


def test_help_does_not_wait_for_jax():
    program = (
        "import sys; from ebt_jax.cli import run; run(['train', '--help']); "
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == 0, done.stderr


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "no verb 'trian'; did you mean 'train'?"),
        (["xyz"], "no verb 'xyz' Known: train, evaluate"),
        (["train"], "no config is given"),
        (["inspect"], "no config is given"),
        (["train", "--config="], "no config is given"),
        (
            ["train", "--config=nowhere.py:tiny"],
            "config file 'nowhere.py' does not exist",
        ),
        (["evaluate"], "--workdir is missing"),
        (["generate", "--workdir=x", "--prompt=a", "--samples=0"], "--samples=0"),
        (
            ["generate", "--workdir=x", "--prompt=a", "--think=best_of:n=0"],
            "--think=best_of:n=0: best_of is 0, but has to be at least 1",
        ),
        (
            ["generate", "--workdir=x", "--prompt=a", "--prompt=b", "--stream"],
            "--stream prints the text of one continuation, not of 2",
        ),
        (
            ["generate", "--workdir=x", "--prompt=a", "--samples=3", "--stream"],
            "--stream prints the text of one continuation, not of 3",
        ),
        (
            ["generate", "--workdir=x", "--prompt=a", "--json", "--stream"],
            "--stream prints the text of one continuation, --json prints whole ones",
        ),
        (["prepare", "--output=x"], "--path is missing"),
        (["prepare", "--path=x"], "--output is missing"),
        (["prepare", "--config.data.path=x"], "--config.data.path changes a config"),
        (["evaluate", "--wordir=x"], "'wordir'. Did you mean: workdir ?"),
        (["evaluate", "runs/a"], "unexpected 'runs/a'"),
        (["evaluate", "--workdir"], "Missing value for flag --workdir"),
        (["evaluate", "--workdir=x", "--sequences=few"], "--sequences=few"),
        (
            ["evaluate", "--workdir=x", "--think=fixed:steps=-1"],
            "--think=fixed:steps=-1: num_steps is -1",
        ),
        (
            ["evaluate", "--workdir=x", "--think=untill"],
            "there is no policy 'untill'; did you mean 'until'?",
        ),
        (["evaluate", "--workdir=nowhere"], "nowhere holds no run"),
        (["generate", "--workdir=nowhere", "--prompt=a"], "nowhere holds no run"),
    ],
)
def test_mistakes(fails, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.train.step=3"], "no key 'train.step'; did you mean 'train.steps'?"),
        (["--config.trian.steps", "3"], "'trian.steps'; did you mean 'train.steps'?"),
        (["--config.xyz=3"], "the config has no key 'xyz'"),
        (["--config.train=3"], "the config has no key 'train'"),
        (["--noconfig.log.plot"], "'log.plot'; did you mean 'log.plots'?"),
        (["--config.train.steps=two"], "--config.train.steps=two"),
        (["--config.log.plots=maybe"], "--config.log.plots=maybe"),
        (["--steps=0"], "train.steps is 0, but has to be positive"),
        (["--steps=two"], "--steps=two"),
        (["--step=3"], "'step'. Did you mean: steps ?"),
        (["--config.model.size=huge"], "model.size is 'huge'"),
        (["--config.model.num_heads=3"], "3 heads do not divide width 8"),
        (["--config.train.accumulation=3"], "train.accumulation (3) does not divide"),
        (["--config.mesh.data=9"], "takes 9 devices, but there are 8"),
        (["--config.data.path=nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["--config.data.tokenizer=nowhere.json"], "nowhere.json"),
        (["--config.data.context=5000"], "data.context is 5000"),
        (["--config.model.vocab_size=100"], "model.vocab_size is 100"),
    ],
)
def test_mistakes_in_a_config(fails, folder, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    config = f"--config={folder / 'config.py'}"
    assert message in fails(["train", config, "--workdir=run", *flags])
    assert not list(tmp_path.iterdir())


def test_train_without_a_workdir(fails, folder):
    message = fails(["train", f"--config={folder / 'config.py'}"])
    assert "--workdir is missing" in message


def test_a_preset_that_the_file_refuses(fails, folder):
    argv = ["inspect", f"--config={folder / 'config.py'}:feedforward"]
    assert fails(argv) == "error: there is no preset 'feedforward'\n"


def test_a_config_file_without_get_config(fails, tmp_path):
    (tmp_path / "empty.py").write_text("")
    assert "defines no get_config()" in fails(
        ["inspect", f"--config={tmp_path / 'empty.py'}"]
    )


def test_a_bug_in_a_config_file_keeps_its_traceback(tmp_path):
    (tmp_path / "bug.py").write_text("def get_config():\n    return int('x')\n")
    with pytest.raises(ValueError, match="invalid literal") as caught:
        cli.run(["inspect", f"--config={tmp_path / 'bug.py'}"])
    assert not isinstance(caught.value, UserError)


def test_another_config_in_the_workdir(fails, folder, workdir):
    flags = [f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
    message = fails(["train", *flags, "--config.refine.num_steps=3"])
    assert "refine.num_steps is 2 there and 3 here" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "--checkpoint=7"], "no checkpoint of step 7; it has those of 2"),
        (["evaluate", "--data=nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["evaluate", "--packing=tight"], "data.packing is 'tight'"),
        (["evaluate", "--mesh=modle=2"], "names 'modle'; did you mean 'model'?"),
        (["evaluate", "--mesh=data"], "--mesh has 'data'; an axis takes a number"),
        (["generate", "--prompt=a", "--mesh=data=99"], "but there are 8 (cpu)"),
        (["generate", "--prompt="], "prompt '' has no tokens"),
        (["generate", "--prompt=" + "a" * 17], "prompt 1 has 17 tokens"),
        (["generate", "--prompt=a", "--temperature=-1"], "temperature is -1"),
        (["generate", "--prompt=a", "--top_p=2"], "top_p is 2"),
        (["generate", "--prompt=a", "--stop=ab"], "stop token 'ab' is 2 tokens"),
        (
            ["generate", "--prompt=a", "--stop=b", "--stop="],
            "stop token '' is 0 tokens",
        ),
        (["generate", "--prompt=a", "--new=0"], "new_tokens is 0"),
        (
            ["generate", "--prompt=a", "--think=until:tolerance=1,steps=1"],
            "nothing to end",
        ),
        (
            ["evaluate", "--think=until:tolerance=-1,steps=9"],
            "tolerance is -1.0",
        ),
    ],
)
def test_mistakes_with_a_trained_run(fails, workdir, argv, message):
    verb, *flags = argv
    assert message in fails([verb, f"--workdir={workdir}", *flags])


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("mend\n  this"), 2),
        (TrainingDiverged("loss became nan"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(capsys, monkeypatch, raised, code):
    def call(values):
        raise raised

    verb = cli.VERBS["evaluate"]._replace(call=call)
    monkeypatch.setitem(cli.VERBS, "evaluate", verb)
    assert cli.run(["evaluate"]) == code
    text = " ".join(str(raised).split())
    assert capsys.readouterr().err == (f"error: {text}\n" if text else "")


def test_a_process_exits_with_the_code():
    command = [sys.executable, "-m", "ebt_jax", "trian"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no verb 'trian'")


# Verbs --------------------------------------------------------------------------------


def test_train_takes_presets_and_changes(folder, tmp_path):
    workdir = tmp_path / "run"
    code = cli.run(
        [
            "train",
            f"--config={folder / 'config.py'}:feed_forward",
            "--workdir",
            str(workdir),
            "--steps=1",
            "--config.optim.peak_lr=0.5",
            "--config.data.shuffle=false",
        ]
    )
    assert code == 0
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["kind"] == "transformer_pp"
    assert config["train"]["steps"] == 1
    assert config["optim"]["peak_lr"] == 0.5
    assert config["data"]["shuffle"] is False


@pytest.mark.parametrize(
    "flags", [["--batch_size=3"], ["--batch_size=4", "--mesh=data=2,model=2"]]
)
def test_evaluate_scores_what_is_held_out_as_training_did(capsys, workdir, flags):
    flags = [f"--workdir={workdir}", "--json", *flags]
    results = json.loads(output(capsys, "evaluate", *flags))
    assert results["checkpoint"] == 2
    assert results["data"].startswith("held-out part of")
    # The last tenth of the corpus; its first byte has no context.
    assert results["tokens"] == len(SENTENCE) * 40 // 10 - 1
    assert {"nll/step_2", "energy_rose", "bits_per_byte"} <= results.keys()
    logged = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
    assert results["nll"] == pytest.approx(json.loads(logged)["eval/nll"], rel=1e-5)


def test_evaluate_scores_any_text_at_any_number_of_steps(capsys, workdir, folder):
    other = folder / "other.txt"
    other.write_text("Another text, all of which is scored.")
    table = output(
        capsys,
        "evaluate",
        f"--workdir={workdir}",
        f"--data={other}",
        "--think=fixed:steps=3",
    )
    rows = {line.split()[0]: line.split()[1] for line in table.splitlines()}
    assert rows["tokens"] == "36"
    assert rows["data"] == str(other)
    assert rows["nll"] == rows["nll/step_3"]
    assert "nats per token" in table


def test_evaluate_thinks_as_it_is_told_and_tells_what_it_took(capsys, workdir):
    flags = [f"--workdir={workdir}", "--sequences=4", "--json"]
    think = lambda text: json.loads(
        output(capsys, "evaluate", *flags, f"--think={text}")
    )
    plain, until = think("fixed:steps=4"), think("until:steps=4,tolerance=0.05")
    assert plain["energy_gradients"] == plain["refinement_steps"] == 4
    assert 2 <= until["refinement_steps"] < until["energy_gradients"] <= 4
    assert until["nll"] > 0 and "nll/step_1" not in until
    assert until["energy_before"] == pytest.approx(plain["energy_before"], rel=1e-5)
    several = think("lower:steps=3+best_of:n=2,by=drop")
    assert several["energy_spread"] > 0 and several["energy_evaluations"] == 4
    assert until["flops_per_token"] < plain["flops_per_token"]
    assert plain["flops_per_token"] < several["flops_per_token"]


def test_json_has_null_for_what_is_not_finite(capsys, workdir, monkeypatch):
    numbers = {"nll": 1e4, "perplexity": float("inf")}
    monkeypatch.setattr(
        "ebt_jax.evaluation.metrics.evaluate", lambda *args, **options: numbers
    )
    line = output(capsys, "evaluate", f"--workdir={workdir}", "--json")
    assert json.loads(line)["perplexity"] is None
    assert "inf" in output(capsys, "evaluate", f"--workdir={workdir}")


def test_generate_continues_every_prompt(capsys, workdir):
    prompts = ["--prompt=Energy", "--prompt", "ans"]
    text = output(capsys, "generate", f"--workdir={workdir}", *prompts, "--new=3")
    assert text.startswith("Energy") and "\n\nans" in text


def test_generate_needs_a_prompt_and_writes_no_picture(fails, workdir):
    assert "--prompt is missing" in fails(["generate", f"--workdir={workdir}"])
    told = fails(["generate", f"--workdir={workdir}", "--prompt=a", "--out=a.png"])
    assert "--out is of images and video, but the run is of text" in told


def test_generate_prints_lines_of_json(capsys, workdir):
    flags = [f"--workdir={workdir}", "--json", "--new=4", "--samples=2", "--stop=b"]
    thinking = ["--think=until:steps=5,tolerance=0.01+best_of:n=2"]
    prompts = ["--prompt=Energy", "--prompt=ans"]
    lines = output(capsys, "generate", *flags, *thinking, *prompts).splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        ("Energy", 0),
        ("Energy", 1),
        ("ans", 0),
        ("ans", 1),
    ]
    for row in rows:
        text = row["prompt"].encode() + bytes(row["tokens"])
        assert row["text"] == text.decode(errors="replace")
        assert 1 <= row["refinement_steps"] <= 5
        assert row["energy_gradients"] >= 2 * row["refinement_steps"] - 5
        assert row["energy_evaluations"] == 2 and row["flops_per_token"] > 0
    plain = output(capsys, "generate", *flags[:1], *flags[2:], *thinking, *prompts)
    assert plain == "\n\n".join(row["text"] for row in rows) + "\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stream_prints_the_same_text(capsys, workdir, monkeypatch, terminal):
    """It is the default where one text goes to a terminal."""
    flags = [f"--workdir={workdir}", "--prompt=Energy", "--new=9"]
    whole = output(capsys, "generate", *flags, "--nostream")
    writes = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys.stdout, "write", lambda x: writes.append(x) or write(x))
    assert output(capsys, "generate", *flags) == whole
    assert (writes[0] == "Energy") == terminal


def test_a_baseline_does_not_think(fails, workdir, tmp_path):
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["kind"] = "transformer_pp"
    (tmp_path / "config.json").write_text(json.dumps(config))
    for verb in (["generate", "--prompt=a"], ["evaluate"]):
        message = fails([*verb, f"--workdir={tmp_path}", "--think=fixed:steps=3"])
        assert "a transformer_pp, which predicts in one pass; leave out" in message


def test_inspect_runs_nothing(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = output(capsys, "inspect", f"--config={folder / 'config.py'}")
    assert "energy/kernel" in text and "6 (N - M) + 24 N" in text
    assert not list(tmp_path.iterdir())


def test_prepare_writes_shards_that_a_run_can_read(capsys, folder, workdir, tmp_path):
    shards = tmp_path / "shards"
    output(capsys, "prepare", f"--path={folder / 'corpus.txt'}", f"--output={shards}")
    flags = [f"--workdir={workdir}", f"--data={shards}", "--json"]
    results = json.loads(output(capsys, "evaluate", *flags))
    assert results["tokens"] == len(SENTENCE) * 40 - 1


def test_large_pages_are_asked_for_once(monkeypatch):
    """With the same command line, by the same Python; and never where one is set."""
    started = []
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "confstr_names", {"CS_GNU_LIBC_VERSION": 2})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "ebt", "help"])
    monkeypatch.setattr(sys, "argv", ["ebt", "help"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for _ in range(2):
        with pytest.raises(SystemExit):
            cli.main()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    command = [sys.executable, "-X", "dev", "ebt", "help"]
    assert started == [(sys.executable, command)]
