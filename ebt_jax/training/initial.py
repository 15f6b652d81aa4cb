"""Where a run begins, the first of these that there is:

1. the newest good checkpoint of its own workdir;
2. `--resume_from=WORKDIR[@STEP]`: the whole state of another run, for a new workdir;
3. `train.init_from`: parameters of another run or of a file, with a fresh optimiser;
4. the seed.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ebt_jax import interop
from ebt_jax.errors import UserError
from ebt_jax.refine import PyTree
from ebt_jax.training import checkpoint, packed, workdir
from ebt_jax.training.checkpoint import Restored, Shapes
from ebt_jax.training.config import Config
from ebt_jax.training.step import TrainState

# Parameters with an axis that is the vocabulary, and which one.
VOCABULARY = {"embed/embedding": 0, "candidate_embed/kernel": 0, "output/kernel": 1}
FILES = (".npz", ".safetensors", ".ckpt", ".pt", ".pth")


class Origin(NamedTuple):
    """What a new run begins with.

    Attributes:
      path: a workdir, or a file.
      step: of the workdir's checkpoint, known to be good; -1 for a file.
      arrays: the parameters in the file by name; empty for a workdir.
      whole: whether it is all of the state, not the parameters alone.
    """

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    whole: bool


def find_origin(config: Config, resume_from: str, params: PyTree) -> Origin | None:
    """Finds and checks what a new run is to begin with. Writes nothing.

    Args:
      config: resolved.
      resume_from: `WORKDIR` or `WORKDIR@STEP`; empty for none.
      params: shapes of the run's parameters.

    Returns:
      None if it begins with its seed.

    Raises:
      UserError: if `resume_from` or `train.init_from` is not there or does not fit.
    """
    source = config.train.init_from
    if resume_from:
        if Path(resume_from).expanduser().is_file():
            raise UserError(
                f"--resume_from={resume_from} is a file, which has no optimiser's "
                f"state; name a workdir, or give --init_from={resume_from}"
            )
        path, step = find_checkpoint("--resume_from", resume_from)
        workdir.check_origin(path, config)
        checkpoint.check_fit(path, step, params)
        return Origin(path, step, {}, True)
    if not source:
        return None
    if Path(source).suffix in FILES and not packed.holds_model(source):
        arrays = read_file(source, config)
        origin = Origin(Path(source), -1, arrays, False)
    else:
        origin = Origin(*find_checkpoint("train.init_from", source), {}, False)
    check_parameters(origin, config, checkpoint.shapes_of(params))
    return origin


def begin(
    config: Config,
    own: tuple[Path, int] | None,
    origin: Origin | None,
    init: Callable[[jax.Array], TrainState],
    target: TrainState,
) -> Restored:
    """The state that a run begins with, each array born where it is to live.

    Args:
      config: resolved.
      own: the workdir and its newest good checkpoint, if there is one.
      origin: of `find_origin`, where there is none.
      init: makes the state from the key of the seed.
      target: shapes and shardings of the state.

    Raises:
      UserError: if a checkpoint does not fit.
    """
    whole = own or (origin[:2] if origin and origin.whole else None)
    if whole:
        return checkpoint.restore(*whole, target)
    shardings = jax.tree.map(lambda s: s.sharding, target)
    key = jax.random.key(config.train.seed)
    state = jax.jit(init, out_shardings=shardings)(key)
    if origin:
        state = state._replace(params=warm_start(origin, config, state.params))
    return Restored(state, 0)


def warm_start(origin: Origin, config: Config, params: PyTree) -> PyTree:
    """Parameters of another run or of a file in place of fresh ones.

    Tables of another vocabulary keep the entries that both have, by number; the others,
    or all with `train.init_vocab=fresh`, stay fresh. A step size or noise that this run
    does not learn is its config's.

    Args:
      origin: of `find_origin`.
      config: resolved.
      params: fresh ones, on their devices.
    """
    fresh = checkpoint.named(params)
    targets = {}
    for name, shape in origin_shapes(origin).items():
        if name in VOCABULARY and config.train.init_vocab == "fresh":
            continue
        if name in _fixed(config):
            continue
        like = fresh[name]
        # A table of another size may not be divisible like ours: every device has it.
        fits = shape == like.shape
        sharding = like.sharding if fits else _everywhere(like.sharding)
        targets[name] = jax.ShapeDtypeStruct(shape, like.dtype, sharding=sharding)
    if origin.arrays:
        given = {
            name: checkpoint.put(origin.arrays[name], s) for name, s in targets.items()
        }
    else:
        tree = checkpoint.read_params(
            origin.path, origin.step, checkpoint.nested(targets)
        )
        given = checkpoint.named(tree)
    for name, array in given.items():
        fresh[name] = _merged(fresh[name], array, name)
    return jax.tree.unflatten(jax.tree.structure(params), list(fresh.values()))


def check_parameters(origin: Origin, config: Config, wanted: Shapes) -> None:
    """Checks that parameters can take the place of fresh ones.

    Args:
      origin: where they are from.
      config: resolved.
      wanted: name -> shape of the fresh ones.

    Raises:
      UserError: naming the first one that is missing, unknown or of another shape.
    """
    found = origin_shapes(origin)
    for name in sorted(found.keys() | wanted.keys()):
        vocabulary = name in VOCABULARY
        if vocabulary and config.train.init_vocab == "fresh":
            continue
        if name not in found:
            problem = f"lacks the parameter {name}"
        elif name not in wanted:
            problem = f"has a parameter {name}, which the config's model has not"
        elif _beside(found[name], name) != _beside(wanted[name], name):
            problem = f"has {name} of shape {found[name]}, not {wanted[name]}"
        else:
            continue
        raise UserError(
            f"train.init_from: {config.train.init_from} {problem}; only the vocabulary "
            "and the context may differ"
        )


def origin_shapes(origin: Origin) -> Shapes:
    """Name -> shape of the parameters there."""
    if origin.arrays:
        return {name: array.shape for name, array in origin.arrays.items()}
    return checkpoint.saved_shapes(origin.path, origin.step)


def find_checkpoint(flag: str, source: str) -> tuple[Path, int]:
    """Workdir and step of `WORKDIR[@STEP]`; the checkpoint is good.

    Args:
      flag: for messages.
      source: the newest good checkpoint without `@STEP`.

    Raises:
      UserError: if there is none.
    """
    text, at, number = source.rpartition("@")
    step = None
    if at and number.isdecimal() and not Path(source).expanduser().exists():
        source, step = text, int(number)
    try:
        path, _ = workdir.open_workdir(source)
        return path, checkpoint.pick_step(path, step)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def read_file(file: str, config: Config) -> dict[str, np.ndarray]:
    """Parameters in a file, by our names.

    Args:
      file: written by `ebt checkpoints export`, with our names or the published ones.
      config: of the model.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        arrays, _ = interop.read_checkpoint(file)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"train.init_from: {file} cannot be read: {error}") from error
    if not any(name.endswith(".weight") for name in arrays):
        return arrays
    for name, array in arrays.items():
        if name.removeprefix("model.") == "embeddings.weight":
            model = dataclasses.replace(config.model, vocab_size=len(array))
            config = dataclasses.replace(config, model=model)
    return checkpoint.named(interop.from_reference(arrays, config))


def _fixed(config: Config) -> set[str]:
    """Parameters that a run does not learn."""
    learnt = {
        "step_size": config.refine.step_size_learnable,
        "noise_std": config.refine.noise_learnable,
    }
    return {name for name, is_learnt in learnt.items() if not is_learnt}


def _beside(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """A shape without the vocabulary's axis."""
    axis = VOCABULARY[name] if name in VOCABULARY else len(shape)
    return shape[:axis] + shape[axis + 1 :]


def _everywhere(sharding: Any) -> jax.sharding.Sharding:
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _merged(fresh: jax.Array, given: jax.Array, name: str) -> jax.Array:
    """A parameter, with fresh entries where the given one has none."""
    if fresh.shape == given.shape:
        return given
    axis = VOCABULARY[name]
    common = min(fresh.shape[axis], given.shape[axis])
    place = (*(slice(None),) * axis, slice(0, common))
    merge = lambda fresh, given: fresh.at[place].set(given[place])
    return jax.jit(merge, out_shardings=fresh.sharding)(fresh, given)
