"""The scaling experiment: its runs are the ones it says, and lead to laws."""

import json
import pathlib
import re
import runpy

import numpy as np
import pytest

from ebt_jax import cli
from ebt_jax.command import parse
from ebt_jax.errors import UserError
from ebt_jax.training.config import from_config_dict

ROOT = pathlib.Path(__file__).parent.parent
NAMES = runpy.run_path(str(ROOT / "experiments" / "scaling.py"))
SMALLEST = {
    "config.model.num_layers": 1,
    "config.model.dim": 8,
    "config.model.unroll": 0,
    "config.data.context": 16,
    "config.eval.sequences": 8,
    "config.mesh.data": 1,
    "config.log.every": 1,
    "config.log.compilation_cache": False,
}


def config_of(run):
    argv = ["train", *(f"--{name}={value}" for name, value in run.items())]
    return from_config_dict(parse(cli.VERBS["train"], argv).config)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_every_axis_has_five_points_of_three_seeds():
    for axis in NAMES["AXES"]:
        for method in NAMES["METHODS"]:
            runs = NAMES["sweep"](f"{axis},{method}")
            assert len(runs) == 15
            assert all(f"/{method}/" in run["workdir"] for run in runs)
            assert {run["config.train.seed"] for run in runs} == {0, 1, 2}


def test_runs_of_several_axes_are_made_once():
    runs = NAMES["sweep"]()
    points = {point for points in NAMES["AXES"].values() for point in points}
    assert len(points) == 5 + 4 + 4 + 4 + 3  # the middle is shared, l2-w48 twice
    assert len(runs) == len({run["workdir"] for run in runs})
    assert len(runs) == len(points) * 3 * len(NAMES["METHODS"])


def test_the_configs_are_what_the_folders_say():
    for run in (*NAMES["sweep"]()[::17], *NAMES["sweep"]("tiny")[::5]):
        config = config_of(run)
        found = re.search(r"l(\d+)-w(\d+)-b(\d+)-s(\d+)-(\d)$", run["workdir"])
        assert found
        model, train = config.model, config.train
        made = (model.layers, model.width, train.batch_size, train.steps, train.seed)
        assert made == tuple(map(int, found.groups()))
        assert config.optim.schedule_steps == 0 and config.optim.peak_lr == 4.8e-3
        assert config.optim.warmup_steps == min(100, train.steps // 5)
    (anchored, s1) = (
        config_of(NAMES["sweep"](f"data,{method}")[0]) for method in ("anchored", "s1")
    )
    assert (anchored.refine.num_steps, s1.refine.num_steps) == (1, 2)
    assert anchored.model.candidate_input == "anchored"


def test_a_word_that_is_unknown():
    with pytest.raises(UserError, match="'dept' is unknown; did you mean 'depth'"):
        NAMES["sweep"]("dept")


def test_the_docstring_has_every_word_and_a_glob_for_every_axis():
    text = NAMES["__doc__"]
    for word in (*NAMES["AXES"], *NAMES["METHODS"], "tiny"):
        assert re.search(rf"^    .*\b{word}\b", text, re.MULTILINE)
    workdirs = {
        axis: {run["workdir"] for run in NAMES["sweep"](axis)} for axis in NAMES["AXES"]
    }
    every = set().union(*workdirs.values())
    commands = re.findall(r"--out=fits/(\w+)\s+--runs='([^']+)'", text)
    assert [axis for axis, _ in commands] == list(workdirs)
    for axis, globs in commands:
        globs = re.sub(r"\s", "", globs).split(",")
        matched = {
            path
            for path in every
            for each in globs
            if pathlib.PurePath(path).match(each)
        }
        assert matched == workdirs[axis]


def test_the_way_from_runs_to_laws(tmp_path, capsys):
    """Trainings of one, two and three updates, then `ebt fit` on their folders."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Energy falls until the answer no longer changes. " * 40)
    for steps in (1, 2, 3):
        point = NAMES["Point"](layers=1, width=8, batch=8, steps=steps)
        run = NAMES["run"]("transformer_pp", point, 0, tiny=True) | SMALLEST
        run["workdir"] = str(tmp_path / run["workdir"])
        run["config.data.path"] = str(corpus)
        argv = ["train", *(f"--{name}={value}" for name, value in run.items())]
        assert cli.run(argv) == 0
    capsys.readouterr()
    runs = f"--runs={tmp_path}/runs/scaling-tiny/*/l1-w8-b8-s*"
    assert cli.run(["fit", runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"] == "transformer_pp"
    assert [point["x"] for point in found["points"]] == [128, 256, 384]
    summary = next((tmp_path / "runs").rglob("l1-w8-b8-s1-0/summary.json"))
    assert found["points"][0]["y"] == json.loads(summary.read_text())["eval/nll"]
    x, y = (np.log([point[of] for point in found["points"]]) for of in ("x", "y"))
    slope = found["methods"]["transformer_pp"]["slope"]
    assert slope["value"] == pytest.approx(-np.polyfit(x, y, 1)[0])
    assert slope["low"] < slope["value"] < slope["high"]
    for x in ("flops", "seconds"):
        assert cli.run(["fit", runs, f"--x={x}", "--json"]) == 0
        places = [p["x"] for p in json.loads(capsys.readouterr().out)["points"]]
        assert places[0] < places[-1]
