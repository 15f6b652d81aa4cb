"""Training steps and generated tokens, timed in alternation."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.evaluation.flops import (
    analytic_flops,
    mean_steps,
    tokens_per_sequence,
)
from ebt_jax.evaluation.generation import generate_ids
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.objective import batch_shapes, build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.step import init_state, make_step

Say = Callable[[str], None]

WARM_UP = 2  # calls that are not timed: one compiles, one fills caches
# Side of the square matrices whose product is the measure of what a device can do.
MATMUL_SIDE = {"cpu": 2048, "accelerator": 8192}
MATMUL_CALLS = 5


class Update(NamedTuple):
    """One timed update.

    Attributes:
      seconds: that it took.
      flops: per token that it needs, by formula.
    """

    seconds: float
    flops: float


def train(groups: Sequence[Sequence[Config]], steps: int, say: Say) -> dict[str, Any]:
    """Times whole optimiser updates.

    Args:
      groups: resolved configs; those of a group, if there are two, an EBT and a
        Transformer++ to compare, are timed in alternation.
      steps: updates to time.
      say: told what is being done.

    Returns:
      `rows`, one for each config, see `bench.bench`, with the `batch_ratio` of tokens
      per second to those of the first batch; `comparisons`, one for each group of two:
      `time_ratio` EBT / Transformer++, `flop_ratio` by formula, `time_over_flops`, the
      former divided by the latter, and its `rounds`; `matmul_flops_per_second`;
      `peak_mib`.
    """
    rows, comparisons = [], []
    for group in groups:
        timed = _alternate([_updates(config, say) for config in group], steps, say)
        for config, (compiling, updates) in zip(group, timed, strict=True):
            rows.append(_train_row(config, compiling, updates))
        if len(group) == 2:
            comparisons.append(_compare(group, [updates for _, updates in timed]))
    peak = peak_mib()  # before the product below takes its part
    dtype = groups[0][0].model.dtype
    say(f"timing a product of matrices in {dtype}")
    rate = matmul_flops_per_second(dtype)
    for row in rows:
        row["mfu"] = row["flops_per_token"] * row["tokens_per_second"] / rate
    relative(rows, "batch_ratio", "tokens_per_second", ("model",))
    found = {"rows": rows, "matmul_flops_per_second": rate, "peak_mib": peak}
    return found | ({"comparisons": comparisons} if comparisons else {})


def decode(
    configs: Sequence[Config],
    batches: Sequence[int],
    prompts: Sequence[int],
    new: int,
    thinking: Thinking,
    rounds: int,
    say: Say,
) -> dict[str, Any]:
    """Times generated tokens, those of all rows in alternation.

    Args:
      configs: resolved; if there are two, an EBT and a Transformer++ to compare.
      batches: sequences at once; each number is measured with each prompt.
      prompts: tokens of each prompt.
      new: tokens to add.
      thinking: how the EBT refines each.
      rounds: generations to time, of which the median counts.
      say: told what is being done.

    Returns:
      `rows`, one for each batch, prompt and config, see `bench.bench`, with the
      `growth` of `seconds` since the first prompt and the `batch_ratio` of tokens per
      second to those of the first batch; `comparisons` with `time_ratio`; `peak_mib`.
    """
    generators = [_generator(config, thinking) for config in configs]
    cases = [
        (batch, prompt, config.model, generator)
        for batch in batches
        for prompt in prompts
        for config, generator in zip(configs, generators, strict=True)
    ]
    calls = [
        functools.partial(_generation, generator, model.vocab_size, batch, prompt, new)
        for batch, prompt, model, generator in cases
    ]
    say(f"compiling {len(calls)} generations")
    rows = []
    for (batch, prompt, model, _), (compiling, times) in zip(
        cases, _alternate(calls, rounds, say), strict=True
    ):
        first = statistics.median(first for first, _ in times)
        whole = statistics.median(whole for _, whole in times)
        row = _row(model.kind, batch, batch, whole / new, compiling)
        row |= {"prompt": prompt, "new": new, "first_seconds": first}
        if new > 1 and whole > first:  # else it is below the noise
            row["next_seconds"] = (whole - first) / (new - 1)
        rows.append(row)
    relative(rows, "growth", "seconds", ("model", "batch"))
    relative(rows, "batch_ratio", "tokens_per_second", ("model", "prompt"))
    found: dict[str, Any] = {"rows": rows, "peak_mib": peak_mib()}
    if len(configs) == 2:
        found["comparisons"] = [
            {
                "batch": ours["batch"],
                "prompt": ours["prompt"],
                "time_ratio": ours["seconds"] / baseline["seconds"],
            }
            for ours, baseline in zip(rows[::2], rows[1::2], strict=True)
        ]
    return found


def matmul_flops_per_second(dtype: str) -> float:
    """FLOPs per second of one large product of square matrices, by its median time.

    Args:
      dtype: of the matrices.
    """
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    side = MATMUL_SIDE[kind]
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jnp.matmul)
    times = []
    for _ in range(WARM_UP + MATMUL_CALLS):
        begin = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        times.append(time.perf_counter() - begin)
    return 2.0 * side**3 / statistics.median(times[WARM_UP:])


def peak_mib() -> float:
    """Most memory that was ever in use, in MiB: the accelerator's, or this process'."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def relative(
    rows: Sequence[dict[str, Any]], name: str, of: str, same: Sequence[str]
) -> None:
    """Adds a ratio to rows that have others of their kind.

    Args:
      rows: of results; changed.
      name: of the ratio.
      of: what is divided by that of the first row of the kind.
      same: what rows of one kind have in common, where they have it at all.
    """
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        kind = tuple(row[key] for key in same if key in row)
        kinds.setdefault(kind, []).append(row)
    for first, *others in kinds.values():
        for row in (first, *others) if others else ():
            row[name] = row[of] / first[of]


