"""The sweeps of recipes and of little text: what goes on to the next round."""

import collections
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


def of_group(name):
    return "transformer_pp" in name, "_muon-" in name


def test_the_better_third_of_each_group_goes_on_and_the_best_get_seeds():
    names = experiment("recipe")
    order = {arm: i for i, arm in enumerate(names["ARMS"])}

    def loss(_, name):  # the lower the rate, then the earlier the arm
        arm, _, rate = name.rpartition("-x")
        return 100 * float(rate) + order[arm]

    first = names["sweep"]()
    results = losses(first, loss)
    second = names["following"](results)
    assert {folder_and_name(run)[0] for run in second} == {"round-500"}
    count = lambda runs: collections.Counter(
        of_group(folder_and_name(run)[1]) for run in runs
    )
    for group, before in count(first).items():
        assert count(second)[group] == max(2, math.ceil(before / 3))
    results |= losses(second, loss)
    third = names["following"](results)
    found = [folder_and_name(run) for run in third]
    assert {folder for folder, _ in found} == {"final"}
    finalists = {name.rpartition("-")[0] for _, name in found}
    assert len(found) == 3 * len(finalists) and len(finalists) == 6
    assert {"transformer_pp-x1", "transformer_pp_muon-x8"} < finalists
    assert {"published-x1", "anchored-x1"} < finalists
    assert {"light_muon-x8", "final_muon-x8"} < finalists
    results |= losses(third, lambda *_: 1.0)
    assert names["following"](results) == []


def test_finalists_are_scored_on_text_and_seeds_that_chose_nothing():
    names = experiment("recipe")
    words = "train=a.txt,tune=b.txt,test=c.txt"
    first = names["sweep"](words)
    (last, *_) = names["sweep"](f"final=light_muon-x16+final-x2,updates=300,{words}")
    assert {run["config.train.seed"] for run in first} == {0}
    assert {run["config.data.held_out_path"] for run in first} == {"b.txt"}
    assert last["config.data.path"] == "a.txt" and last["config.train.seed"] != 0
    assert last["config.data.held_out_path"] == "c.txt"
    assert last["config.train.steps"] == 300
    assert last["config.optim.peak_lr"] == pytest.approx(16 * 2.4e-3)
    with pytest.raises(UserError, match="not 'tune'; add tune=FILE"):
        names["sweep"]("train=a.txt,test=c.txt")
    for wrong in ("light-x", "light", "lite-x2", "light-x0"):
        with pytest.raises(UserError, match="is unknown; known are"):
            names["sweep"](f"final={wrong}")


def test_what_diverged_does_not_go_on():
    names = experiment("recipe")
    first = names["sweep"]("only=light")
    worst = losses(first, lambda _, name: math.nan if name == "light-x2" else 1.0)
    following = [folder_and_name(run)[1] for run in names["following"](worst)]
    assert following == ["light-x1", "light-x4"]


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
    with pytest.raises(UserError, match="word 'siez=4xs' is unknown; known are "):
        experiment(name)["sweep"]("siez=4xs")


def test_thinking_in_small(tmp_path, monkeypatch, capsys):
    """Trainings and their evaluation, then the table of gains."""
    monkeypatch.chdir(EXPERIMENTS.parent)
    text = "Energy falls until the answer no longer changes. " * 100
    (tmp_path / "input.txt").write_text(text)
    (tmp_path / "data" / "tinyshakespeare").mkdir(parents=True)
    (tmp_path / "data" / "tinyshakespeare" / "input.txt").write_text(text[::-1])
    into, data = tmp_path / "runs", tmp_path / "data"
    words = f"experiments/thinking.py:tiny,into={into},data={data}"
    changes = {"config.data.path": str(tmp_path / "input.txt"), "config.mesh.data": "1"}
    found = rounds.select(rounds.expand(words).first, changes, "")
    assert [run.verb for run in found] == ["train", "evaluate"] * 3
    for run in found:
        assert cli.run([run.verb, *run.arguments]) == 0
    scored = json.loads(
        (into / "anchored_s2-2-0/tasks/tinyshakespeare.json").read_text()
    )
    assert len(scored["policies"]) == 2
    capsys.readouterr()
    assert cli.run(["compare", f"--runs={into}/*", "--gains", "--json"]) == 0
    gains = json.loads(capsys.readouterr().out)["gains"]
    ways = collections.Counter((gain["method"], gain["data"]) for gain in gains)
    assert (
        ways["light-2-0", "held-out text"] == ways["light-2-0", "tinyshakespeare"] == 1
    )
    assert ways["anchored_s2-2-0", "tinyshakespeare"] == 3
    # from the first step on, of other steps, best of 4
    assert all(gain["seeds"] == 1 and gain["low"] is None for gain in gains)


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
        "final/light-x2-1",
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
