"""A run from its config to its closing line.

    restore or start; then for every step: next batch, update, log? evaluate? save?

An update is dispatched before the numbers of an earlier one are waited for, so that the
device does not wait for the host. A killed run that is started again continues at its
newest checkpoint with the next batch and the next key, bit for bit. Updates that are
not finite are left out (`guard`); where that goes on, the run goes back to a checkpoint
and on with new data (`rollback`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh

from ebt_jax.data import pipeline
from ebt_jax.errors import Stopped, UserError
from ebt_jax.interfaces import Batch, Metrics, Objective
from ebt_jax.refine import PyTree
from ebt_jax.training import checkpoint
from ebt_jax.training.closing import close_run, evaluate, read_summary
from ebt_jax.training.config import Config
from ebt_jax.training.environment import record_environment
from ebt_jax.training.examples import example_log
from ebt_jax.training.initial import begin, find_origin
from ebt_jax.training.monitor import Monitor, say
from ebt_jax.training.objective import build_objective
from ebt_jax.training.opening import (
    check_setup,
    enable_compilation_cache,
    introduction,
)
from ebt_jax.training.optim import learning_rates, make_optimizer, parameter_groups
from ebt_jax.training.rollback import Recent, roll_back, too_many
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import (
    NumpyBatch,
    global_batch,
    local_rows,
    state_target,
)
from ebt_jax.training.signals import StopSignals
from ebt_jax.training.step import TrainState, init_state, make_step
from ebt_jax.training.task import Show, open_task
from ebt_jax.training.timing import Stopwatch, flops_per_update
from ebt_jax.training.watch import Watch
from ebt_jax.training.workdir import check_config, check_workdir, claim_workdir
from ebt_jax.training.writers import storage_explained


def train(config: Config, workdir: str, resume_from: str = "") -> dict[str, float]:
    """Trains what a config describes, or continues where an earlier call stopped.

    What a user can get wrong is checked before anything is written.

    Args:
      config: of the run, resolved or not.
      workdir: where everything is written; a run of the same config is continued.
      resume_from: `WORKDIR[@STEP]` of another run, whose state a new one begins with.

    Returns:
      The last step's `train/...` and `eval/...`, and the thinking curve's
      `thinking/nll/step_i`.

    Raises:
      UserError: for a mistake in the config, the data or the workdir.
      TrainingDiverged: when updates are not finite again and again.
      Stopped: by SIGTERM, a preemption notice or Ctrl-C; the same call continues it.
    """
    path = check_workdir(workdir)
    mesh = check_setup(config)
    if config.log.compilation_cache:
        enable_compilation_cache()
    task = open_task(config)
    config = task.config
    check_config(path, config)
    objective = build_objective(config)
    batches = task.train_batches(local_rows(mesh, config.train.batch_size))
    held_out = task.held_out()
    with contextlib.closing(batches):
        return fit(config, path, objective, task.show, batches, held_out, resume_from)


@storage_explained()
def fit(
    config: Config,
    path: Path,
    objective: Objective,
    show: Show,
    batches: pipeline.TrainBatches,
    held_out: Iterable[NumpyBatch],
    resume_from: str = "",
) -> dict[str, float]:
    """`train` for an objective and data of one's own.

    Args:
      config: resolved. `model` and `objective` are not looked at, of `refine` only what
        is learnt, of `data` only the context.
      path: the workdir, absolute.
      objective: what to minimise.
      show: writes samples at the end.
      batches: to train on, the sequences of this process. Its place is saved.
      held_out: batches to evaluate on; iterated over more than once.
      resume_from: as for `train`.

    Returns:
      As `train`.

    Raises:
      UserError, TrainingDiverged, Stopped: as `train`.
      StorageError: if files cannot be read or written, also after trying again.
    """
    # Orbax tells of every save, and of a failure in pages; `Saver` says it in a line.
    logging.set_verbosity(logging.FATAL)
    mesh = check_setup(config)
    check_config(path, config)
    start, steps = checkpoint.recover(path) or 0, config.train.steps
    summary = read_summary(path)
    if start >= steps and summary.pop("step", None) == start:
        say(f"nothing to do: {path} has made all of its {start} steps")
        return summary

    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    origin = None if start else find_origin(config, resume_from, shapes)
    claim_workdir(path, config)
    record_environment(path, mesh, start)
    say(introduction(config, shapes, mesh))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    groups = jax.tree.leaves(parameter_groups(shapes, config.refine))
    rates = {
        name: rate
        for name, rate in learning_rates(config.optim).items()
        if name in groups
    }
    init = lambda key: init_state(objective, optimizer, key)
    train_step = make_step(
        objective,
        optimizer,
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        rates=rates,
        mesh=mesh,
        spike_factor=config.train.spike_factor,
    )
    target = state_target(jax.eval_shape(init, train_step.key), mesh)
    with (
        Saver(path, config.checkpoint) as saver,
        StopSignals() as signals,
        Watch(path, config.log, start) as watch,
    ):
        own = (path, start) if start else None
        state, next_example = begin(config, own, origin, init, target)
        batches.seek(next_example)
        if start:
            say(f"continuing at step {start}")
        elif origin and origin.whole:
            start = origin.step
            say(f"continuing {origin.path} at step {start}")
            saver.save(start, state, next_example, config, wait=True)
        run = Run(
            config=config,
            path=path,
            train_step=train_step,
            evaluate=lambda p: evaluate(config, objective, p, held_out, mesh),
            batches=batches,
            mesh=mesh,
            saver=saver,
            signals=signals,
            watch=watch,
            recent=Recent(config.train.max_skipped),
            flops=flops_per_update(config, shapes),
        )
        progress = make_updates(run, state, start)
        while not progress.good:
            with watch.phase("rolling back"):
                recent, (state, step, row, _) = run.recent, progress
                state, start = roll_back(
                    config.train, path, saver, recent, state, target, step, row
                )
            progress = make_updates(run, state, start)
    return close_run(
        config,
        path,
        objective,
        show,
        progress.state.params,
        held_out,
        mesh,
        progress.step,
        progress.row,
    )


class Run(NamedTuple):
    """What stays the same during a run.

    Attributes:
      config: resolved.
      path: the workdir.
      train_step: of `make_step`.
      evaluate: parameters -> the held-out numbers, named `eval/...`.
      batches: to train on.
      mesh: of all devices.
      saver: of its checkpoints.
      signals: which may ask it to stop.
      watch: heartbeats, hangs, profiles.
      recent: for a report.
      flops: of an update, None if not known.
    """

    config: Config
    path: Path
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[PyTree], dict[str, float]]
    batches: pipeline.TrainBatches
    mesh: Mesh
    saver: Saver
    signals: StopSignals
    watch: Watch
    recent: Recent
    flops: float | None


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
      state: the present one.
      step: updates made when `row` was.
      row: numbers of that update; empty if none was made.
      good: whether all updates are made; else too many in a row were left out.
    """

    state: TrainState
    step: int
    row: dict[str, float]
    good: bool


