"""How fast a training step and a generated token are, on random tokens.

`ebt bench train` times whole optimiser updates, `decode` tokens that are generated one
after the other, `memory` tells what the compiled training step needs, and `compile` how
long compiling it takes. Times vary from run to run, so what is compared is measured in
alternation in one process, and the median of several calls counts; calls that compile
are not timed with them.

System 1 is as published: two steps, a landscape each, the loss on both, learnt step
size. System 2, too, without its replay buffer: two or three steps, drawn for each
update, of one landscape, Langevin noise, drawn step sizes, the loss on the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError
from ebt_jax.evaluation import bench_compiled, bench_timed
from ebt_jax.evaluation.bench_settings import Settings
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup, system_2
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config, OptimConfig, TrainConfig
from ebt_jax.training.resolve import resolve, resolve_vision


def bench(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a benchmark.

    Args:
      settings: what to measure.
      say: told, a line at a time, what is being done.

    Returns:
      What JSON can hold: the settings, the numbers of the first row, and, where
      there are more than one, all `rows` and what compares them. Numbers of a row, by
      job:

      train: `seconds`, the median of an update (where the number of refinement steps is
        drawn, of updates brought to the mean number by their FLOPs);
        `tokens_per_second`; `compile_seconds`; `flops_per_token` by formula; `mfu`,
        those FLOPs per second / `matmul_flops_per_second` of one large product.
      decode: `seconds` per new token of the whole batch, the prompt's share included;
        `tokens_per_second`; `compile_seconds`; `first_seconds` for the prompt and one
        token, `next_seconds` of each token after it.
      memory: MiB of the compiled step's `temporaries_mib` and `arguments_mib`;
        `arrays`, the temporaries as a multiple of one float32 `[batch, seq, vocab]`.
      compile: `lower_seconds` and `compile_seconds`, with the compilation cache off.

      `peak_mib` is the accelerator's, or on a CPU this process', whatever ran in it.

    Raises:
      UserError: for settings that no model can have.
    """
    with _without_cache():
        found = _run(settings, say)
    rows = found["rows"]
    if len(rows) == 1:
        del found["rows"]
    return about(settings) | rows[0] | found


def _run(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    first, models = settings.batch[0], settings.models
    if settings.job == "memory":
        lengths = [dataclasses.replace(settings, seq=seq) for seq in settings.sequences]
        return bench_compiled.memory(
            [bench_config(s, kind, first) for kind in models for s in lengths], say
        )
    if settings.job == "compile":
        return bench_compiled.compiling(_deeper(settings), say)
    if settings.job == "decode":
        return bench_timed.decode(
            [bench_config(settings, kind, first) for kind in models],
            settings.batch,
            settings.prompt,
            settings.new,
            Thinking(settings.num_steps, settings.best_of),
            settings.rounds,
            say,
        )
    groups = [
        [bench_config(settings, kind, batch) for kind in models]
        for batch in settings.batch
    ]
    return bench_timed.train(groups, settings.steps, say)


def bench_config(settings: Settings, kind: str, batch: int) -> Config:
    """The config of a run.

    Args:
      settings: of the benchmark.
      kind: of the model, `ebt` or `transformer_pp`.
      batch: sequences at once.

    Raises:
      UserError: for settings that no model can have.
    """
    anchored = settings.candidate_input != "embedding"
    given = {
        "conditioning": settings.conditioning or ("default" if anchored else None),
        "remat": settings.remat,
        "unroll": settings.unroll,
        "attention_block": settings.attention_block,
    }
    model = ModelConfig(
        kind=kind,
        size=settings.size,
        num_layers=settings.layers,
        vocab_size=settings.vocab,
        dtype=settings.dtype,
        candidate_input=settings.candidate_input,
        candidate_layers=settings.candidate_layers if kind == "ebt" else 0,
        space=settings.space,
        patch=settings.patch,
        ffn_multiplier=4.0 if settings.space == "image" else 1.0,
        **{name: value for name, value in given.items() if value is not None},
    )
    refine, objective = _system(settings)
    changed = {"block": settings.block, "meta_gradient": settings.meta_gradient}
    given = {name: value for name, value in changed.items() if value is not None}
    try:
        refine = dataclasses.replace(refine, **given)
    except ValueError as error:
        raise UserError(f"refine.{error}") from error
    config = Config(
        model=model,
        refine=refine,
        objective=objective,
        optim=OptimConfig(peak_lr=1e-4, step_size_lr_multiplier=3 * refine.step_size),
        data=DataConfig(context=settings.seq),
        train=TrainConfig(batch_size=batch),
    )
    if settings.space == "text":
        return resolve(config, settings.vocab)
    if settings.space == "video":
        return resolve_vision(config, frame_size=settings.frame)
    side, channels = settings.image, settings.channels
    return resolve_vision(config, image_shape=(side, side, channels))


def about(settings: Settings) -> dict[str, Any]:
    """What was measured, where and when."""
    config = bench_config(settings, settings.models[0], settings.batch[0])
    ebt: dict[str, Any] = {
        "system": settings.system,
        "refine_steps": config.refine.num_steps,
    }
    if settings.space != "image":
        ebt["candidate_input"] = settings.candidate_input
        ebt["candidate_layers"] = config.model.blocks_of_candidates
        ebt["conditioning"] = config.model.conditioning
    if settings.job == "decode":
        ebt |= {"num_steps": settings.num_steps, "best_of": settings.best_of}
    sizes = {
        "text": {"vocab": settings.vocab},
        "video": {"space": "video", "frame": settings.frame},
        "image": {
            "space": "image",
            "image": settings.image,
            "channels": settings.channels,
            "patch": settings.patch,
        },
    }
    device = jax.devices()[0]
    return {
        "job": settings.job,
        "model": settings.model,
        **(ebt if config.model.kind == "ebt" else {}),
        "size": settings.size,
        "layers": config.model.layers,
        "dtype": settings.dtype,
        **sizes[settings.space],
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _system(settings: Settings) -> tuple[RefineSetup, ObjectiveConfig]:
    """How the EBT is trained: denoising of images is published with one step."""
    image, steps = settings.space == "image", settings.refine_steps
    if settings.system == 1:
        steps = steps or (1 if image else 2)
        refine = RefineSetup(
            num_steps=steps,
            num_landscapes=1 if image else steps,
            step_size=500.0,
            initial_candidate="noised" if image else "noise",
        )
        return refine, ObjectiveConfig(loss_steps="all")
    refine, objective = system_2(step_size=5.0, noise_std=3.0, num_steps=steps or 3)
    if image:
        refine = dataclasses.replace(refine, noise_std=0.0, initial_candidate="noised")
    return refine, objective


def _deeper(settings: Settings) -> list[Config]:
    """Of each model, as asked and with more layers; of the EBT also with more steps."""
    configs = []
    for kind in settings.models:
        changes: list[dict[str, int]] = [{}, {"layers": settings.layers_to}]
        if kind == "ebt":
            changes.append({"refine_steps": settings.steps_to})
        configs += [
            bench_config(
                dataclasses.replace(settings, **change), kind, settings.batch[0]
            )
            for change in changes
        ]
    return configs


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Programs are compiled, whatever the cache of compiled programs holds."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    compilation_cache.reset_cache()  # JAX remembers whether it is on
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
