"""A run from its config to its closing line.

    restore or start; then for every step: next batch, update, log? evaluate? save?

An update is dispatched before the numbers of an earlier one are waited for, so that the
device does not wait for the host. A killed run that is started again continues at its
newest checkpoint with the next batch and the next key, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path

import jax
from absl import logging
from jax.sharding import Mesh

from ebt_jax.data import pipeline, tokenizers
from ebt_jax.errors import TrainingDiverged, UserError
from ebt_jax.interfaces import Metrics, Objective
from ebt_jax.refine import PyTree
from ebt_jax.training import checkpoint
from ebt_jax.training.closing import close_run, evaluate, read_summary
from ebt_jax.training.config import Config, resolve
from ebt_jax.training.examples import example_log
from ebt_jax.training.initial import begin, find_origin
from ebt_jax.training.monitor import Monitor, check_logging, say
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import learning_rates, make_optimizer, parameter_groups
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import (
    NumpyBatch,
    check_batch,
    global_batch,
    local_rows,
    make_mesh,
    state_target,
)
from ebt_jax.training.step import init_state, make_step
from ebt_jax.training.workdir import check_config, check_workdir, claim_workdir


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
      TrainingDiverged: when a number is not finite any more.
    """
    path = check_workdir(workdir)
    mesh = check_setup(config)
    if config.log.compilation_cache:
        enable_compilation_cache()
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = resolve(config, tokenizer.vocab_size)
    check_config(path, config)
    objective = build_objective(config)
    batches = pipeline.train_batches(
        config.data,
        tokenizer,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        rows=local_rows(mesh, config.train.batch_size),
        progress=jax.process_index() == 0,
    )
    held_out = pipeline.held_out_batches(
        config.data,
        tokenizer,
        batch_size=config.eval.batch_size,
        sequences=config.eval.sequences,
    )
    with contextlib.closing(batches):
        return fit(config, path, objective, tokenizer, batches, held_out, resume_from)


