"""TFDS names, read without TensorFlow."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import file_utils

from ebt_jax.data import sources
from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError

TEXTS = {"train": ["first text", "zweiter Täxt"], "test": ["third"]}


class EbtTinyTexts(tfds.core.GeneratorBasedBuilder):
    """A prepared data set of a few texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "number": np.int32}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for number, text in enumerate(TEXTS[split]):
            yield number, {"text": text, "number": number}


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """Prepares the data set where TFDS looks for it."""
    directory = tmp_path_factory.mktemp("tfds")
    EbtTinyTexts(data_dir=directory, file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(directory)
    yield
    file_utils.clear_registered_data_dirs()


def read(path, **changes):
    """All documents of a path, sorted, as text."""
    config = DataConfig(path=path, **changes)
    return sorted(text.decode() for text in sources.documents(config))


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("tfds:ebt_tiny_texts", TEXTS["train"]),
        ("tfds:ebt_tiny_texts:test", TEXTS["test"]),
        ("tfds:ebt_tiny_texts:1.0.0", TEXTS["train"]),
        ("tfds:ebt_tiny_texts:1.0.0:test", TEXTS["test"]),
        ("tfds:ebt_tiny_texts:train+test", TEXTS["train"] + TEXTS["test"]),
    ],
)
def test_names_splits_and_versions(path, texts):
    assert read(path) == sorted(texts)
    assert len(read("tfds:ebt_tiny_texts:train[:50%]")) == 1


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        ("tfds:no_such_data_set", "text", "cannot read 'no_such_data_set'"),
        ("tfds:ebt_tiny_texts:nope", "text", "split 'nope'"),
        ("tfds:ebt_tiny_texts", "body", r"no feature 'body'.*\['number', 'text'\]"),
        ("tfds:ebt_tiny_texts", "number", "example 0: field 'number' is not text"),
        ("tfds:", "text", "not of the form tfds:NAME"),
    ],
)
def test_mistakes(path, key, message):
    with pytest.raises(UserError, match=message) as caught:
        read(path, text_key=key)
    assert "\n" not in str(caught.value)
