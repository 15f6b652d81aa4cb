"""The report: what the page says and draws, whole, alone, and of damaged runs."""

import dataclasses
import json
import math
import re
import shlex
import shutil

import jax
import pytest
from page import Page, numbers

from ebt_jax import cli
from ebt_jax.data import tokenizers
from ebt_jax.data.config import DataConfig
from ebt_jax.evaluation.report import runs as reading
from ebt_jax.evaluation.report.make import make_report
from ebt_jax.evaluation.report.thinking import held_out_batch, label, token_kinds
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training import config as c
from ebt_jax.training.environment import record_environment
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.resolve import resolve
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import make_mesh
from ebt_jax.training.step import init_state

CONTEXT, TOKENS, CURVE = 16, 20, 3
POLICY = "until:tolerance=0,steps=4"
# What could end a script or an element of the page, if it were not escaped.
CORPUS = "</script><b>Energy</b> & rest: it falls until nothing changes.\n" * 20


def run_config(corpus, **model):
    model = {"num_layers": 1, "num_heads": 1, "dim": 4, **model}
    return resolve(
        c.Config(
            model=ModelConfig(conditioning="default", **model),
            refine=RefineSetup(num_landscapes=2),
            data=DataConfig(path=str(corpus), context=CONTEXT),
            train=c.TrainConfig(steps=20, batch_size=8),
            eval=c.EvalConfig(curve_steps=CURVE),
        ),
        256,
    )


def write_run(path, config, rows, summary):
    """A workdir as training leaves it, but for the training."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(c.to_json(config))
    lines = [json.dumps(row) for row in rows]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "summary.json").write_text(json.dumps(summary))
    record_environment(path, make_mesh(config.mesh), 0)
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    state = init_state(objective, optimizer, config.train.seed)
    with Saver(path, config.checkpoint) as saver:
        saver.save(20, state, 160, config, wait=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, an EBT `<ebt>` and a Transformer++ `plain`."""
    path = tmp_path_factory.mktemp("report")
    (path / "corpus.txt").write_text(CORPUS)
    rows = [
        {"step": 1, "train/loss": 5.5, "train/tokens": 128.0, "seconds": 1.5},
        {"step": 10, "train/loss": None, "train/tokens": 128.0, "seconds": 2.0},
        {"step": 20, "train/loss": 4.5, "train/tokens": 128.0, "seconds": 63.0},
    ]
    rows[-1] |= {"eval/nll": 4.75, "eval/perplexity": 115.6, "tokens_per_second": 900.0}
    ebt = {"eval/energy_gap": 0.5, "eval/nll": 4.75, "step": 20}
    ebt |= {f"thinking/nll/step_{i}": 5.0 - i / 8 for i in range(1, CURVE + 1)}
    plain = {"eval/nll": 4.8125, "eval/perplexity": 123.0, "step": 20}
    corpus = path / "corpus.txt"
    write_run(path / "<ebt>", run_config(corpus), rows, ebt)
    config = run_config(corpus, kind="transformer_pp")
    write_run(path / "plain", config, rows, plain)
    return path


@pytest.fixture(scope="module")
def text(folder):
    """The page of both."""
    workdirs = ",".join(str(folder / name) for name in ("<ebt>", "plain"))
    out = folder / "new" / "report.html"
    flags = [f"--workdir={workdirs}", f"--out={out}", f"--tokens={TOKENS}"]
    assert cli.run(["report", *flags, f"--think={POLICY}"]) == 0
    return out.read_text()


# The page -----------------------------------------------------------------------------


def test_the_page_is_whole_and_alone(text):
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == [
        "results",
        "learning",
        "thinking",
        "policy",
        "tokens",
        "landscapes",
        "settings",
    ]
    for tag, attrs in page.tags:
        for name in ("src", "href"):
            if name in attrs:
                assert attrs[name].startswith(("#", "data:")), (tag, attrs)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", text)
    policy = [a["content"] for t, a in page.tags if "http-equiv" in a]
    assert policy[0].startswith("default-src 'none'")
    linked = [a["href"][1:] for t, a in page.tags if t == "a"]
    assert set(linked) <= set(page.ids)


