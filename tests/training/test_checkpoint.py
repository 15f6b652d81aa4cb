import json
import shutil

import jax
import numpy as np
import pytest

from ebt_jax.errors import UserError
from ebt_jax.training import checkpoint
from ebt_jax.training.config import Config, resolve, to_json
from ebt_jax.training.loop import fit
from ebt_jax.training.workdir import claim_workdir


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """Workdir, config, objective of six bigram steps; checkpoints 4 and 6 are kept."""
    path = tmp_path_factory.mktemp("finished") / "run"
    config = toy.config(
        train={"steps": 6}, eval={"every": 0}, checkpoint={"every": 2, "keep_latest": 2}
    )
    objective = toy.bigram().objective
    batches, held_out = toy.training_batches(8), toy.held_out_batches()
    fit(config, path, objective, toy.tokenizer, batches, held_out)
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


def test_a_half_written_checkpoint_is_passed_over(finished, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "run")
    (path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.latest_step(path) == 6


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
