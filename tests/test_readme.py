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


def written_down() -> list[str]:
    """Commands in docstrings of experiments and in the results, each in one line."""
    found = []
    for file in sorted((ROOT / "experiments").iterdir()):
        if file.suffix not in (".py", ".md"):
            continue
        text = file.read_text().partition("\nfrom __future__")[0]
        # Whatever is indented further belongs to the line above.
        text = re.sub(r"[\\\s]*\n {8}\s*", " ", text)
        for command in re.findall(r"^    (ebt [a-z]+ [^\n]*)$", text, re.MULTILINE):
            if not re.match(r"ebt [a-z]+  ", command):  # a word and what it means
                said = re.sub(r" +\([^()]*\)$", "", command.rstrip(" ."))  # a remark
                found.append(f"{file.name}: {said}")
    return found


@pytest.mark.parametrize("command", written_down())
def test_commands_of_experiments_name_known_flags(command, monkeypatch):
    """Flags alone: values such as WORDS stand for several."""
    monkeypatch.chdir(ROOT)
    _, verb, *words = shlex.split(command.partition(": ")[2], comments=True)
    if cli.VERBS[verb].words and words[0] in cli.VERBS[verb].words:
        words = words[1:]
    assert words[0].startswith("--"), f"{words[0]!r} is no flag"
    config = next((w for w in words if w.startswith("--config=")), None)
    known = {flag.name for flag in cli.VERBS[verb].flags}
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--config."):
            value = "experiments/text.py:tiny" if config is None else config[9:]
            argv = ["train", f"--config={value.partition(':')[0]}:tiny", f"--{name}=0"]
            assert name in parse(cli.VERBS["train"], argv)
        elif word.startswith("--") and name != "config":
            assert name in known, word


def test_rooms_exist():
    for path in re.findall(r"^\| `([\w./]+)` \|", README, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_the_library_example_is_short():
    example = blocks("python")[0].strip().splitlines()
    assert len([line for line in example if line.strip()]) <= 13
