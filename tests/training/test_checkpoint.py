import json
import os
import shutil

import jax
import numpy as np
import pytest

from ebt_jax.errors import StorageError, UserError
from ebt_jax.training import checkpoint, manifest
from ebt_jax.training.config import Config, to_json
from ebt_jax.training.loop import fit
from ebt_jax.training.resolve import resolve
from ebt_jax.training.task import show_text
from ebt_jax.training.workdir import checkpoint_steps, claim_workdir


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """Workdir, config, objective of six bigram steps; checkpoints 4 and 6 are kept."""
    path = tmp_path_factory.mktemp("finished") / "run"
    config = toy.config(
        train={"steps": 6}, eval={"every": 0}, checkpoint={"every": 2, "keep_latest": 2}
    )
    objective = toy.bigram().objective
    batches, held_out = toy.training_batches(8), toy.held_out_batches()
    fit(config, path, objective, show_text(config, toy.tokenizer), batches, held_out)
    return path, config, objective


def test_a_workdir_without_checkpoints(tmp_path):
    claim_workdir(tmp_path, resolve(Config(), 256))
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        checkpoint.restore_params(tmp_path)


def test_parameters_come_back(finished, monkeypatch):
    path, _, objective = finished
    monkeypatch.setattr(checkpoint, "build_objective", lambda config: objective)
    assert checkpoint.latest_step(path) == 6
    params = checkpoint.restore_params(path)
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(objective.init, jax.random.key(0))
    )
    older = checkpoint.restore_params(path, step=4)
    assert not np.array_equal(params["table"], older["table"])
    with pytest.raises(UserError, match="no checkpoint of step 2; .* those of 4, 6"):
        checkpoint.restore_params(path, step=2)


def test_a_half_written_checkpoint_is_passed_over(finished, tmp_path, capsys):
    path = shutil.copytree(finished[0], tmp_path / "run")
    (path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.latest_step(path) == checkpoint.recover(path) == 6
    assert not capsys.readouterr().err


def damage(path, *steps):
    """Cuts a file of some checkpoints."""
    for step in steps:
        directory = checkpoint.directory_of(path, step)
        os.truncate(directory / "data" / "metadata", 3)


def test_evaluation_takes_the_newest_good_one_and_moves_nothing(
    finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(checkpoint, "build_objective", lambda config: finished[2])
    path = shutil.copytree(finished[0], tmp_path / "run")
    damage(path, 6)
    params = checkpoint.restore_params(path)
    told = capsys.readouterr().err
    assert "warning: checkpoint 6 is not used: data/metadata has 3 bytes, not" in told
    older = checkpoint.restore_params(finished[0], 4)
    assert np.array_equal(params["table"], older["table"])
    assert checkpoint_steps(path) == [4, 6] and not (path / "damaged").exists()
    with pytest.raises(UserError, match="no checkpoint in .* is good .6: data/meta"):
        checkpoint.restore_params(path, 6)


def test_a_damaged_checkpoint_that_cannot_be_moved(finished, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "run")
    damage(path, 6)
    (path / "damaged").write_text("in the way")
    with pytest.raises(StorageError, match="6 cannot be moved to .*: "):
        checkpoint.recover(path)
    assert checkpoint_steps(path) == [4, 6]


def test_if_none_is_good_nothing_is_moved_and_nothing_begins(finished, toy, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "run")
    damage(path, 4, 6)
    for look in (checkpoint.recover, checkpoint.latest_step):
        with pytest.raises(UserError) as error:
            look(path)
        message = str(error.value)
        assert "6: data/metadata has 3 bytes" in message
        assert "4: data/metadata has 3 bytes" in message
        assert message.endswith(
            "put back a copy of one, or name another workdir to start over"
        )
    assert checkpoint_steps(path) == [4, 6] and not (path / "damaged").exists()


def test_a_run_killed_before_its_first_checkpoint_is_sealed_starts_over(
    finished, tmp_path, capsys
):
    path = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(checkpoint.directory_of(path, 4))
    (checkpoint.directory_of(path, 6) / manifest.NAME).unlink()
    assert checkpoint.recover(path) is None
    assert "the checkpoint was not finished; moved to" in capsys.readouterr().err
    assert (path / "damaged" / "6-1" / "state").is_dir()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    finished, toy, tmp_path, capsys, monkeypatch
):
    path, config, objective = finished
    straight = (path / "metrics.jsonl").read_text()
    again = shutil.copytree(path, tmp_path / "run")
    damage(again, 6)
    show = show_text(config, toy.tokenizer)
    pieces = show, toy.training_batches(8), toy.held_out_batches()
    fit(config, again, objective, *pieces)
    assert "continuing at step 4" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "build_objective", lambda config: objective)
    tables = [checkpoint.restore_params(p, 6)["table"] for p in (path, again)]
    assert np.array_equal(*tables)
    assert len((again / "metrics.jsonl").read_text().splitlines()) == len(
        straight.splitlines()
    )


def test_processes_tell_each_other(monkeypatch):
    assert checkpoint.agree(None) is None and checkpoint.agree("a") == "a"
    monkeypatch.setattr("jax.process_count", lambda: 3)
    rows = []

    def gather(mine):
        rows.append(mine)
        other = np.zeros_like(mine)
        other[:3] = np.frombuffer(b"a\nb", np.uint8)
        return np.stack([mine, other, np.zeros_like(mine)])

    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    assert checkpoint.agree("a") == "a\nb"
    assert checkpoint.agree(None) == "a\nb"
    assert checkpoint.agree("é" * 5000) == "é" * 1000 + "\na\nb"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": (3, 3)}, r"has table of shape \(11, 11\), not \(3, 3\)"),
        ({"more/w": (2,)}, "lacks the parameter more/w"),
        ({"table": None}, "has a parameter table, which the config's model has not"),
    ],
)
def test_a_checkpoint_that_does_not_fit(finished, monkeypatch, change, message):
    path, _, objective = finished

    def init(key):
        params = objective.init(key)
        for name, shape in change.items():
            if shape is None:
                del params[name]
            elif "/" in name:
                params["more"] = {"w": np.zeros(shape)}
            else:
                params[name] = np.zeros(shape)
        return params

    other = objective._replace(init=init)
    monkeypatch.setattr(checkpoint, "build_objective", lambda config: other)
    with pytest.raises(UserError, match=f"checkpoint 6 in .* config: it {message}"):
        checkpoint.restore_params(path)


def test_a_checkpoint_holds_its_config(finished, tmp_path):
    path, config, _ = finished
    saved = path / "checkpoints" / "6" / "config" / "metadata"
    assert json.loads(saved.read_text()) == json.loads(to_json(config))
    shutil.copytree(path, tmp_path / "moved")
    assert checkpoint.latest_step(tmp_path / "moved") == 6