def test_scripts_find_what_they_look_for(text):
    page = Page(text)
    classes = {
        name
        for _, attrs in page.tags
        if "class" in attrs
        for name in attrs["class"].split()
    }
    wanted = re.findall(r'querySelector\("\.([\w-]+)"\)', text)
    assert wanted and set(wanted) <= classes
    charts = {attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs}
    assert charts == set(numbers(text)["charts"])
    assert [a for _, a in page.tags if "data-view" in a] == [{"data-view": "tokens"}]


def test_it_says_what_was_compared_and_how_it_was_made(text, folder):
    page = Page(text)
    title = "<ebt> (EBT 4xs), plain (Transformer++ 4xs)"
    assert page.words.count(title) == 2  # of the window and of the page
    command = next(word for word in page.words if word.startswith("ebt report"))
    workdirs = f"{folder / '<ebt>'},{folder / 'plain'}"
    assert shlex.split(command) == [
        "ebt", "report", f"--workdir={workdirs}",
        f"--out={folder / 'new' / 'report.html'}", f"--tokens={TOKENS}",
        f"--think={POLICY}",
    ]  # fmt: skip
    said = page.said()
    assert "tokens trained on 2,560 2,560" in said
    assert "held-out nll, nats per token 4.75 4.812" in said
    assert "training time 1 min 03 s" in said
    assert f"devices 8 x cpu, JAX {jax.__version__} 8 x cpu" in said
    assert "from step 0 on: device cpu, platform cpu, devices 8, processes 1" in said
    assert "model. kind ebt transformer_pp" in said  # what differs
    assert "optim.peak_lr = 0.0024" in said  # and all there is
    assert "Missing or damaged" not in said


def test_curves_are_the_numbers_of_the_runs(text):
    charts = numbers(text)["charts"]
    learning = {series["label"]: series for series in charts["learning"]["series"]}
    loss = learning["<ebt>, training"]
    assert loss["x"] == {
        "step": [1, 20],
        "tokens": [128.0, 2560.0],
        "seconds": [1.5, 63.0],
    }
    assert loss["y"] == [5.5, 4.5] and loss["kind"] == "thin"
    assert learning["plain, held out"]["y"] == [4.75]
    curve, level = charts["thinking"]["series"]
    assert curve["y"] == [4.875, 4.75, 4.625] and curve["x"]["step"] == [1, 2, 3]
    assert level["label"] == "plain" and level["y"] == 4.8125
    assert level["kind"] == "level"
    (energy,), (gradient,) = charts["energy"]["series"], charts["gradient"]["series"]
    assert len(energy["y"]) == 5 and len(gradient["y"]) == 4  # as many as the policy's


def test_tokens_are_those_held_out_and_their_candidates_are_shown(text, folder):
    ebt, plain = numbers(text)["thoughts"]
    config = c.from_json((folder / "plain" / "config.json").read_text())
    batch = held_out_batch(config, tokenizers.load("bytes"), TOKENS)
    targets = batch["targets"].reshape(-1)[:TOKENS].tolist()
    assert ebt["target"] == plain["target"] == targets
    assert [i for i, start in enumerate(ebt["starts"]) if start] == [0, CONTEXT]
    shown = "".join(ebt["texts"][str(i)] for i in targets)
    assert shown == bytes(targets).decode()
    assert len(ebt["nll"]) == len(ebt["energy"]) == 5
    assert len(plain["nll"]) == 1 and plain["energy"] is None and plain["steps"] == 0
    assert ebt["steps"] == 2
    for candidates, losses in zip(ebt["probability"], ebt["nll"], strict=True):
        for probabilities, loss in zip(candidates, losses, strict=True):
            assert len(probabilities) == 5
            assert probabilities == sorted(probabilities, reverse=True)
            assert math.exp(-loss) <= probabilities[0] + 1e-4
    known = {str(i) for row in ebt["top"] for top in row for i in top}
    assert known <= set(ebt["labels"])


def test_landscapes_are_drawn_of_the_energy_model_alone(text):
    page = Page(text)
    pictures = [attrs for tag, attrs in page.tags if tag == "image"]
    assert 1 <= len(pictures) <= 3
    assert all(p["href"].startswith("data:image/png;base64,") for p in pictures)
    labels = [a["aria-label"] for t, a in page.tags if t == "svg"]
    assert all(name.startswith("Energy landscape, <ebt>, token") for name in labels)


