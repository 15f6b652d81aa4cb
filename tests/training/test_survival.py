import json
import math
import os
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax import cli
from ebt_jax.errors import Stopped, StorageError, TrainingDiverged, UserError
from ebt_jax.training import checkpoint, guard
from ebt_jax.training.config import TrainConfig
from ebt_jax.training.loop import fit
from ebt_jax.training.task import show_text
from ebt_jax.training.workdir import checkpoint_steps

OFTEN = {"log": {"every": 1, "example_ids": True}, "eval": {"every": 0}}


def run(toy, path, *, fake=None, batches=None, **sections):
    config = toy.config(**{**OFTEN, **sections})
    fake = fake or toy.bigram(noise=0.3)
    batches = batches or toy.training_batches(8)
    return fit(
        config,
        path,
        fake.objective,
        show_text(config, toy.tokenizer),
        batches,
        toy.held_out_batches(),
    )


def lines(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def untimed(path):
    return [{k: v for k, v in row.items() if "second" not in k} for row in lines(path)]


def batch_ids(toy, count):
    """The sequences of each batch that there is without a rollback."""
    batches = toy.training_batches(8)
    return [next(batches)["index"].tolist() for _ in range(count)]


def poison(toy, *updates):
    """One sequence of each of these batches, counted from 1."""
    ids = batch_ids(toy, max(updates))
    return np.array([ids[update - 1][3] for update in updates])


class Acting:
    """Batches, before the `at`-th of which something happens."""

    def __init__(self, batches, at, act):
        self.batches, self.left, self.act = batches, at, act
        self.seek = batches.seek

    @property
    def next_example(self):
        return self.batches.next_example

    def __next__(self):
        self.left -= 1
        if not self.left:
            self.act()
        return next(self.batches)


def test_an_update_that_is_not_finite_is_left_out_and_counted(toy, tmp_path):
    fake = toy.bigram(poison=poison(toy, 4, 9))
    result = run(toy, tmp_path / "run", fake=fake)
    rows = lines(tmp_path / "run")
    skipped = [row["step"] for row in rows if row["train/skipped_in_a_row"]]
    assert skipped == [4, 9] and result["train/skipped_total"] == 2
    # The numbers of a step that was left out are null, and no other's.
    assert [row["step"] for row in rows if row["train/loss"] is None] == [4, 9]
    norms = [row["train/parameter_norm"] for row in rows]
    assert norms[3] == norms[2] and norms[4] != norms[3] and None not in norms
    assert math.isfinite(result["eval/nll"])
    # The optimiser's schedule counts updates that were made.
    rates = [row["train/learning_rate/weights"] for row in rows]
    assert rates[4] == rates[3]


def test_a_run_of_them_goes_back_to_a_checkpoint_and_on_with_new_data(
    toy, tmp_path, capsys
):
    bad = poison(toy, 7, 8, 9)
    settings = {"train": {"max_skipped": 3}}
    path = tmp_path / "run"
    result = run(toy, path, fake=toy.bigram(noise=0.3, poison=bad), **settings)
    rows = lines(path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["train/rollbacks"] for row in rows] == [0] * 5 + [1] * 7
    assert result["train/skipped_total"] == 3
    assert not any(row["train/skipped_in_a_row"] for row in rows)
    # Steps 6, 7, ... were made again with what comes after the tenth batch, which was
    # on its way when the ninth was found to be bad.
    ids = batch_ids(toy, 17)
    seen = [row["ids"] for row in lines(path, "examples-0.jsonl")]
    assert seen == ids[:5] + ids[10:17]
    told = capsys.readouterr().err
    assert "3 updates in a row were left out, up to step 9 (loss nan" in told
    assert "back to checkpoint 5, on with new data (rollback 1 of 2)" in told
    # Killed after it went back, and started again: the same once more.
    other = tmp_path / "other"
    cut = Acting(toy.training_batches(8), 13, _interrupt)
    with pytest.raises(KeyboardInterrupt):
        fake = toy.bigram(noise=0.3, poison=bad)
        run(toy, other, fake=fake, batches=cut, **settings)
    assert checkpoint_steps(other) == [5]
    again = run(toy, other, fake=toy.bigram(noise=0.3, poison=bad), **settings)
    assert untimed(other) == untimed(path)
    assert again["eval/nll"] == result["eval/nll"]


def _interrupt():
    raise KeyboardInterrupt


def test_after_some_rollbacks_it_counts_as_diverged(toy, tmp_path):
    path = tmp_path / "run"
    fake = toy.bigram(poison=poison(toy, *range(7, 60)))
    settings = {"train": {"max_skipped": 2, "max_rollbacks": 1}}
    with pytest.raises(TrainingDiverged) as error:
        run(toy, path, fake=fake, **settings)
    good = path / "checkpoints" / "5"
    assert (
        "training diverged: 2 updates in a row, up to step 7, were left out (loss "
        in (str(error.value))
    )
    assert f"after 1 rollbacks of at most 1; the last checkpoint is {good}; " in (
        str(error.value)
    )
    assert checkpoint.latest_step(path) == 5
    report = json.loads((path / "divergence.json").read_text())
    assert report["step"] == 7 and report["skipped_in_a_row"] == 2
    assert report["checkpoint"] == 5
    assert report["rollbacks"] == [{"from_step": 8, "to_step": 5}]
    assert report["records"][-1]["train/loss"] is None
    assert report["records"][0]["train/loss"] > 0
    ids = batch_ids(toy, 12)
    assert [batch["ids"] for batch in report["batches"]][-3:] == ids[9:12]


@pytest.mark.parametrize("step", [2, 4])
def test_without_a_checkpoint_there_is_a_report(toy, tmp_path, step):
    # Numbers are looked at when they are logged, and before a checkpoint is saved.
    sections = {"log": {"every": 100}, "checkpoint": {"every": step}}
    fake = toy.bigram(poison=poison(toy, *range(1, 9)))
    with pytest.raises(TrainingDiverged, match=f"to step {step}, .* no checkpoint; "):
        run(toy, tmp_path / "run", fake=fake, train={"max_skipped": 2}, **sections)
    assert (tmp_path / "run" / "divergence.json").exists()
    assert not checkpoint_steps(tmp_path / "run")


def test_a_checkpoint_waits_for_an_update_that_is_made(toy, tmp_path):
    fake = toy.bigram(poison=poison(toy, 5, 6))
    keep = {"checkpoint": {"every": 5, "keep_every": 1}}
    run(toy, tmp_path / "run", fake=fake, **keep)
    assert checkpoint_steps(tmp_path / "run") == [7, 10, 12]


def judged(norms, factor):
    state, good = guard.new_guard(), []
    for norm in norms:
        one, state = guard.judge(state, jnp.float32(1), jnp.float32(norm), factor)
        good.append(bool(one))
    return good, state


def test_spikes_of_the_gradient_norm():
    norms = [1.0, 9.0, *[1.0] * 30, 4.0, 2.0, math.inf, 1.0]
    good, state = judged(norms, factor=3.0)
    # The first norms are too few to tell what is usual.
    assert [i for i, one in enumerate(good) if not one] == [32, 34]
    assert state.skipped_total == 2 and state.skipped_in_a_row == 0
    assert state.made == len(norms) - 2
    accepted = [n for n, one in zip(norms, good, strict=True) if one]
    np.testing.assert_allclose(state.mean_norm, np.mean(accepted), rtol=1e-6)
    assert judged(norms, factor=0.0)[0].count(False) == 1  # off: only what is infinite


def test_the_usual_norm_is_that_of_the_last_updates():
    _, state = judged([5.0] * 50 + [1.0] * 800, factor=0.0)
    np.testing.assert_allclose(state.mean_norm, 1.0, atol=0.01)


@pytest.mark.parametrize("factor", [-1.0, 0.5, 1.0, math.inf])
def test_a_spike_factor_that_is_none(factor):
    with pytest.raises(UserError, match="train.spike_factor is .* more than 1, or 0"):
        TrainConfig(spike_factor=factor)


@pytest.mark.parametrize(
    "number, code, name",
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "Ctrl")],
)
def test_signals_save_and_stop(toy, tmp_path, number, code, name):
    before = signal.getsignal(number)
    straight, path = tmp_path / "straight", tmp_path / "run"
    expected = run(toy, straight)
    act = lambda: os.kill(os.getpid(), number)
    with pytest.raises(Stopped, match=f"{name}.* at step 7 of 12, which is saved") as e:
        run(toy, path, batches=Acting(toy.training_batches(8), 7, act))
    assert e.value.code == code and signal.getsignal(number) is before
    assert checkpoint.latest_step(path) == 7
    assert run(toy, path)["eval/nll"] == expected["eval/nll"]
    assert untimed(path) == untimed(straight)


