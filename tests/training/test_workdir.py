import pytest

from ebt_jax.errors import UserError
from ebt_jax.training import workdir
from ebt_jax.training.config import Config, OptimConfig, TrainConfig
from ebt_jax.training.resolve import resolve


def test_a_workdir_that_is_empty_text():
    with pytest.raises(UserError, match="workdir is empty; name a directory"):
        workdir.check_workdir("")


def test_a_workdir_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        with pytest.raises(
            UserError, match="cannot be made: .*file is not a directory"
        ):
            workdir.check_workdir(tmp_path / name)


def test_a_workdir_without_permission(tmp_path, monkeypatch):
    # Faked: a superuser, as in a container, may write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="cannot be written: no permission in"):
        workdir.check_workdir(tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_checking_creates_nothing(tmp_path):
    path = workdir.check_workdir(tmp_path / "a" / "b")
    assert path.is_absolute() and not path.parent.exists()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir, "replace_text", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        workdir.claim_workdir(tmp_path / "run", Config())


def test_config_is_written_and_read_again(tmp_path):
    config = resolve(Config(), 256)
    workdir.claim_workdir(tmp_path / "run", config)
    path, again = workdir.open_workdir(tmp_path / "run")
    assert again == config and path == tmp_path / "run"
    assert [file.name for file in path.iterdir()] == ["config.json"]


def test_another_config_is_refused_with_both_values(tmp_path):
    config = resolve(Config(), 256)
    workdir.claim_workdir(tmp_path, config)
    other = resolve(Config(optim=OptimConfig(peak_lr=1.0)), 300)
    with pytest.raises(UserError) as error:
        workdir.check_config(tmp_path, other)
    message = str(error.value)
    assert "model.vocab_size is 256 there and 300 here" in message
    assert "optim.peak_lr is 0.0024 there and 1.0 here" in message
    assert "name another workdir" in message


def test_a_run_goes_on_for_longer_with_its_own_schedule(tmp_path):
    config = resolve(Config(train=TrainConfig(steps=100)), 256)
    workdir.claim_workdir(tmp_path, config)
    longer = Config(train=TrainConfig(steps=200))
    with pytest.raises(UserError, match="with its own optim.schedule_steps"):
        workdir.check_config(tmp_path, resolve(longer, 256))
    longer = Config(train=TrainConfig(steps=200), optim=OptimConfig(schedule_steps=100))
    workdir.check_config(tmp_path, resolve(longer, 256))


def test_how_a_run_is_watched_may_change(tmp_path, toy):
    workdir.claim_workdir(tmp_path, toy.config())
    watched = toy.config(
        log={"every": 1},
        eval={"every": 1},
        checkpoint={"every": 1},
        mesh={"data": 1},
    )
    workdir.check_config(tmp_path, watched)


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"model": 1}'])
def test_a_config_file_that_is_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is not a config of this version"):
        workdir.open_workdir(tmp_path)


def test_a_workdir_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run: there is no config.json"):
        workdir.open_workdir(tmp_path)
    assert workdir.checkpoint_steps(tmp_path) == []


def test_checkpoints_of_nobody_knows_what(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        workdir.check_config(tmp_path, resolve(Config(), 256))


def test_steps_are_listed_in_order_and_nothing_else(tmp_path):
    for name in ("10", "9", "11.orbax-checkpoint-tmp", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert workdir.checkpoint_steps(tmp_path) == [9, 10]


def test_another_run_may_have_begun_elsewhere(tmp_path):
    config = resolve(Config(train=TrainConfig(init_from="there")), 256)
    workdir.claim_workdir(tmp_path, config)
    workdir.check_origin(tmp_path, resolve(Config(), 256))
    with pytest.raises(UserError, match="train.init_from is 'there' there and '' here"):
        workdir.check_config(tmp_path, resolve(Config(), 256))


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError):
        workdir.replace_text(tmp_path / "config.json", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