def test_a_policy_is_compared_and_its_steps_are_told_by_kind_of_token(text):
    said = Page(text).said()
    assert "The policy: num_steps 4, tolerance 0.0." in said
    ebt, plain = numbers(text)["thoughts"]
    taken = ebt["taken"]
    assert len(taken) == TOKENS and {2, 3, 4} >= set(taken) and plain["taken"] is None
    assert f"all {TOKENS} {sum(taken) / TOKENS:.4g}" in said
    by_kind = re.findall(r"(inside a word|punctuation|white space) (\d+)", said)
    kinds = token_kinds(
        [ebt["texts"][str(i)] for i in ebt["target"]],
        [ebt["texts"][str(i)] for i in ebt["before"]],
    )
    assert {kind: int(count) for kind, count in by_kind} == {
        kind: kinds.count(kind) for kind, _ in by_kind
    }
    losses = [sum(row) / TOKENS for row in ebt["nll"]]
    assert f"2 steps, as trained 2 2 {losses[2]:.4g}" in said
    assert f"4 steps 4 4 {losses[4]:.4g}" in said


# What there is not --------------------------------------------------------------------


def test_damage_is_named_and_the_rest_is_shown(folder, tmp_path):
    workdir = tmp_path / "killed"
    workdir.mkdir()
    settings = json.loads((folder / "plain" / "config.json").read_text())
    del settings["model"]["size"]
    (workdir / "config.json").write_text(json.dumps(settings))
    row = json.dumps({"step": 4, "train/loss": 2.0, "eval/nll": 2.5, "seconds": 1.0})
    (workdir / "metrics.jsonl").write_text(f"{row}\n[1]\n{row[:20]}\n")
    (workdir / "tasks").mkdir()
    task = {
        "counts": {"items": 20},
        "results": {"perplexity": 7.5, "nll/step_1": 2.25},
        "scores": [{"nll": 1.0}],
    }
    (workdir / "tasks" / "gsm8k.json").write_text(json.dumps(task))
    (workdir / "tasks" / "squad.json").write_text('{"perplexity"')
    (workdir / "environment.json").mkdir()
    out = make_report([str(workdir)], tmp_path / "report.html")
    page = Page(out.read_text())
    said = page.said()
    assert "metrics.jsonl: line 2, 3 is damaged and left out." in said
    assert "summary.json is missing: the run has not finished" in said
    assert "config.json is not of this version of EBT-JAX (config.model lacks" in said
    assert "tasks/squad.json cannot be read" in said
    assert "environment.json cannot be read (Is a directory)." in said
    assert "held-out nll, nats per token 2.5" in said
    assert "task run items perplexity gsm8k killed 20 7.5 All numbers" in said
    assert "results. nll/step_ 1 2.25" in said and "scores" not in said
    drawn = {a["data-chart"] for _, a in page.tags if "data-chart" in a}
    assert drawn == {"learning"}  # nothing takes steps
    assert numbers(out.read_text())["thoughts"] == []


def test_fewer_steps_than_in_training_are_not_shown(folder, tmp_path):
    out = make_report([str(folder / "<ebt>")], tmp_path / "a.html", tokens=4, steps=1)
    (seen,) = numbers(out.read_text())["thoughts"]
    assert seen["steps"] == 2 and len(seen["nll"]) == 3


def test_nothing_but_a_config_is_enough(folder, tmp_path):
    workdir = tmp_path / "fresh"
    workdir.mkdir()
    (workdir / "config.json").write_text("{ not JSON")
    out = make_report([str(workdir)], tmp_path / "report.html")
    said = Page(out.read_text()).said()
    assert "config.json cannot be read" in said
    assert "metrics.jsonl cannot be read (there is none): no curves." in said


def test_a_model_that_cannot_be_run_is_a_note(folder, tmp_path):
    workdir = tmp_path / "moved"
    workdir.mkdir()
    config = c.from_json((folder / "plain" / "config.json").read_text())
    (workdir / "config.json").write_text(c.to_json(config))
    said = Page(make_report([str(workdir)], tmp_path / "a.html").read_text()).said()
    assert "the model could not be run" in said and "holds no checkpoint yet" in said
    data = dataclasses.replace(config.data, path=str(tmp_path / "gone.txt"))
    config = dataclasses.replace(config, data=data)
    (workdir / "config.json").write_text(c.to_json(config))
    (workdir / "checkpoints").symlink_to(folder / "plain" / "checkpoints")
    said = Page(make_report([str(workdir)], tmp_path / "b.html").read_text()).said()
    assert "the model could not be run" in said and "gone.txt" in said


