"""The report's sections about energies as scores, gains of thinking, and seeds."""

import json
import math

import numpy as np
import pytest
from page import Page, numbers

from ebt_jax.evaluation.report.make import make_report
from ebt_jax.evaluation.report.runs import read_run
from ebt_jax.evaluation.report.shift import gains, percent, spread
from ebt_jax.evaluation.uncertainty import Doubts, doubt_curves, judge
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training import config as c
from ebt_jax.training.resolve import resolve

CURVE = [2.0, 1.5, 1.25]  # held-out nll; two steps are the trained number
TASK = [3.0, 2.5, 2.0, 1.75]


def write(path, *, seed=0, nll=1.5, curve=CURVE, **model):
    """A workdir without a checkpoint."""
    config = c.Config(
        model=ModelConfig(num_layers=1, num_heads=1, dim=4, **model),
        refine=RefineSetup(num_steps=2),
        train=c.TrainConfig(seed=seed),
    )
    path.mkdir(parents=True)
    (path / "config.json").write_text(c.to_json(resolve(config, 256)))
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    summary = {f"thinking/nll/step_{i}": value for i, value in enumerate(curve, 1)}
    (path / "summary.json").write_text(json.dumps({"eval/nll": nll, **summary}))
    return path


def add(path, folder, name, content):
    (path / folder).mkdir(exist_ok=True)
    (path / folder / f"{name}.json").write_text(json.dumps(content))


def add_doubts(path, name, measures):
    rng = np.random.default_rng(0)
    wrong = (rng.random(40) < 0.5).astype(float)
    doubts = Doubts(
        nll=wrong + rng.random(40),
        wrong=wrong,
        measures={measure: wrong + rng.random(40) for measure in measures},
    )
    content = {"results": judge(doubts), "curves": doubt_curves(doubts)}
    add(path, "uncertainty", name, content)
    return content


@pytest.fixture
def two(tmp_path):
    """An EBT and a Transformer++."""
    return write(tmp_path / "ebt"), write(tmp_path / "plain", kind="transformer_pp")


def report(tmp_path, *paths):
    return make_report(list(map(str, paths)), tmp_path / "r.html", tokens=0).read_text()


def test_uncertainty_is_shown_for_each_text_held_out_first(tmp_path, two):
    ebt, plain = two
    add_doubts(ebt, "arxiv", ("max_probability",))
    kept = add_doubts(ebt, "held_out", ("energy", "max_probability"))
    add_doubts(plain, "held_out", ("max_probability",))
    text = report(tmp_path, ebt, plain)
    said = Page(text).said()
    assert said.index("Uncertainty") < said.index("held-out text doubt run AUROC")
    assert said.index("held-out text doubt run AUROC") < said.index("arxiv doubt run")
    auroc = kept["results"]["auroc/energy"]
    assert f"energy ebt {auroc:.3f}" in said
    charts = numbers(text)["charts"]
    assert set(charts) >= {"risk-0", "tenths-0", "risk-1", "tenths-1"}
    labels = [series["label"] for series in charts["risk-0"]["series"]]
    assert labels == [
        "ebt: energy",
        "ebt: 1 - max. probability",
        "plain: 1 - max. probability",
    ]
    assert [series["run"] for series in charts["risk-0"]["series"]] == [0, 1, 2]
    risk, tenths = charts["risk-0"]["series"][0], charts["tenths-0"]["series"][0]
    assert risk["y"] == kept["curves"]["energy"]["risk"]
    assert tenths["x"]["x"] == list(range(1, 11))
    assert tenths["y"] == kept["curves"]["energy"]["nll"]


def test_verification_is_shown_with_its_intervals(tmp_path, two):
    ebt, plain = two
    kinds = ("", "/replaced", "/shuffled", "/other")
    for path, measures in ((ebt, ("energy", "nll")), (plain, ("nll",))):
        results = {
            f"{measure}{kind}{bound}": value
            for measure in measures
            for kind in kinds
            for bound, value in (("", 0.875), ("/low", 0.75), ("/high", 0.9375))
        }
        add(path, "verification", "held_out", {"results": results})
    said = Page(report(tmp_path, ebt, plain)).said().replace("\xa0", " ")
    cell = "87.5 % (75.0 to 93.8)"
    assert f"energy ebt held-out text {' '.join([cell] * 4)}" in said
    assert f"likelihood plain held-out text {cell}" in said
    assert "excess energy ebt" not in said


def steps(curve):
    return {f"nll/step_{i}": value for i, value in enumerate(curve, 1)}


def add_task(path, name, **policies):
    policies = {
        policy.replace("_", ":"): numbers for policy, numbers in policies.items()
    }
    last = list(policies.values())[-1]
    add(path, "tasks", name, {"results": last, "policies": policies})


