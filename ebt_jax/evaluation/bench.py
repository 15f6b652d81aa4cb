"""How fast a training step and a generated token are, on random tokens.

The first calls, which compile, are not timed. Times vary from run to run: compare
medians of runs made one after the other on the same machine.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.evaluation.generation import Sampling, generate_ids
from ebt_jax.models.config import ModelConfig
from ebt_jax.objectives import RefineSetup
from ebt_jax.training.config import Config, OptimConfig, TrainConfig, resolve
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.step import init_state, make_step

JOBS = ("train", "decode")
WARM_UP = 2  # calls that are not timed: one compiles, one fills caches


def bench(
    job: str,
    model: ModelConfig,
    *,
    batch: int,
    seq: int,
    prompt: int,
    new: int,
    steps: int,
) -> dict[str, Any]:
    """Times one job with System 1 as published: two steps, learnt step size.

    Args:
      job: "train" for whole optimiser updates, "decode" for generated tokens.
      model: with its `vocab_size`.
      batch: sequences at once.
      seq: tokens of context of a training sequence.
      prompt: tokens of each prompt, `decode` only.
      new: tokens to add to each, `decode` only.
      steps: updates to time, `train` only.

    Returns:
      What was timed, `seconds` (median of an update; mean of a token over all that were
      added), `tokens_per_second`, `compile_seconds` and `peak_mib` (of the
      accelerator, or of this process on a CPU).

    Raises:
      UserError: for an unknown job.
    """
    if job not in JOBS:
        raise UserError(f"bench job {job!r} is unknown; there are {', '.join(JOBS)}")
    config = resolve(
        Config(
            model=model,
            refine=RefineSetup(num_steps=2, num_landscapes=2, step_size=500.0),
            optim=OptimConfig(peak_lr=1e-4, step_size_lr_multiplier=1500.0),
            train=TrainConfig(batch_size=batch),
        ),
        model.vocab_size,
    )
    about = {
        "job": job,
        "model": model.kind,
        "candidate_input": model.candidate_input,
        "size": model.size,
        "dtype": model.dtype,
        "vocab": model.vocab_size,
        "batch": batch,
    }
    if job == "train":
        compiling, times = _train(config, seq, steps)
        seconds, tokens, about["seq"] = statistics.median(times), batch * seq, seq
    else:
        compiling, seconds = _decode(config, prompt, new)
        tokens = batch
        about |= {"prompt": prompt, "new": new}
    device = jax.devices()[0]
    return about | {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "compile_seconds": compiling,
        "peak_mib": _peak_mib(device),
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def _train(config: Config, seq: int, steps: int) -> tuple[float, list[float]]:
    """Seconds of the first update and of the timed ones."""
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    update = make_step(objective, optimizer, seed=0)
    state = jax.jit(lambda: init_state(objective, optimizer, 0))()
    rng, batch, times = np.random.default_rng(0), config.train.batch_size, []
    for _ in range(WARM_UP + steps):
        tokens = rng.integers(0, config.model.vocab_size, (batch, seq + 1))
        example = {
            "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
            "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
            "weights": jnp.ones((batch, seq), jnp.float32),
        }
        begin = time.perf_counter()
        state, metrics = update(state, example)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - begin)
    return times[0], times[WARM_UP:]


def _decode(config: Config, prompt: int, new: int) -> tuple[float, float]:
    """Seconds of the first run, which compiles, and per token of the second."""
    objective = build_objective(config)
    params = jax.jit(objective.init)(jax.random.key(0))
    rng, batch = np.random.default_rng(0), config.train.batch_size
    prompts = rng.integers(0, config.model.vocab_size, (batch, prompt))

    def run(length: int) -> float:
        begin = time.perf_counter()
        generate_ids(
            objective,
            params,
            list(prompts.astype(np.int32)),
            context=prompt + new,
            new_tokens=length,
            sampling=Sampling(),
        )
        return time.perf_counter() - begin

    return run(WARM_UP), run(new) / new


def _peak_mib(device: Any) -> float:
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
