"""The sweeps of recipes and of little text: what goes on to the next round."""

import json
import math
import runpy
from pathlib import Path

import pytest
import rounds

from ebt_jax import cli
from ebt_jax.errors import UserError
from ebt_jax.training.config import from_config_dict

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def experiment(name):
    return runpy.run_path(str(EXPERIMENTS / f"{name}.py"))


def folder_and_name(run):
    path = Path(run["workdir"])
    return path.parent.name, path.name


def losses(runs, loss):
    return {run["workdir"]: loss(*folder_and_name(run)) for run in runs}


def test_the_better_third_goes_on_and_the_best_get_seeds():
    names = experiment("recipe")
    order = {arm: i for i, arm in enumerate(names["ARMS"])}
    loss = lambda _, name: order[name.rpartition("-x")[0]] + 0.01 * len(name)
    results = losses(names["sweep"](), loss)
    second = names["following"](results)
    assert {folder_and_name(run)[0] for run in second} == {"round-500"}
    baselines = [r for r in second if "transformer_pp" in r["workdir"]]
    assert len(baselines) == 2 and len(second) - len(baselines) == math.ceil(37 / 3)
    results |= losses(second, loss)
    third = names["following"](results)
    found = [folder_and_name(run) for run in third]
    assert {folder for folder, _ in found} == {"final"}
    finalists = sorted({name.rpartition("-")[0] for _, name in found})
    assert len(finalists) == 5 and len(found) == 15
    assert "transformer_pp-x1" in finalists and "published-x1" in finalists
    results |= losses(third, loss)
    assert names["following"](results) == []


def test_what_diverged_does_not_go_on():
    names = experiment("recipe")
    first = names["sweep"]("only=light")
    worst = losses(first, lambda _, name: math.nan if name == "light-x2" else 1.0)
    assert [folder_and_name(run)[1] for run in names["following"](worst)] == [
        "light-x1"
    ]


def test_as_many_weights_deeper_and_wider():
    names = experiment("recipe")
    deep, wide = names["sweep"]("only=light_deep+light_wide,size=3xs")
    shape = lambda run: (run["config.model.num_layers"], run["config.model.dim"])
    assert shape(deep) == (8, 176) and shape(wide) == (2, 360)


@pytest.mark.parametrize("name", ["recipe", "small_data", "thinking"])
def test_every_run_is_one_that_ebt_understands(name, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    words = ["data=DATA"] if name == "thinking" else []
    runs = experiment(name)["sweep"](*words)
    found = rounds.select(runs, {"config.data.path": "a.txt"}, "")
    assert len(found) == len(runs)
    for run in found:
        if run.verb == "train":
            from_config_dict(rounds.parsed(run).config)


@pytest.mark.parametrize("name", ["recipe", "small_data", "thinking"])
def test_unknown_words_are_refused(name):
    with pytest.raises(UserError, match="word 'siez=4xs' is unknown; known are into="):
        experiment(name)["sweep"]("siez=4xs")


def made(runs, monkeypatch):
    """Makes runs; their held-out losses."""
    monkeypatch.chdir(EXPERIMENTS.parent)
    results = {}
    for run in runs:
        flags = [f"--{name}={value}" for name, value in run.items()]
        assert cli.run(["train", *flags, "--config.mesh.data=1"]) == 0
        summary = Path(run["workdir"], "summary.json").read_text()
        results[run["workdir"]] = json.loads(summary)["eval/nll"]
    return results


def test_recipes_in_small(tmp_path, monkeypatch):
    names, words = experiment("recipe"), f"tiny,only=light,into={tmp_path}"
    results = made(names["sweep"](words), monkeypatch)
    results |= made(names["following"](results, words), monkeypatch)
    assert [Path(path).relative_to(tmp_path).as_posix() for path in results] == [
        "round-2/light-x2",
        "final/light-x2-0",
    ]
    assert names["following"](results, words) == []


def test_little_text_in_small(tmp_path, monkeypatch):
    names, words = experiment("small_data"), f"tiny,tokens=512,into={tmp_path}"
    first = names["sweep"](words)
    assert len(first) == 2
    results = made(first[1:], monkeypatch)
    (seeds,) = names["following"](results, words)
    assert seeds["workdir"] == f"{tmp_path}/seeds/light-512-decay0.01-0"
    assert names["_lowest"](first[1]["workdir"]) <= results[first[1]["workdir"]]
    assert names["following"]({seeds["workdir"]: 1.0}, words) == []
