"""Items from TFDS data sets, laid out as the catalogue's SQuAD, ARC and LAMBADA are."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import file_utils

from ebt_jax.evaluation.tasks.catalogue import TASKS
from ebt_jax.evaluation.tasks.items import Item, read_items

TEXT, LETTER = tfds.features.Text(), tfds.features.ClassLabel(names=["A", "B", "C"])


class Tiny(tfds.core.GeneratorBasedBuilder):
    """One example, given as `EXAMPLE` with `FEATURES`."""

    VERSION = tfds.core.Version("1.0.0")
    SKIP_REGISTERING = True
    FEATURES, EXAMPLE = {}, {}

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"test": self._generate_examples()}

    def _generate_examples(self):
        yield 0, self.EXAMPLE


class EbtTinySquad(Tiny):
    """As squad."""

    FEATURES = {
        "id": TEXT,
        "context": TEXT,
        "question": TEXT,
        "answers": tfds.features.Sequence({"text": TEXT, "answer_start": np.int32}),
    }
    EXAMPLE = {
        "id": "q1",
        "context": "It was in Mäy.",
        "question": "When?",
        "answers": {"text": ["in Mäy", "Mäy"], "answer_start": [7, 10]},
    }


class EbtTinyArc(Tiny):
    """As ai2_arc."""

    FEATURES = {
        "question": TEXT,
        "choices": tfds.features.Sequence({"text": TEXT, "label": LETTER}),
        "answerKey": LETTER,
    }
    EXAMPLE = {
        "question": "Which?",
        "choices": {"text": ["one", "two"], "label": ["A", "B"]},
        "answerKey": "B",
    }


class EbtTinyLambada(Tiny):
    """As lambada."""

    FEATURES = {"passage": TEXT}
    EXAMPLE = {"passage": "say no more"}


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    """Prepares the data sets where TFDS looks for them."""
    directory = tmp_path_factory.mktemp("tfds")
    for builder in (EbtTinySquad, EbtTinyArc, EbtTinyLambada):
        made = builder(data_dir=directory, file_format="array_record")
        made.download_and_prepare()
    tfds.core.add_data_dir(directory)
    yield
    file_utils.clear_registered_data_dirs()


@pytest.mark.parametrize(
    ("task", "item"),
    [
        (
            "squad",
            Item(
                "Question: It was in Mäy.\nWhen?\nAnswer:",
                (" in Mäy", " Mäy"),
                id="q1",
            ),
        ),
        (
            "arc",
            Item(
                "Question: Which?\nA: one\nB: two\nAnswer:",
                (" B",),
                (" A", " B"),
                "tfds:ebt_tiny_arc:test, example 0",
            ),
        ),
        (
            "lambada",
            Item("say no", (" more",), id="tfds:ebt_tiny_lambada:test, example 0"),
        ),
    ],
)
def test_a_data_set_is_as_good_as_a_file(task, item):
    source = f"tfds:ebt_tiny_{task}:test"
    found = read_items([source], TASKS[task].parse, warn=pytest.fail)
    assert found.items == [item]
    assert TASKS[task].tfds is not None
