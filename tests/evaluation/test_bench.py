"""Benchmarks: what they report; how long anything takes is nobody's test."""

import json

import pytest

from ebt_jax import cli
from ebt_jax.evaluation.bench import bench
from ebt_jax.models.config import ModelConfig

TINY = ModelConfig(num_layers=1, num_heads=1, dim=8, vocab_size=11)
SIZES = {"batch": 2, "seq": 4, "prompt": 3, "new": 2, "steps": 1}


@pytest.mark.parametrize(("job", "tokens"), [("train", 8), ("decode", 2)])
def test_a_job_reports_seconds_speed_and_memory(job, tokens):
    results = bench(job, TINY, **SIZES)
    assert results["seconds"] > 0
    assert results["tokens_per_second"] == pytest.approx(tokens / results["seconds"])
    assert results["compile_seconds"] > 0
    assert results["peak_mib"] > 0
    assert json.loads(json.dumps(results)) == results


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench"], "after 'bench' comes one of train, decode, not nothing"),
        (["bench", "trian"], "one of train, decode, not 'trian'"),
        (["bench", "train", "--size=huge"], "model.size is 'huge'"),
        (["bench", "train", "--batch=0"], "--batch=0"),
    ],
)
def test_errors(argv, message, capsys):
    assert cli.run(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
