"""`ebt evaluate --task` from end to end, and each of its errors."""

import json
import math

import jax
import pytest

from ebt_jax import cli
from ebt_jax.data.config import DataConfig
from ebt_jax.evaluation.tasks.run import Result
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training import checkpoint, objective
from ebt_jax.training.config import Config, EvalConfig
from ebt_jax.training.resolve import resolve
from ebt_jax.training.workdir import claim_workdir
from ebt_jax.verbs.evaluate_judgement import data_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with random parameters, and the files of two tasks."""
    path = tmp_path_factory.mktemp("tasks")
    config = Config(
        model=ModelConfig(num_layers=1, num_heads=1, dim=8, conditioning="default"),
        data=DataConfig(context=32),
        refine=RefineSetup(step_size=5.0),
        eval=EvalConfig(batch_size=8),
    )
    config = resolve(config, 256)
    claim_workdir(path / "run", config)
    made = objective.build_objective(config)
    params = jax.jit(made.init)(jax.random.key(0))
    (path / "data" / "arc").mkdir(parents=True)
    (path / "data" / "lambada").mkdir()
    arc = {"query": "Which?", "choices": ["one", "two"], "gold": 1}
    lines = [json.dumps(arc), "no json", json.dumps(arc | {"gold": 0})]
    (path / "data" / "arc" / "a_test.jsonl").write_text("\n".join(lines))
    text = json.dumps({"text": "what nobody said"})
    (path / "data" / "lambada" / "test.jsonl").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "pick_step", lambda path, step: 1)
        patch.setattr(checkpoint, "load_params", lambda *_: params)
        # Always the same one is compiled once.
        patch.setattr(objective, "build_objective", lambda config: made)
        yield path


def run(capsys, folder, *flags):
    """Exit code, stdout and stderr of `ebt evaluate` on that run."""
    capsys.readouterr()
    code = cli.run(["evaluate", f"--workdir={folder / 'run'}", *flags])
    return code, *capsys.readouterr()


def test_results_as_json_and_in_the_workdir(capsys, folder):
    flags = ["--task=arc,lambada", f"--data={folder / 'data'}", "--think=fixed:steps=1"]
    code, out, err = run(capsys, folder, *flags, "--json")
    assert code == 0
    said = json.loads(out)
    assert said["checkpoint"] == 1 and list(said["tasks"]) == ["arc", "lambada"]
    arc = said["tasks"]["arc"]
    assert arc["counts"]["items"] == 2 and arc["counts"]["malformed"] == 1
    assert 0 <= arc["results"]["accuracy_energy"] <= 1
    assert arc["results"]["chance"] == 0.5
    assert arc["results"]["energy_gradients"] == 1
    assert "line 2: is not JSON" in err
    assert "arc: 2 items, multiple choice, by letter; 1 malformed; " in err
    assert sorted(file.name for file in (folder / "run" / "tasks").iterdir()) == [
        "arc.json",
        "lambada.json",
    ]
    kept = json.loads((folder / "run" / "tasks" / "arc.json").read_text())
    assert kept["results"] == arc["results"] and kept["checkpoint"] == 1
    assert [row["id"] for row in kept["scores"]] == [
        "a_test.jsonl, line 1",
        "a_test.jsonl, line 3",
    ]


def test_a_table_of_all_that_is_there(capsys, folder, monkeypatch):
    def run_task(name, task, sources, examinee, *, limit, progress, warn):
        assert limit == 1 and examinee.context == 32
        return Result({"items": limit}, sources, {"perplexity": math.inf}, [{}])

    monkeypatch.setattr("ebt_jax.evaluation.tasks.run.run_task", run_task)
    code, out, err = run(
        capsys, folder, "--task=all", f"--data={folder / 'data'}", "--items=1"
    )
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[:4]] == [
        ["task", "items", "ppl"],
        ["lambada", "1", "inf"],
        ["arc", "1", "inf"],
        ["arc_cloze", "1", "inf"],
    ]
    kept = json.loads((folder / "run" / "tasks" / "arc.json").read_text())
    assert kept["results"] == {"perplexity": None}  # JSON has no inf
    assert "left out: task gsm8k: nothing is there in" in err


def test_results_of_several_policies_are_kept_while_items_are_the_same(
    capsys, folder, monkeypatch
):
    def run_task(name, task, sources, examinee, *, limit, progress, warn):
        nll = 1.0 / examinee.thinking.best_of
        return Result({"items": limit}, sources, {"nll": nll}, [])

    monkeypatch.setattr("ebt_jax.evaluation.tasks.run.run_task", run_task)
    file = folder / "run" / "tasks" / "arc.json"

    def policies(*flags):
        flags = ["--task=arc", f"--data={folder / 'data'}", *flags]
        assert run(capsys, folder, *flags)[0] == 0
        return json.loads(file.read_text())["policies"]

    trained = {"as trained": {"nll": 1.0}}
    file.write_text('["not of a task"]')
    assert policies("--items=1") == trained
    both = trained | {"best_of:n=2": {"nll": 0.5}}
    assert policies("--items=1", "--think=best_of:n=2") == both
    assert policies("--items=1") == both
    assert policies("--items=2") == trained


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--task=gsm8"],
            "there is no task 'gsm8'; did you mean 'gsm8k'? Known: all, ",
        ),
        (["--task=,"], "--task is ',', but has to name a task of: all, gsm8k"),
        (["--task=squad"], "task squad: nothing is there in"),
        (["--task=squad"], "looks for squad/dev-*.json or squad/*.json in the folder"),
        (["--task=arc", "--data="], "--data is missing; give it the folder"),
        (["--task=arc", "--packing=concat"], "--packing is not for tasks"),
        (["--task=arc", "--text_key=text"], "--text_key is not for tasks"),
        (["--task=arc", "--sequences=3"], "leave it out, or give --items"),
        (["--task=arc", "--uncertainty"], "--uncertainty is not for tasks; leave it"),
        (["--task=arc", "--verification"], "--verification is not for tasks"),
        (["--corruptions=2"], "--corruptions is of --verification, which is not given"),
        (["--task=arc,lambada", "--data=tfds:ai2_arc"], "is of one task, but --task"),
        (["--task=all", "--data=tfds:ai2_arc"], "is of one task, but --task is 'all'"),
        (
            ["--task=novels", "--data=tfds:novels"],
            "task novels is not in TFDS; give its files, or a task of: gsm8k, squad",
        ),
        (["--task=all", "--data=nowhere"], "no files of any task in 'nowhere'"),
        (["--task=arc", "--data=tfds:no_such"], "cannot read 'no_such'"),
        (["--task=arc", "--items=-1"], "--items=-1"),
        (["--items=3", "--data="], "--items is of tasks, but no --task is given"),
    ],
)
def test_mistakes(capsys, folder, flags, message):
    code, out, err = run(capsys, folder, f"--data={folder / 'data'}", *flags)
    assert code == 2 and not out
    *_, last = err.splitlines()
    assert last.startswith("error: ") and message in last
    assert not (folder / "run" / "tasks" / "squad.json").exists()


def test_judgements_beside_the_other_results(capsys, folder):
    path = folder / "other.txt"
    path.write_text("Energy falls until nothing changes. " * 9)
    flags = [f"--data={path}", "--uncertainty", "--verification", "--corruptions=2"]
    code, out, _ = run(capsys, folder, *flags, "--packing=concat")
    assert code == 0
    blank = "\n\n"
    _, doubts, verified = out.split(blank)
    head, energy, drop, entropy, probability, last = doubts.splitlines()
    assert head.split()[:2] == ["doubt", "AUROC"]
    names = [line.split()[0] for line in (energy, drop, entropy, probability)]
    assert names == ["energy", "energy_drop", "entropy", "max_probability"]
    found = json.loads(run(capsys, folder, *flags, "--json")[1])
    assert found["uncertainty/rank_correlation/energy"] == pytest.approx(
        float(energy.split()[2]), abs=1e-4
    )
    assert f"{found['uncertainty/wrong']:.1%} of the likeliest tokens" in last
    assert found["tokens"] == len(path.read_text()) - 1
    assert "of 2 corruptions of each kind of 10 sequences" in verified
    assert f"{found['verification/energy/shuffled']:.1%} (" in verified
    for kind in ("uncertainty", "verification"):
        kept = json.loads((folder / "run" / kind / "other.json").read_text())
        assert kept["data"] == str(path) and kept["checkpoint"] == 1
        assert kept["think"] is None
        for name, value in kept["results"].items():
            assert found[f"{kind}/{name}"] == value


def test_names_of_what_was_scored():
    names = {
        None: "held_out",
        "corpus/other.txt.gz": "other",
        "tfds:lm1b/test": "lm1b_test",
        "wikitext2/valid.txt.gz": "wikitext2_valid",
        "test.txt": "test",
        "a b/*": "a_b",
        "..": "data",
    }
    assert {data: data_name(data) for data in names} == names