def test_a_damaged_checkpoint_is_a_note_and_the_one_before_is_run(folder, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(folder / "plain", workdir)
    (workdir / "checkpoints" / "30").mkdir()
    out = make_report([str(workdir)], tmp_path / "report.html", tokens=4)
    said = Page(out.read_text()).said()
    assert "the checkpoint of step 30 is damaged: that of step 20 was run." in said
    assert len(numbers(out.read_text())["thoughts"][0]["target"]) == 4


def test_without_tokens_no_model_is_run(folder, tmp_path, capsys):
    out = make_report([str(folder / "<ebt>")], tmp_path / "report.html", tokens=0)
    assert "running the model" not in capsys.readouterr().err
    assert numbers(out.read_text())["thoughts"] == []
    assert "Token by token" not in Page(out.read_text()).said()


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir={run}"], "--out is missing"),
        (["--workdir={run},{folder}", "--out={new}/r.html"], "holds no run"),
        (["--workdir={run},{run}/", "--out={new}/r.html"], "names {run} twice"),
        (["--workdir={run}", "--out={folder}"], "is a folder; name a file"),
        (
            ["--workdir={run}", "--out={folder}/corpus.txt/r.html"],
            "corpus.txt is not a folder; name another",
        ),
        (["--workdir={run}", "--out={new}/r.html", "--tokens=-1"], "--tokens=-1"),
        (["--workdir={run}", "--out={new}/r.html", "--steps=x"], "--steps=x"),
        (
            ["--workdir={run}", "--out={new}/r.html", "--think=untill"],
            "there is no policy 'untill'; did you mean 'until'?",
        ),
        (
            ["--workdir={run}", "--out={new}/r.html", "--think=fixed:steps=3"],
            "none of the runs is an EBT that can be run; leave out --think",
        ),
        (
            ["--workdir={ebt}", "--out={new}/r.html", "--think=until", "--tokens=0"],
            "tokens is 0, so no model is run; leave out --think or --tokens=0",
        ),
    ],
)
def test_mistakes(folder, tmp_path, capsys, flags, message):
    names = {"run": folder / "plain", "ebt": folder / "<ebt>", "folder": folder}
    names["new"] = tmp_path / "new"
    assert cli.run(["report", *(flag.format(**names) for flag in flags)]) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("error: ") and seen.err.count("\n") == 1
    assert message.format(**names) in seen.err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="no permission in .*; change that, or name"):
        make_report([str(folder / "plain")], tmp_path / "new" / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full(folder, tmp_path, monkeypatch):
    def full(file, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ebt_jax.evaluation.report.make.replace_text", full)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        make_report([str(folder / "plain")], tmp_path / "report.html", tokens=0)


# Pieces -------------------------------------------------------------------------------


def test_long_curves_are_averaged():
    points = [(step, 2.0 * step, float(step)) for step in range(1, 101)]
    means, size = reading.thinned(points, 30)
    assert size == 4 and len(means) == 25
    assert means[0] == (2, 5.0, 2.5)
    assert reading.thinned(points, 100) == (points, 1)
    assert reading.thinned([], 10) == ([], 1)


def test_names_are_as_long_as_they_have_to_be(tmp_path):
    names = reading.short_names([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert names == ["a/run", "b/run"]
    assert reading.short_names([tmp_path / "a" / "run"]) == ["run"]


def test_what_cannot_be_seen_gets_a_sign():
    signs = {" ": "␣", "\n": "↵", "word": "word", "": "∅", "a\n\x07": "a↵·"}
    assert {text: label(7, text) for text in signs} == signs
    assert label(195, "\ufffd") == "‹195›" and label(7, "\x07") == "‹7›"


def test_kinds_of_tokens():
    texts = ["The", "se", " two", "2", ",", "\n\n", "\ufffd", "a", "", " 10"]
    assert token_kinds(texts, ["", *texts[:-1]]) == [
        "start of a word",
        "inside a word",
        "start of a word",
        "digits",
        "punctuation",
        "white space",
        "part of a character",
        "start of a word",
        "white space",
        "digits",
    ]
