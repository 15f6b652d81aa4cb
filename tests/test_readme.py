"""The README's code runs, and its commands are the ones that exist."""

import pathlib
import re
import shlex

import pytest

from ebt_jax import cli
from ebt_jax.command import parse

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_blocks_run_one_after_the_other():
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    gradients = namespace["gradients"]
    assert gradients[0].shape == (3, 2)
    assert gradients[1] != 0
    assert namespace["refined"].candidate.shape == (4, 2)


@pytest.mark.parametrize(
    "command",
    [
        line[line.index("ebt ") :]
        for block in blocks("sh")
        for line in block.splitlines()
        if "ebt " in line
    ],
)
def test_commands_name_known_verbs_flags_and_configs(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[1:]
    assert words[0] in cli.VERBS
    parse(cli.VERBS[words[0]], words)  # raises for what it does not know


def test_rooms_exist():
    for path in re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_the_library_example_is_short():
    example = blocks("python")[0].strip().splitlines()
    assert len([line for line in example if line.strip()]) <= 13