def test_a_second_ctrl_c_ends_at_once(toy, tmp_path):
    def act():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path / "run", batches=Acting(toy.training_batches(8), 4, act))
    assert not checkpoint_steps(tmp_path / "run")


def test_a_workdir_that_vanishes_is_not_made_again(toy, tmp_path):
    path, never = tmp_path / "run", {"every": 0}
    vanish = lambda: path.rename(tmp_path / "elsewhere")  # as if it was unmounted
    batches = Acting(toy.training_batches(8), 7, vanish)
    with pytest.raises(Stopped, match="the workdir .* has vanished: it is not there"):
        run(toy, path, batches=batches, checkpoint=never)
    assert not path.exists()
    (tmp_path / "elsewhere").rename(path)
    run(toy, path, checkpoint=never)  # it is back
    assert [row["step"] for row in lines(path)] == list(range(1, 13))


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("a\nb"), 2, "error: a b"),
        (TrainingDiverged("x"), 3, "error: x"),
        (Stopped("x"), 75, "stopped: x"),
        (Stopped("x", 130), 130, "stopped: x"),
        (StorageError("x"), 75, "error: x"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, line):
    def fail(*_):
        raise error

    monkeypatch.setattr("ebt_jax.cli.usage", fail)
    assert cli.run(["train", "--help"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_flags_of_several_processes_reach_them(capsys):
    config = Path(__file__).parents[2] / "experiments" / "text.py"
    command = ["train", f"--config={config}:quickstart", "--workdir=w"]
    assert cli.run([*command, "--coordinator=a:1"]) == 2
    assert "error: --num_processes is missing" in capsys.readouterr().err
