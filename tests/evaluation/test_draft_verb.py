"""Two runs together: `ebt generate --draft`, and `ebt evaluate --ensemble`."""

import json

import pytest

from ebt_jax import cli
from ebt_jax.data.config import DataConfig
from ebt_jax.models.config import ModelConfig
from ebt_jax.training import config as c

CONFIG = """
import pathlib, json
import ml_collections

def get_config(kind):
    text = pathlib.Path(__file__).with_name(kind + ".json").read_text()
    return ml_collections.ConfigDict(json.loads(text))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of an energy model and of a baseline, trained on the same bytes."""
    folder = tmp_path_factory.mktemp("draft")
    (folder / "corpus.txt").write_text("Energy falls until nothing changes. " * 40)
    (folder / "config.py").write_text(CONFIG)
    for kind in ("ebt", "transformer_pp"):
        config = c.Config(
            model=ModelConfig(
                kind=kind, num_layers=1, num_heads=1, dim=8, conditioning="default"
            ),
            data=DataConfig(path=str(folder / "corpus.txt"), context=16),
            train=c.TrainConfig(steps=1, batch_size=8),
            eval=c.EvalConfig(batch_size=8, curve_steps=0, sample_tokens=0),
            mesh=c.MeshConfig(data=1),
            log=c.LogConfig(tensorboard=False, plots=False, compilation_cache=False),
        )
        tree = c.to_config_dict(config).to_dict()
        (folder / f"{kind}.json").write_text(json.dumps(tree))
        flags = [
            f"--config={folder / 'config.py'}:{kind}",
            f"--workdir={folder / kind}",
        ]
        assert cli.run(["train", *flags]) == 0
    return folder


def run(capsys, runs, *flags, code=0):
    argv = ["generate", f"--workdir={runs / 'ebt'}", "--prompt=Energy", *flags]
    assert cli.run(argv) == code
    return capsys.readouterr()


def test_a_draft_changes_no_text(capsys, runs):
    flags = ["--new=20", "--temperature=0", "--json"]
    draft = [f"--draft={runs / 'transformer_pp'}", "--draft_tokens=3"]
    plain, drafted = (
        json.loads(run(capsys, runs, *flags, *more).out) for more in ([], draft)
    )
    assert drafted["tokens"] == plain["tokens"] and len(plain["tokens"]) == 20
    assert drafted["text"] == plain["text"]


def test_mistakes(capsys, runs, tmp_path):
    draft = runs / "transformer_pp"
    seen = run(capsys, runs, f"--draft={draft}", code=2)
    assert "temperature is 0.8 and samples is 1, but a draft only" in seen.err
    seen = run(capsys, runs, "--draft=nowhere", "--temperature=0", code=2)
    assert "nowhere holds no run" in seen.err
    seen = run(capsys, runs, f"--draft={draft}", "--draft_tokens=0", code=2)
    assert "--draft_tokens=0" in seen.err


def test_a_draft_needs_the_same_tokenizer(capsys, runs, monkeypatch):
    from ebt_jax.data.tokenizers import ByteTokenizer
    from ebt_jax.evaluation import speculation
    from ebt_jax.verbs import generate

    other = ByteTokenizer(name="other.json", digest="another")
    monkeypatch.setattr(speculation, "speculate_ids", None)  # is not reached
    load = generate.open_trained
    monkeypatch.setattr(
        generate,
        "open_trained",
        lambda path, *rest: (
            load(path, *rest)._replace(tokenizer=other)
            if path.name == "transformer_pp"
            else load(path, *rest)
        ),
    )
    flags = [f"--draft={runs / 'transformer_pp'}", "--temperature=0"]
    seen = run(capsys, runs, *flags, code=2)
    assert "tokenizer 'other.json' with 256 tokens, but the run 'bytes'" in seen.err


def evaluate(capsys, runs, *flags, code=0):
    argv = ["evaluate", f"--workdir={runs / 'ebt'}", *flags]
    assert cli.run(argv) == code
    return capsys.readouterr()


def test_an_ensemble_is_scored(capsys, runs):
    members = [f"--ensemble={runs / 'transformer_pp'}", "--json"]
    alone = json.loads(evaluate(capsys, runs, "--json").out)
    both = json.loads(evaluate(capsys, runs, *members).out)
    same = json.loads(
        evaluate(capsys, runs, f"--ensemble={runs / 'ebt'}", "--json").out
    )
    assert both["ensemble"] == str(runs / "transformer_pp")
    assert both["nll"] != alone["nll"] and both["tokens"] == alone["tokens"]
    assert same["nll"] == pytest.approx(alone["nll"], rel=1e-5)


def test_mistakes_about_ensembles(capsys, runs, monkeypatch):
    from ebt_jax.data.tokenizers import ByteTokenizer
    from ebt_jax.verbs import evaluate as verb

    member = f"--ensemble={runs / 'transformer_pp'}"
    seen = evaluate(capsys, runs, member, "--uncertainty", code=2)
    assert "--uncertainty is of one model's energies" in seen.err
    seen = evaluate(capsys, runs, "--ensemble=nowhere", code=2)
    assert "nowhere holds no run" in seen.err
    other, load = ByteTokenizer(name="other.json", digest="another"), verb.open_trained
    monkeypatch.setattr(
        verb,
        "open_trained",
        lambda path, *rest: (
            load(path, *rest)._replace(tokenizer=other)
            if path.name == "transformer_pp"
            else load(path, *rest)
        ),
    )
    seen = evaluate(capsys, runs, member, code=2)
    assert "whose tokenizer is 'other.json', but that of the run is 'bytes'" in seen.err