def fit(
    config: Config,
    path: Path,
    objective: Objective,
    tokenizer: tokenizers.Tokenizer,
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
      tokenizer: decodes the text sample.
      batches: to train on, the sequences of this process. Its place is saved.
      held_out: batches to evaluate on; iterated over more than once.
      resume_from: as for `train`.

    Returns:
      As `train`.

    Raises:
      UserError, TrainingDiverged: as `train`.
    """
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every save
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
    say(introduction(config, shapes, mesh))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    groups = jax.tree.leaves(parameter_groups(shapes, config.refine))
    rates = {
        name: rate
        for name, rate in learning_rates(config.optim).items()
        if name in groups
    }
    init = lambda: init_state(objective, optimizer, config.train.seed)
    train_step = make_step(
        objective,
        optimizer,
        seed=config.train.seed,
        accumulation=config.train.accumulation,
        rates=rates,
        mesh=mesh,
    )
    target = state_target(jax.eval_shape(init), mesh)
    with Saver(path, config.checkpoint) as saver:
        own = (path, start) if start else None
        state, next_example = begin(config, own, origin, init, target)
        batches.seek(next_example)
        if start:
            say(f"continuing at step {start}")
        elif origin and origin.whole:
            start = origin.step
            say(f"continuing {origin.path} at step {start}")
            saver.save(start, state, next_example, config, wait=True)
        with (
            Monitor(path, config, start=start) as monitor,
            example_log(path, config.log.example_ids, start) as list_examples,
        ):

            def fetch(step: int, numbers: Metrics) -> dict[str, float]:
                row = check_finite(step, numbers, saver)
                speed = monitor.speed(step, row["train/tokens"])
                return {**row, "tokens_per_second": speed}

            pending = None  # an update whose numbers are yet to be logged
            row: dict[str, float] = {}
            for step in range(start + 1, steps + 1):
                batch = next(batches, None)
                if batch is None:
                    raise UserError(
                        f"the training data ends after {step - 1} steps, but "
                        f"train.steps is {steps}; set data.repeat=True, or lower it"
                    )
                list_examples(step, batch)
                shared = global_batch(batch, mesh, config.train.batch_size)
                state, numbers = train_step(state, shared)
                if pending is not None:
                    monitor.record(pending[0], fetch(*pending))
                    pending = None
                last = step == steps
                evaluated: dict[str, float] = {}
                if last or due(step, config.eval.every):
                    row = fetch(step, numbers)
                    params = state.params
                    evaluated = evaluate(config, objective, params, held_out, mesh)
                    row |= evaluated
                    monitor.record(step, row)
                    monitor.say(evaluation_line(step, row))
                    monitor.restart_clock(step)
                elif step == 1 or due(step, config.log.every):
                    pending = (step, numbers)
                if last or due(step, config.checkpoint.every) or saver.failed():
                    check_finite(step, numbers, saver)
                    place = batches.next_example
                    saver.save(step, state, place, config, evaluated, wait=last)
    return close_run(
        config,
        path,
        objective,
        tokenizer,
        state.params,
        held_out,
        mesh,
        max(start, steps),
        row,
    )


def check_setup(config: Config) -> Mesh:
    """The mesh of a run, once what needs neither data nor model is checked.

    Raises:
      UserError: for devices, batch or logging that cannot be had.
    """
    check_logging(config.log)
    mesh = make_mesh(config.mesh)
    check_batch(config.train, mesh, config.data.context)
    return mesh


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 for never, happens now."""
    return every > 0 and step % every == 0


def check_finite(step: int, numbers: Metrics, saver: Saver) -> dict[str, float]:
    """Waits for the numbers of an update and names them `train/...`.

    Raises:
      TrainingDiverged: if the loss, the gradient or the new parameters are not finite.
    """
    values = {f"train/{k}": float(v) for k, v in jax.device_get(numbers).items()}
    for name in ("loss", "gradient_norm", "parameter_norm"):
        value = values[f"train/{name}"]
        if not math.isfinite(value):
            saver.wait_until_finished()  # the last good one may be on its way
            good = saver.latest_step()
            where = "there is no checkpoint"
            if good is not None:
                where = f"the last good checkpoint is {saver.directory / str(good)}"
            raise TrainingDiverged(
                f"training diverged: {name} is {value} at step {step}; {where}; lower "
                "optim.peak_lr, optim.step_size_lr_multiplier or refine.step_size, and "
                "name another workdir"
            )
    return values


def evaluation_line(step: int, row: dict[str, float]) -> str:
    """`step 250: held-out nll 2.310 | perplexity 10.07 | 3.333 bits per byte`."""
    parts = [f"step {step}: held-out nll {row['eval/nll']:.3f}"]
    parts.append(f"perplexity {row['eval/perplexity']:.2f}")
    if "eval/bits_per_byte" in row:
        parts.append(f"{row['eval/bits_per_byte']:.3f} bits per byte")
    if "eval/energy_gap" in row:
        parts.append(f"energy gap {row['eval/energy_gap']:.3g}")
    return " | ".join(parts)


def introduction(config: Config, params: PyTree, mesh: Mesh) -> str:
    """What is going to be trained, on what."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = mesh.devices.flat[0]
    return (
        f"model    {config.model.kind} {config.model.size}, {count:,} parameters\n"
        f"data     {config.data.path}, tokenizer {config.data.tokenizer}, "
        f"{config.train.batch_size} x {config.data.context} tokens per step\n"
        f"devices  {mesh.size} x {device.device_kind}, jax {jax.__version__}; the "
        "first step takes longer, it is compiled"
    )


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, for the next start.

    A cache that is set already, as by JAX_COMPILATION_CACHE_DIR, stays. Where the
    directory cannot be made, there is no cache: that is no reason to fail.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(root) / "ebt_jax"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