def _alternate(calls: Sequence[Callable], rounds: int, say: Say) -> list[Any]:
    """Calls A B A B ...; for each of them seconds of its first call, and results."""
    compiling = []
    for call in calls:
        begin = time.perf_counter()
        call()
        compiling.append(time.perf_counter() - begin)
    for _ in range(WARM_UP - 1):
        for call in calls:
            call()
    say(f"timing {rounds} rounds")
    results = [[call() for call in calls] for _ in range(rounds)]
    return list(zip(compiling, zip(*results, strict=True), strict=True))


def _updates(config: Config, say: Say) -> Callable[[], Update]:
    """A training step to be called again and again."""
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    update = make_step(objective, optimizer, seed=0)
    say(f"compiling the training step of {config.model.kind}")
    state = jax.jit(lambda: init_state(objective, optimizer, 0))()
    rng = np.random.default_rng(0)
    shapes_of = {n: s for n, s in batch_shapes(config).items() if n != "index"}

    def drawn(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if name == "weights":
            return jnp.ones(shape.shape, shape.dtype)
        if jnp.issubdtype(shape.dtype, jnp.integer):
            numbers = rng.integers(0, config.model.vocab_size, shape.shape)
        else:
            numbers = rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(numbers, shape.dtype)

    def call() -> Update:
        nonlocal state
        batch = {name: drawn(name, shape) for name, shape in shapes_of.items()}
        jax.block_until_ready((state, batch))
        begin = time.perf_counter()
        state, metrics = update(state, batch)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - begin
        taken = float(metrics["refine_steps"]) if "refine_steps" in metrics else 0.0
        return Update(seconds, analytic_flops(config, shapes, taken).total)

    return call


def _generator(config: Config, thinking: Thinking) -> Callable[..., object]:
    """`generate_ids` of a model that was not trained."""
    objective = build_objective(config)
    params = jax.jit(objective.init)(jax.random.key(0))
    return functools.partial(
        generate_ids, objective, params, sampling=Sampling(), thinking=thinking
    )


def _generation(
    generator: Callable[..., object], vocab: int, batch: int, prompt: int, new: int
) -> tuple[float, float]:
    """Seconds to generate one token, and `new` of them."""
    prompts = np.random.default_rng(0).integers(0, vocab, (batch, prompt))

    def seconds(length: int) -> float:
        begin = time.perf_counter()
        generator(
            list(prompts.astype(np.int32)), context=prompt + new, new_tokens=length
        )
        return time.perf_counter() - begin

    return seconds(1), seconds(new)


def _train_row(
    config: Config, compiling: float, updates: Sequence[Update]
) -> dict[str, Any]:
    batch, seq = config.train.batch_size, tokens_per_sequence(config)
    flops = _mean_flops(config)
    seconds = flops * _seconds_per_flop(updates)
    row = _row(config.model.kind, batch, batch * seq, seconds, compiling)
    return row | {"seq": seq, "flops_per_token": flops}


def _row(
    kind: str, batch: int, tokens: int, seconds: float, compiling: float
) -> dict[str, Any]:
    return {
        "model": kind,
        "batch": batch,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "compile_seconds": compiling,
    }


def _compare(
    configs: Sequence[Config], timed: Sequence[Sequence[Update]]
) -> dict[str, Any]:
    """Time and FLOPs of an EBT / those of a Transformer++."""
    ours, baseline = timed
    flop_ratio = _mean_flops(configs[0]) / _mean_flops(configs[1])
    time_over_flops = _seconds_per_flop(ours) / _seconds_per_flop(baseline)
    return {
        "batch": configs[0].train.batch_size,
        "time_ratio": time_over_flops * flop_ratio,
        "flop_ratio": flop_ratio,
        "time_over_flops": time_over_flops,
        "rounds": [
            (a.seconds / a.flops) / (b.seconds / b.flops)
            for a, b in zip(ours, baseline, strict=True)
        ],
    }


def _mean_flops(config: Config) -> float:
    """FLOPs per token of an update with the mean number of steps, by formula."""
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    return analytic_flops(config, shapes, mean_steps(config.refine)).total


def _seconds_per_flop(updates: Sequence[Update]) -> float:
    return statistics.median(update.seconds / update.flops for update in updates)
