import json
import shutil

import jax
import numpy as np
import pytest

from ebt_jax.errors import UserError
from ebt_jax.training import checkpoint
from ebt_jax.training.config import Config, OptimConfig, TrainConfig, resolve, to_json
from ebt_jax.training.loop import fit


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


def test_a_workdir_that_is_empty_text():
    with pytest.raises(UserError, match="workdir is empty; name a directory"):
        checkpoint.check_workdir("")


def test_a_workdir_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        with pytest.raises(
            UserError, match="cannot be made: .*file is not a directory"
        ):
            checkpoint.check_workdir(tmp_path / name)


def test_a_workdir_without_permission(tmp_path, monkeypatch):
    # Faked: a superuser, as in a container, may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="cannot be written: no permission in"):
        checkpoint.check_workdir(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_checking_creates_nothing(tmp_path):
    path = checkpoint.check_workdir(tmp_path / "a" / "b")
    assert path.is_absolute() and not path.parent.exists()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "replace_text", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        checkpoint.claim_workdir(tmp_path / "run", Config())


def test_config_is_written_and_read_again(tmp_path):
    config = resolve(Config(), 256)
    checkpoint.claim_workdir(tmp_path / "run", config)
    path, again = checkpoint.open_workdir(tmp_path / "run")
    assert again == config and path == tmp_path / "run"
    assert [file.name for file in path.iterdir()] == ["config.json"]


def test_another_config_is_refused_with_both_values(tmp_path):
    config = resolve(Config(), 256)
    checkpoint.claim_workdir(tmp_path, config)
    other = resolve(Config(optim=OptimConfig(peak_lr=1.0)), 300)
    with pytest.raises(UserError) as error:
        checkpoint.check_config(tmp_path, other)
    message = str(error.value)
    assert "model.vocab_size is 256 there and 300 here" in message
    assert "optim.peak_lr is 0.0024 there and 1.0 here" in message
    assert "name another workdir" in message


def test_a_run_goes_on_for_longer_with_its_own_schedule(tmp_path):
    config = resolve(Config(train=TrainConfig(steps=100)), 256)
    checkpoint.claim_workdir(tmp_path, config)
    longer = Config(train=TrainConfig(steps=200))
    with pytest.raises(UserError, match="with its own optim.schedule_steps"):
        checkpoint.check_config(tmp_path, resolve(longer, 256))
    longer = Config(train=TrainConfig(steps=200), optim=OptimConfig(schedule_steps=100))
    checkpoint.check_config(tmp_path, resolve(longer, 256))


def test_how_a_run_is_watched_may_change(tmp_path, toy):
    checkpoint.claim_workdir(tmp_path, toy.config())
    watched = toy.config(
        log={"every": 1},
        eval={"every": 1},
        checkpoint={"every": 1},
        mesh={"data": 1},
    )
    checkpoint.check_config(tmp_path, watched)


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"model": 1}'])
def test_a_config_file_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is not a config of this version"):
        checkpoint.open_workdir(tmp_path)


def test_a_workdir_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run: there is no config.json"):
        checkpoint.open_workdir(tmp_path)
    assert checkpoint.latest_step(tmp_path) is None


def test_a_workdir_without_checkpoints(tmp_path):
    checkpoint.claim_workdir(tmp_path, resolve(Config(), 256))
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


def test_checkpoints_of_nobody_knows_what(finished, tmp_path):
    path = shutil.copytree(finished[0], tmp_path / "run")
    (path / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        checkpoint.check_config(path, finished[1])


def test_a_checkpoint_holds_its_config(finished, tmp_path):
    path, config, _ = finished
    saved = path / "checkpoints" / "6" / "config" / "metadata"
    assert json.loads(saved.read_text()) == json.loads(to_json(config))
    shutil.copytree(path, tmp_path / "moved")
    assert checkpoint.latest_step(tmp_path / "moved") == 6