def make_updates(run: Run, state: TrainState, start: int) -> Progress:
    """Makes the updates from one on, until the last or until they do no good.

    Args:
      run: what stays the same.
      state: after `start` updates; donated.
      start: updates made before.

    Raises:
      UserError: if the data ends.
      Stopped: if the run was asked to stop, and is saved.
    """
    config, watch, steps = run.config, run.watch, run.config.train.steps
    kind = run.mesh.devices.flat[0].device_kind
    stopwatch = Stopwatch(
        start,
        flops=run.flops,
        devices=run.mesh.size,
        device_kind=kind,
        unit=config.model.unit,
    )
    pending = None  # an update whose numbers are yet to be logged
    row: dict[str, float] = {}
    saving = False  # also until an update is made, where a save was due
    with (
        Monitor(run.path, config, start=start) as monitor,
        example_log(run.path, config.log.example_ids, start) as list_examples,
    ):

        def fetch(step: int, numbers: Metrics) -> dict[str, float]:
            """Waits for the numbers of an update and names them `train/...`."""
            got = {f"train/{k}": float(v) for k, v in jax.device_get(numbers).items()}
            run.recent.numbers(step, got)
            return got

        def log(step: int, row: dict[str, float]) -> None:
            monitor.record(step, row)
            watch.logged()
            if warning := stopwatch.input_warning():
                monitor.say(warning)

        for step in range(start + 1, steps + 1):
            watch.before_step(step)
            with stopwatch.spending("input"):
                batch = next_batch(run.batches, step, steps)
                shared = global_batch(batch, run.mesh, config.train.batch_size)
            list_examples(step, batch)
            run.recent.batch(step, batch)
            state, numbers = run.train_step(state, shared)
            watch.after_step(step, numbers)
            if pending is not None:
                row = fetch(*pending)
                row |= stopwatch.lap(pending[0], row["train/tokens"])
                log(pending[0], row)
                if too_many(config.train, row):
                    return Progress(state, pending[0], row, False)
                pending = None

            last, stopping = step == steps, run.signals.stop_now()
            evaluating = last or due(step, config.eval.every)
            logging_now = step == 1 or due(step, config.log.every)
            saving |= due(step, config.checkpoint.every) or run.saver.failed()
            evaluated: dict[str, float] = {}
            if logging_now and not evaluating:
                pending = (step, numbers)
            if not (evaluating or saving or stopping):
                continue

            row = fetch(step, numbers)
            if too_many(config.train, row):
                return Progress(state, step, row, False)
            if evaluating:
                row |= stopwatch.lap(step, row["train/tokens"])
                with watch.phase("evaluating"):
                    evaluated = run.evaluate(state.params)
                row |= evaluated
                log(step, row)
                monitor.say(evaluation_line(step, row))
                stopwatch.restart(step)
            # A checkpoint to go back to holds no update that was left out.
            if last or stopping or (saving and not row["train/skipped_in_a_row"]):
                with watch.phase("saving"), stopwatch.spending("checkpoint"):
                    place, wait = run.batches.next_example, last or stopping
                    run.saver.save(step, state, place, config, evaluated, wait=wait)
                saving = False
            if stopping and not last:
                if pending is not None:
                    row |= stopwatch.lap(step, row["train/tokens"])
                    log(step, row)
                raise stopped(run, step)
    return Progress(state, max(start, steps), row, True)


