"""`ebt checkpoints`."""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import CHECKPOINT, WORKDIR, required


def run(values: flags.FlagValues) -> int:
    """Lists, verifies or exports the checkpoints of --workdir."""
    workdir = required(values, "workdir", "the folder of a run")
    if values.word != "export" and (values.out or values.names):
        raise UserError(f"--out and --names belong to export, not to {values.word}")

    if values.names not in (None, "ours", "published"):
        raise UserError(f"--names is {values.names!r}, but has to be ours or published")

    from ebt_jax.training import checkpoint
    from ebt_jax.training.workdir import checkpoint_steps, open_workdir

    path, config = open_workdir(workdir)
    if values.word == "export":
        out = required(values, "out", "a file that ends with .safetensors or .npz")

        from ebt_jax.training.export import export

        print(export(path, config, values.checkpoint, out, values.names or "ours"))
        return 0
    steps = checkpoint_steps(path)
    if values.checkpoint is not None:
        checkpoint.check_step(path, values.checkpoint)
        steps = [values.checkpoint]
    if not steps:
        raise UserError(f"{path} holds no checkpoint yet; train until one is saved")
    return _list(path, steps) if values.word == "list" else _verify(path, steps)


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
    summary="list, verify or export the checkpoints of a run",
    details="list    step, time, size, held-out nll, and what is wrong if anything is\n"
    "verify  every file against the sums made when it was saved; exit code 1 and a\n"
    "        line for each damage\n"
    "export  parameters into one file, with our names (blocks/qkv/kernel) or those of\n"
    "        the published PyTorch code",
    example="ebt checkpoints export --workdir=runs/a --out=model.safetensors",
    call=run,
    flags=(
        WORKDIR,
        CHECKPOINT,
        Flag("out", "file to be made: .safetensors or .npz"),
        Flag("names", "of the parameters: ours or published; else ours"),
    ),
    words=("list", "verify", "export"),
)