def test_gain_of_thinking_against_shift(tmp_path, two):
    ebt, plain = two
    best = {"nll": 2.0}
    add_task(ebt, "dyck", fixed=steps(TASK) | {"nll": TASK[-1]}, best_n=best)
    add_task(ebt, "one_step", fixed=steps([2.0]))
    add(ebt, "tasks", "old", {"results": {"nll": 2.0}})
    add_task(plain, "dyck", trained={"nll": 2.25})
    found = gains(read_run(ebt, "ebt"))
    names = [(gain.data, gain.way, gain.steps) for gain in found]
    assert names == [
        ("held-out text", "more steps", 3),
        ("dyck", "more steps", 4),
        ("dyck", "best:n", 0),
    ]
    held_out, dyck, best = found
    assert held_out.shift == 1 and dyck.shift == pytest.approx(math.exp(2.5 - 1.5))
    assert held_out.share == pytest.approx(1 - math.exp(1.25 - 1.5))
    assert dyck.share == pytest.approx(1 - math.exp(1.75 - 2.5))
    assert best.share == pytest.approx(1 - math.exp(2.0 - 2.5))
    assert gains(read_run(plain, "plain")) == []
    text = report(tmp_path, ebt, plain)
    said = Page(text).said().replace("\xa0", " ")
    assert "held-out text ebt 3 steps 4.482 1.00 +22.1 %" in said
    assert "dyck ebt 4 steps 12.18 2.72 +52.8 %" in said
    assert "dyck ebt best:n 12.18 2.72 +39.3 %" in said
    assert "policies." not in said
    (series,) = numbers(text)["charts"]["shift"]["series"]
    assert series["label"] == "ebt, more steps"
    assert series["x"]["shift"] == [1.0, 2.7183]


def test_a_run_that_has_not_finished_has_the_steps_of_its_last_evaluation(tmp_path):
    path = write(tmp_path / "ebt")
    row = {"step": 5, "eval/nll": 1.5} | {
        f"eval/{k}": v for k, v in steps(CURVE).items()
    }
    (path / "summary.json").unlink()
    (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    add_task(path, "dyck", fixed=steps(TASK))
    assert [gain.data for gain in gains(read_run(path, "ebt"))][-1] == "dyck"
    (series,) = numbers(report(tmp_path, path))["charts"]["thinking"]["series"]
    assert series["y"] == CURVE


def test_runs_that_differ_in_their_seed_share_a_row(tmp_path):
    paths = [
        write(tmp_path / "s2-0", seed=0, nll=1.5),
        write(tmp_path / "s2-1", seed=1, nll=1.75, curve=[2.0, 1.5, 1.5]),
        write(tmp_path / "wide", seed=0, nll=1.25, ffn_multiplier=2.0),
    ]
    add_task(paths[0], "dyck", fixed=steps(TASK), best_n={"nll": 2.5})
    said = Page(report(tmp_path, *paths)).said().replace("\xa0", " ")
    assert "held-out text, 3 steps gain, %: dyck, 4 steps gain, %: dyck, best:n" in said
    gain = 100 * (1 - math.exp(-0.25))
    mean, deviation = gain / 2, gain / math.sqrt(2)
    nll = f"1.6250 ± {0.25 / math.sqrt(2):.4f}"
    assert f"2 {nll} {mean:.2f} ± {deviation:.2f} 52.76 0.00" in said
    assert f"wide model. ffn_ multiplier 2 1 1.2500 {gain:.2f}" in said
    assert "s2 – 2 1.6250" in said
    assert "Over seeds" not in Page(report(tmp_path, *paths[1:])).said()


def test_what_is_damaged_is_named(tmp_path, two):
    ebt, _ = two
    add(ebt, "uncertainty", "held_out", {"results": {}})
    add(ebt, "uncertainty", "list", [1])
    add(ebt, "verification", "held_out", {"result": {}})
    run = read_run(ebt, "ebt")
    assert run.doubts == {} and run.verified == {}
    assert "uncertainty/held_out.json cannot be read (it has no 'curves')" in run.notes
    assert "verification/held_out.json cannot be read (it has no 'results')" in (
        run.notes
    )
    assert any(note.startswith("uncertainty/list.json cannot") for note in run.notes)
    said = Page(report(tmp_path, ebt)).said()
    assert "uncertainty/held_out.json cannot be read" in said
    assert "Uncertainty" not in said and "Verification" not in said


def test_words_for_numbers():
    assert percent(0.125) == "+12.5&nbsp;%" and percent(math.nan) == "–"
    assert spread([], 2) == "–" and spread([1.0], 2) == "1.00"
    assert spread([1.0, 3.0], 1) == "2.0&nbsp;±&nbsp;1.4"


def test_settings_that_cannot_be_read_are_no_seeds(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.mkdir()
        (path / "config.json").write_text("{ not JSON")
    assert "Over seeds" not in Page(report(tmp_path, *paths)).said()
