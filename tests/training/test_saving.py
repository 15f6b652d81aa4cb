"""Saving: what is kept, what happens when storage fails."""

import os
import re
import shutil

import jax
import numpy as np
import pytest

from ebt_jax.errors import StorageError
from ebt_jax.training import checkpoint, manifest, saving
from ebt_jax.training.config import CheckpointConfig
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.saving import Saver
from ebt_jax.training.step import init_state
from ebt_jax.training.workdir import checkpoint_steps, claim_workdir


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)


@pytest.fixture
def run(toy, tmp_path):
    """Workdir, config and state of a bigram run."""
    config = toy.config()
    objective = toy.bigram().objective
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    claim_workdir(tmp_path / "run", config)
    return tmp_path / "run", config, init_state(objective, optimizer, 0)


def failing(function, times, error):
    """A function that fails so many times and counts its calls."""

    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        if wrapped.calls <= times:
            raise error
        return function(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


FULL = OSError(28, "No space left on device")


def test_latest_best_and_every_so_many_are_kept(run):
    path, config, state = run
    keep = CheckpointConfig(keep_latest=2, keep_best=1, keep_every=5)
    nll = {2: 3.0, 3: 1.0, 4: 2.0, 6: 1.5}
    for steps in (range(1, 5), range(5, 9)):  # the best outlives a restart
        with Saver(path, keep) as saver:
            for step in steps:
                metrics = {"eval/nll": nll[step]} if step in nll else None
                saver.save(step, state, 8 * step, config, metrics)
    assert checkpoint_steps(path) == [3, 5, 7, 8]
    assert all(not manifest.verify(checkpoint.directory_of(path, s)) for s in (3, 8))
    assert manifest.read(checkpoint.directory_of(path, 3)).metrics == {"eval/nll": 1.0}


def test_the_latest_is_kept_though_others_are_better(run):
    path, config, state = run
    with Saver(path, CheckpointConfig(keep_best=2)) as saver:
        for step in range(1, 7):
            saver.save(step, state, 0, config, {"eval/nll": float(step)})
    assert checkpoint_steps(path) == [1, 2, 5, 6]


def test_a_state_comes_back_with_its_place(run):
    path, config, state = run
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    before = jax.tree.map(np.asarray, state)
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Saver(path, config.checkpoint) as saver:
        saver.save(3, state, 24, config)
        donate(state)
        saver.save(4, jax.tree.map(np.asarray, before), 32, config, wait=True)
        assert saver.latest_step() == 4
    restored = checkpoint.restore(path, 3, target)
    assert restored.next_example == 24
    jax.tree.map(np.testing.assert_array_equal, restored.state, before)


def test_a_step_is_saved_once(run, monkeypatch):
    path, config, state = run
    with Saver(path, config.checkpoint) as saver:
        saver.save(1, state, 8, config, wait=True)
        count = failing(manifest.write, 0, FULL)
        monkeypatch.setattr(manifest, "write", count)
        saver.save(1, state, 8, config, wait=True)
        assert not count.calls
    assert checkpoint_steps(path) == [1]


@pytest.mark.parametrize("failures", [1, 3])
def test_a_failed_save_is_made_again_with_a_later_state(
    run, monkeypatch, capsys, failures
):
    path, config, state = run
    with Saver(path, config.checkpoint) as saver:
        saver.save(1, state, 8, config, wait=True)
        write = failing(manifest.write, failures, FULL)
        monkeypatch.setattr(manifest, "write", write)
        saver.save(2, state, 16, config)
        saver.wait_until_finished()
        assert saver.failed()
        saver.save(3, state, 24, config)
        assert not saver.failed()
        saver.save(4, state, 32, config)
    assert checkpoint_steps(path) == [3, 4] and checkpoint.recover(path) == 4
    told = capsys.readouterr().err.splitlines()
    assert len(told) == failures
    assert told[0] == (
        "warning: checkpoint 2 could not be saved: No space left on device; trying "
        "again with step 3 in 0 s (1 of 4)"
    )


def test_storage_that_stays_full_ends_with_one_clear_error(run, monkeypatch):
    path, config, state = run
    with pytest.raises(StorageError) as error:
        with Saver(path, CheckpointConfig(save_retries=2)) as saver:
            saver.save(1, state, 8, config)
            saver.wait_until_finished()
            monkeypatch.setattr(manifest, "write", failing(manifest.write, 99, FULL))
            saver.save(2, state, 16, config)
            saver.save(3, state, 24, config)
    assert str(error.value) == (
        f"checkpoint 3 could not be saved in {path / 'checkpoints'}, tried 3 times: No "
        "space left on device; 1 is good; make room or repair the storage, and give "
        "the same command again"
    )
    assert os.listdir(path / "checkpoints") == ["1"]  # and no temporary directory
    assert checkpoint.recover(path) == 1


def test_orbax_that_cannot_even_begin(run, monkeypatch, capsys):
    path, config, state = run
    refused = PermissionError(13, "Permission denied")
    with Saver(path, config.checkpoint) as saver:
        monkeypatch.setattr(
            saver._manager, "save", failing(saver._manager.save, 2, refused)
        )
        saver.save(1, state, 8, config)
    assert checkpoint.recover(path) == 1
    assert capsys.readouterr().err.count("could not be saved: Permission denied") == 2


def test_a_folder_that_vanishes_is_not_made_again(run):
    path, config, state = run
    with pytest.raises(StorageError, match="checkpoints has vanished; there is none"):
        with Saver(path, config.checkpoint) as saver:
            shutil.rmtree(path)
            saver.save(1, state, 8, config)
    assert not path.exists()


def test_a_folder_that_cannot_be_made(run, monkeypatch):
    path, config, _ = run
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager", failing(None, 1, FULL))
    with pytest.raises(StorageError, match="checkpoints cannot be made or read: "):
        Saver(path, config.checkpoint)


def test_a_save_that_fails_at_the_end_is_an_error(run, monkeypatch):
    path, config, state = run
    monkeypatch.setattr(manifest, "write", failing(manifest.write, 99, FULL))
    with pytest.raises(StorageError, match="checkpoint 1 could not be saved .* none"):
        with Saver(path, config.checkpoint) as saver:
            saver.save(1, state, 8, config)


def test_another_error_is_not_hidden_by_a_failed_save(run, monkeypatch, capsys):
    path, config, state = run
    monkeypatch.setattr(manifest, "write", failing(manifest.write, 99, FULL))
    with pytest.raises(KeyboardInterrupt):
        with Saver(path, config.checkpoint) as saver:
            saver.save(1, state, 8, config)
            raise KeyboardInterrupt
    assert (
        "warning: checkpoint 1 could not be saved: No space" in capsys.readouterr().err
    )


def test_what_a_killed_run_leaves_is_cleared_away(run):
    path, config, state = run
    with Saver(path, config.checkpoint) as saver:
        saver.save(1, state, 8, config)
    (path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    shutil.copytree(path / "checkpoints" / "1", path / "checkpoints" / "3")
    (path / "checkpoints" / "3" / manifest.NAME).unlink()  # killed before sealing
    assert checkpoint.recover(path) == 1
    with Saver(path, config.checkpoint) as saver:
        saver.save(3, state, 24, config)
    assert checkpoint.recover(path) == 3
    assert sorted(os.listdir(path / "checkpoints")) == ["1", "3"]


def test_a_run_may_go_back_and_a_damaged_checkpoint_be_moved_meanwhile(run):
    path, config, state = run
    with Saver(path, CheckpointConfig(keep_latest=3, keep_best=1)) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, state, 0, config, {"eval/nll": 9.0 - step})
        saver.drop_after(3)
        (checkpoint.directory_of(path, 3) / "data" / "metadata").write_text("")
        assert checkpoint.recover(path) == 2
        for step in (3, 4, 5):
            saver.save(step, state, 0, config)
    assert checkpoint_steps(path) == [2, 3, 4, 5]  # 2 is the best of those left
    assert checkpoint.recover(path) == 5


def test_messages_of_tensorstore_are_put_in_a_line():
    pages = ValueError("RESOURCE_EXHAUSTED: \n" + "x " * 500 + "[os_error_code='28']")
    assert saving._in_one_line(pages) == "No space left on device"
    long = saving._in_one_line(ValueError("y\n" * 500))
    assert re.fullmatch(r"ValueError: (y )+y?", long) and len(long) < 220
