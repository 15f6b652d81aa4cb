"""The commands in `launch/README.md`, as dry runs."""

import pathlib
import re
import shlex
import subprocess

import local
import pytest
import sweep

from ebt_jax import cli
from ebt_jax.command import parse
from ebt_jax.training.config import from_config_dict

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
README = (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize(
    "line",
    [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ],
)
def test_commands_of_the_readme(line, capsys, monkeypatch):
    monkeypatch.chdir(LAUNCH.parent)
    own, flags = local.split(shlex.split(line))
    if flags:
        argv = ["train", *(flag for flag in flags if flag != "train")]
        config = from_config_dict(parse(cli.VERBS["train"], argv).config)
        rows = config.train.batch_size // config.train.accumulation
        assert rows % abs(config.mesh.data * config.mesh.fsdp) == 0
    if own[0] == "sbatch":
        own = own[own.index("launch/slurm.sbatch") :]
    if own[0] == "python":
        program = {"local.py": local, "sweep.py": sweep}[pathlib.Path(own[1]).name]
        behind = ["--", *flags] if flags else []
        assert program.main([*own[2:], "--dry_run", *behind]) == 0
        shown = capsys.readouterr().out
    else:
        done = subprocess.run(
            ["bash", *own, "--dry_run", "--", *flags],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        shown = done.stdout
    assert "--config=" in shown


def test_the_readme_names_every_script():
    names = {path.name for path in LAUNCH.iterdir() if path.is_file()}
    for name in names - {"processes.py", "pool.py", "rounds.py", "README.md"}:
        assert f"`{name}`" in README
