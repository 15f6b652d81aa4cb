"""`ebt prepare` of pictures."""

import pytest
from vision_files import many, write

from ebt_jax import cli
from ebt_jax.data import vision_pipeline
from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig

CONFIG = """
from ebt_jax.data.config import DataConfig
from ebt_jax.models.config import ModelConfig
from ebt_jax.training import config as c

def get_config(arg=""):
    return c.to_config_dict(c.Config(
        model=ModelConfig(space="image"), data=DataConfig(path="PICTURES")
    ))
"""


@pytest.fixture
def flags(tmp_path):
    """Of a command on ten pictures."""
    pictures = write(tmp_path / "pictures", many(10))
    config = tmp_path / "config.py"
    config.write_text(CONFIG.replace("PICTURES", pictures))
    return [f"--config={config}", f"--output={tmp_path / 'latents'}"]


def test_pictures_are_encoded_by_a_command(tmp_path, flags, capsys):
    assert cli.run(["prepare", *flags, "--config.vision.channels=1"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'latents'} is complete\n"
    data = DataConfig(path=str(tmp_path / "latents"))
    opened = vision_pipeline.open_data(data, VisionConfig(channels=1), "image", "all")
    assert len(opened.examples) == 10 and opened.image_shape == (8, 8, 1)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--tokenizer=bytes", "--tokenizer and --text_key are of text"),
        ("--process_index=1", "process_index is 1 of 1"),
        ("--config.model.space=text", "PICTURES is a directory without token shards"),
        ("--path=nothing", "no file or folder 'nothing'"),
    ],
)
def test_what_does_not_go_together(tmp_path, flags, capsys, flag, expected):
    assert cli.run(["prepare", *flags, flag]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    expected = expected.replace("PICTURES", str(tmp_path / "pictures"))
    assert error.startswith("error: ") and expected in error
    assert not (tmp_path / "latents").exists()


def test_text_is_prepared_by_one_process(tmp_path, capsys):
    flags = [f"--path={tmp_path}", f"--output={tmp_path / 'x'}", "--process_count=2"]
    assert cli.run(["prepare", *flags]) == 2
    assert "leave them out" in capsys.readouterr().err
