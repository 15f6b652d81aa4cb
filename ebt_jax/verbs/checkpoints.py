"""`ebt checkpoints`."""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import CHECKPOINT, WORKDIR, required

NAMES, DTYPES = ("ours", "published"), ("float32", "float16")


def run(values: flags.FlagValues) -> int:
    """Lists, verifies, exports or packs the checkpoints of --workdir."""
    workdir = required(values, "workdir", "the folder of a run")
    _check_flags(values)

    from ebt_jax.training import checkpoint, packed
    from ebt_jax.training.workdir import checkpoint_steps, open_workdir

    path, config = open_workdir(workdir)
    if values.word in ("export", "pack"):
        kinds = ".npz" if values.word == "pack" else ".safetensors or .npz"
        out = required(values, "out", f"a file that ends with {kinds}")

        from ebt_jax.training.export import export, pack

        step = values.checkpoint
        if values.word == "export":
            print(export(path, config, step, out, values.names or "ours"))
        else:
            dtype, note = values.dtype or "float32", values.note or ""
            print(pack(path, config, step, out, dtype, note))
        return 0
    if path.is_file():
        step = checkpoint.pick_step(path, values.checkpoint)
        described = packed.describe(packed.read(path), path.stat().st_size)
        print(described if values.word == "list" else f"checkpoint {step}: verified")
        return 0
    steps = checkpoint_steps(path)
    if values.checkpoint is not None:
        checkpoint.check_step(path, values.checkpoint)
        steps = [values.checkpoint]
    if not steps:
        raise UserError(f"{path} holds no checkpoint yet; train until one is saved")
    return _list(path, steps) if values.word == "list" else _verify(path, steps)


def _check_flags(values: flags.FlagValues) -> None:
    """Refuses flags of another word, and values that there are not."""
    owners = {
        "out": ("export", "pack"),
        "names": ("export",),
        "dtype": ("pack",),
        "note": ("pack",),
    }
    for name, words in owners.items():
        if values[name].value and values.word not in words:
            raise UserError(
                f"--{name} belongs to {' and '.join(words)}, not to {values.word}; "
                "leave it out"
            )
    for name, known in (("names", NAMES), ("dtype", DTYPES)):
        value = values[name].value
        if value not in (None, *known):
            raise UserError(
                f"--{name} is {value!r}, but has to be {' or '.join(known)}"
            )


def _list(path: Path, steps: list[int]) -> int:
    """A line for each checkpoint, whatever its condition."""
    from ebt_jax.training import manifest
    from ebt_jax.training.checkpoint import directory_of
    from ebt_jax.training.saving import score_of

    print(f"{'step':>10}  {'saved':<16}  {'MB':>9}  {'held-out':>9}  files")
    for step in steps:
        directory = directory_of(path, step)
        saved, size, score = "", "", ""
        try:
            found = manifest.read(directory)
        except (FileNotFoundError, manifest.DamagedManifest):
            pass  # verify says so
        else:
            saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.saved))
            size = f"{found.bytes / 1e6:.1f}"
            evaluated = score_of(found.metrics)
            score = "" if evaluated is None else f"{evaluated:.4f}"
        condition = "; ".join(manifest.verify(directory)) or "verified"
        print(f"{step:>10}  {saved:<16}  {size:>9}  {score:>9}  {condition}")
    return 0


def _verify(path: Path, steps: list[int]) -> int:
    """A line for each damage; 1 if there is any."""
    from ebt_jax.training import manifest
    from ebt_jax.training.checkpoint import directory_of

    damaged = 0
    for step in steps:
        problems = manifest.verify(directory_of(path, step))
        damaged += bool(problems)
        for problem in problems or ["verified"]:
            print(f"checkpoint {step}: {problem}")
    return 1 if damaged else 0


VERB = Verb(
    summary="list, check, export or pack those of a run",
    details="list    step, time, size, held-out nll, and what is wrong if anything is\n"
    "verify  every file against the sums made when it was saved; exit code 1 and a\n"
    "        line for each damage\n"
    "export  parameters into one file, with our names (blocks/qkv/kernel) or those of\n"
    "        the published PyTorch code\n"
    "pack    a model into one .npz, with its config and its held-out numbers, which\n"
    "        generate, evaluate and --init_from take in place of a workdir; --dtype=\n"
    "        float16 halves it",
    example="ebt checkpoints export --workdir=runs/a --out=model.safetensors",
    call=run,
    flags=(
        WORKDIR,
        CHECKPOINT,
        Flag("out", "file to be made: .npz, or where it is exported .safetensors"),
        Flag("names", "export, of the parameters: ours or published; else ours"),
        Flag("dtype", "pack, of the parameters: float32 or float16; else float32"),
        Flag("note", "pack: a line on data and licence that the file keeps"),
    ),
    words=("list", "verify", "export", "pack"),
)
