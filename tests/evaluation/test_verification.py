"""Verification: what is corrupted, what is scored, and what the numbers mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_objectives import Bytes, bigram, thinker

from ebt_jax.errors import UserError
from ebt_jax.evaluation.verification import (
    KINDS,
    corrupt,
    verification_table,
    verify,
    whole_sequences,
    word_starts,
)

TEXTS = ["the old man was by the sea", "no one else was at the sea", "ab" * 13]
STARTS = word_starts([Bytes().decode([i]) for i in range(256)])
SEQUENCES = np.stack([Bytes().encode(text) for text in TEXTS])
TIMES = 2


def text(ids):
    return Bytes().decode(ids)


def halves(ids):
    return text(ids[:13]), text(ids[13:])


@pytest.fixture(scope="module")
def variants():
    return corrupt(SEQUENCES, STARTS, TIMES, seed=0)


def test_what_is_given_is_never_corrupted(variants):
    assert variants.given == 13
    assert variants.ids.shape == (1 + len(KINDS) * TIMES, 3, 26)
    np.testing.assert_array_equal(variants.ids[0], SEQUENCES)
    same = variants.ids[:, :, :13] == SEQUENCES[None, :, :13]
    assert same.all()


def test_each_kind_of_corruption(variants):
    ids = variants.ids
    replaced = ids[1 : 1 + TIMES] != SEQUENCES
    assert (replaced.sum(-1) == 1).all()  # a tenth of 13
    for place, (_, true) in enumerate(map(halves, SEQUENCES)):
        others = {halves(ids)[1] for ids in SEQUENCES} - {true}
        for time in range(TIMES):
            _, shuffled = halves(ids[1 + TIMES + time, place])
            assert sorted(shuffled) == sorted(true)
            assert place == 2 or sorted(shuffled.split()) == sorted(true.split())
            assert halves(ids[1 + 2 * TIMES + time, place])[1] in others


def test_words_are_moved_with_the_space_before_them():
    sequences = np.stack([Bytes().encode("12345 ab cd ef"), Bytes().encode("x" * 14)])
    found = corrupt(sequences, STARTS, 8, seed=1)
    shuffled = {text(ids)[7:] for ids in found.ids[9:17, 0]}
    # The rest of a word stays where it is.
    assert shuffled == {"b cd ef", "b ef cd"}


def test_corruptions_belong_to_a_seed_and_a_place(variants):
    again = corrupt(SEQUENCES, STARTS, TIMES, seed=0)
    np.testing.assert_array_equal(again.ids, variants.ids)
    other = corrupt(SEQUENCES, STARTS, TIMES, seed=1)
    assert (other.ids != variants.ids).any()
    longer = corrupt(np.concatenate([SEQUENCES, SEQUENCES]), STARTS, TIMES, seed=0)
    own = slice(1, 1 + 2 * TIMES)  # what is of another sequence depends on the others
    np.testing.assert_array_equal(longer.ids[own, :3], variants.ids[own])


def solve(objective, batch_size, energy=None):
    return verify(
        objective,
        objective.init(jax.random.key(0)),
        SEQUENCES,
        energy=energy,
        starts=STARTS,
        times=TIMES,
        batch_size=batch_size,
        seed=0,
    )


def below(params, batch):
    """An energy that knows one sequence, and doubts every other token."""
    doubted = batch["targets"] != SEQUENCES[:1, 1:]
    return jnp.where(batch["index"][:, None] == 0, doubted, 0.0)


def test_accuracies_are_those_of_means_over_the_continuation():
    objective = bigram()
    found = solve(objective, 4)
    table = np.asarray(objective.init(jax.random.key(0))["table"])
    log_p = np.asarray(jax.nn.log_softmax(table))
    variants = corrupt(SEQUENCES, STARTS, TIMES, seed=0).ids
    nll = -log_p[variants[..., 12:-1], variants[..., 13:]].mean(-1)
    better = nll[1:] > nll[0]
    for kind, name in enumerate(KINDS):
        share = better[kind * TIMES : (kind + 1) * TIMES].mean()
        # A tie counts half: the shuffled one of a single letter.
        tied = (variants[1 + kind * TIMES :][:TIMES] == SEQUENCES).all(-1).mean() / 2
        assert found[f"nll/{name}"] == pytest.approx(share + tied)
        low, high = found[f"nll/{name}/low"], found[f"nll/{name}/high"]
        assert 0 <= low <= found[f"nll/{name}"] <= high <= 1
    mean = np.mean([found[f"nll/{name}"] for name in KINDS])
    assert found["nll"] == pytest.approx(mean)
    assert found["sequences"] == 3 and found["corruptions"] == TIMES
    assert "energy" not in found


def test_energies_tell_what_they_know_whatever_the_batch_size():
    found = solve(thinker(), 4, below)
    assert {"energy", "excess_energy", "nll"} <= found.keys()
    # One of three sequences is known: it is always right, the others always tie.
    expected = (1 + 1 / 2 + 1 / 2) / 3
    assert found["energy/other"] == pytest.approx(expected)
    assert found["energy/replaced"] == pytest.approx(expected)
    assert found["energy/other/low"] < expected < found["energy/other/high"]
    other = solve(thinker(), 5, below)
    assert other == pytest.approx(found, abs=1e-6)


def test_a_table_for_people():
    found = solve(thinker(), 4, below)
    head, energy, excess, nll, last = verification_table(found).splitlines()
    assert head.split()[-3:] == list(KINDS)
    assert energy.startswith("energy") and f"{found['energy']:.1%} (" in energy
    assert excess.startswith("excess_energy") and nll.startswith("nll")
    assert last.startswith("of 2 corruptions of each kind of 3 sequences")


def batch(weights):
    ids = SEQUENCES[: len(weights)]
    rows = np.array(weights, np.float32)[:, None]
    weights = np.ones((len(ids), 25), np.float32) * rows
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


def test_only_whole_sequences_are_compared():
    found = whole_sequences([batch([1, 0, 1]), batch([1])])
    np.testing.assert_array_equal(found, SEQUENCES[[0, 2, 0]])
    with pytest.raises(UserError, match="without padding, and there are 1; give it"):
        whole_sequences([batch([1, 0])])


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (SEQUENCES[:1], "has 1 sequences of 26 tokens, but needs 2 of at least 4"),
        (SEQUENCES[:, :3], "has 3 sequences of 3 tokens, but needs 2 of at least 4"),
    ],
)
def test_too_little(sequences, message):
    with pytest.raises(UserError, match=message):
        corrupt(sequences, STARTS, 1, seed=0)
