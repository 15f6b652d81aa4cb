"""What a run ran on is written once for each machine."""

import json

import jax
import pytest

from ebt_jax.training.config import MeshConfig
from ebt_jax.training.environment import read_environments, record_environment
from ebt_jax.training.sharding import make_mesh


def test_devices_and_versions_are_written_when_they_change(tmp_path):
    whole = make_mesh(MeshConfig())
    record_environment(tmp_path, whole, 0)
    written = (tmp_path / "environment.json").stat().st_mtime_ns
    record_environment(tmp_path, whole, 5)  # the same machine: nothing to write
    assert (tmp_path / "environment.json").stat().st_mtime_ns == written
    half = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    record_environment(tmp_path, half, 7)
    first, second = read_environments(tmp_path)
    assert (first["step"], first["devices"]) == (0, 8)
    assert (second["step"], second["devices"]) == (7, 4)
    assert first["jax"] == second["jax"] == jax.__version__
    assert first["device"] == "cpu" and first["processes"] == 1


@pytest.mark.parametrize("text", ["{half", '{"step": 1}', "[1]", "[{}]"])
def test_a_damaged_file_is_begun_anew(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    assert read_environments(tmp_path) == []
    record_environment(tmp_path, make_mesh(MeshConfig()), 3)
    assert json.loads((tmp_path / "environment.json").read_text())[0]["step"] == 3