def next_batch(batches: pipeline.TrainBatches, step: int, steps: int) -> NumpyBatch:
    """The next batch of this process.

    Raises:
      UserError: if there is none.
    """
    batch = next(batches, None)
    if batch is None:
        raise UserError(
            f"the training data ends after {step - 1} steps, but train.steps is "
            f"{steps}; set data.repeat=True, or lower it"
        )
    return batch


def stopped(run: Run, step: int) -> Stopped:
    """What a run that was asked to stop says at its end."""
    interrupted = run.signals.interrupted
    why = "Ctrl-C" if interrupted else "SIGTERM or a preemption notice"
    return Stopped(
        f"{why} at step {step} of {run.config.train.steps}, which is saved; the same "
        "command continues there",
        130 if interrupted else 75,
    )


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens now."""
    return every > 0 and step % every == 0


def evaluation_line(step: int, row: dict[str, float]) -> str:
    """`step 250: held-out nll 2.310 | perplexity 10.07 | 3.333 bits per byte`."""
    if "eval/solved" in row:
        parts = [f"step {step}: held-out boards solved {row['eval/solved']:.1%}"]
        parts.append(f"empty cells right {row['eval/cell_accuracy']:.1%}")
        parts.append(f"nll {row['eval/nll']:.3f}")
    elif "eval/nll" in row:
        parts = [f"step {step}: held-out nll {row['eval/nll']:.3f}"]
        parts.append(f"perplexity {row['eval/perplexity']:.2f}")
    else:
        parts = [f"step {step}: held-out smooth L1 {row['eval/smooth_l1']:.5f}"]
    if "eval/psnr" in row:
        parts.append(f"PSNR {row['eval/psnr']:.2f} dB")
    if "eval/bits_per_byte" in row:
        parts.append(f"{row['eval/bits_per_byte']:.3f} bits per byte")
    if "eval/energy_gap" in row:
        parts.append(f"energy gap {row['eval/energy_gap']:.3g}")
    return " | ".join(parts)
