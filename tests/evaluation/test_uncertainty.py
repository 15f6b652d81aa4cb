"""Measures of doubt: the statistics against definitions, the doubts against arrays."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from fake_objectives import batches, bigram, thinker

from ebt_jax.errors import UserError
from ebt_jax.evaluation.uncertainty import (
    Doubts,
    auroc,
    calibration_error,
    doubt_curves,
    find_doubts,
    judge,
    rank_correlation,
    ranks,
    risk_coverage,
    uncertainty_table,
)
from ebt_jax.thinking import Thinking


def drawn(count=60, kinds=9):
    """Doubts with many ties, and which predictions are wrong."""
    generator = np.random.default_rng(0)
    doubt = generator.integers(0, kinds, count).astype(float)
    return doubt, (generator.random(count) < doubt / kinds).astype(float)


def test_auroc_compares_every_wrong_one_with_every_right_one():
    doubt, wrong = drawn()
    pairs = itertools.product(doubt[wrong > 0], doubt[wrong == 0])
    chance = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    assert auroc(doubt, wrong) == pytest.approx(chance)
    assert auroc(np.array([1, 2, np.inf]), np.array([0, 0, 1])) == 1
    assert auroc(-doubt, wrong) == pytest.approx(1 - chance)
    assert auroc(np.exp(doubt), wrong) == auroc(doubt, wrong)
    assert math.isnan(auroc(doubt, np.ones_like(doubt)))


def test_ranks_and_their_correlation():
    doubt, _ = drawn()
    other = doubt + np.random.default_rng(1).integers(0, 9, len(doubt))
    np.testing.assert_array_equal(ranks(doubt), scipy.stats.rankdata(doubt))
    expected = scipy.stats.spearmanr(doubt, other)[0]
    assert rank_correlation(doubt, other) == pytest.approx(expected)
    assert math.isnan(rank_correlation(doubt, np.ones_like(doubt)))


def test_risk_is_the_share_of_wrong_ones_among_the_surest():
    doubt = np.array([3.0, 1.0, 2.0, 4.0])
    wrong = np.array([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(risk_coverage(doubt, wrong), [0, 1 / 2, 2 / 3, 2 / 4])
    tied = np.array([1.0, 1.0, 0.0, 1.0])  # in what order they come is not known
    np.testing.assert_allclose(
        risk_coverage(tied, wrong), [1, (1 + 1 / 3) / 2, (1 + 2 / 3) / 3, 2 / 4]
    )


def test_calibration_error():
    confidence = np.array([0.91, 0.92, 0.93, 0.94, 0.1])
    right = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    # 15 bins: 0.91 to 0.93 and 0.94 fall apart at 14/15.
    expected = (abs(0.91 + 0.92 + 0.93 - 3) + 0.94 + 0.1) / 5
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(np.ones(2), np.ones(2)) == 0


def test_doubts_are_of_the_final_candidate_and_not_of_the_batch_size():
    objective = thinker()
    params = objective.init(jax.random.key(0))
    thinking = Thinking(5)
    found = find_doubts(objective, params, batches(12), seed=3, thinking=thinking)
    (batch,) = batches(12)
    scored = batch["weights"] > 0
    key = jax.random.key(3)
    arrays = jax.jit(objective.evaluate, static_argnums=3)(params, batch, key, 5)
    np.testing.assert_allclose(found.nll, arrays["nll"][-1][scored], rtol=1e-5)
    energy = arrays["energy"][-1][scored]
    np.testing.assert_allclose(found.measures["energy"], energy, rtol=1e-5)
    rise = (arrays["energy"][-1] - arrays["energy"][0])[scored]
    np.testing.assert_allclose(found.measures["energy_drop"], rise, rtol=1e-5)
    other = find_doubts(objective, params, batches(5), seed=3, thinking=thinking)
    np.testing.assert_allclose(other.nll, found.nll, rtol=1e-5)
    np.testing.assert_array_equal(other.wrong, found.wrong)
    for name in ("energy", "energy_drop", "entropy", "max_probability"):
        np.testing.assert_allclose(
            other.measures[name], found.measures[name], rtol=1e-4, atol=1e-6
        )


def test_doubts_of_a_distribution():
    objective = bigram()
    params = objective.init(jax.random.key(0))
    found = find_doubts(objective, params, batches(4), seed=0)
    (batch,) = batches(12)
    scored = batch["weights"] > 0
    logits = np.asarray(params["table"])[batch["tokens"]][scored]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wrong = logits.argmax(-1) != batch["targets"][scored]
    assert list(found.measures) == ["entropy", "max_probability"]
    np.testing.assert_array_equal(found.wrong, wrong)
    np.testing.assert_allclose(
        found.measures["entropy"], -(p * np.log(p)).sum(-1), rtol=1e-5
    )
    np.testing.assert_allclose(
        found.measures["max_probability"], 1 - p.max(-1), rtol=1e-5
    )


def test_what_is_not_a_number_is_doubted_most():
    objective = thinker()

    def evaluate(params, batch, key, num_steps):
        arrays = objective.evaluate(params, batch, key, num_steps)
        lost = batch["index"][None, :, None] == 0
        return arrays | {"energy": jnp.where(lost, jnp.nan, arrays["energy"])}

    params = objective.init(jax.random.key(0))
    broken = objective._replace(evaluate=evaluate)
    found = find_doubts(broken, params, batches(12), seed=0)
    assert np.isinf(found.measures["energy"]).any()
    assert not np.isnan(judge(found)["rank_correlation/energy"])


def test_a_distribution_that_is_not_one_has_no_confidence():
    doubt = np.array([0.1, np.inf])
    wrong = np.array([0.0, 1.0])
    found = judge(Doubts(wrong, wrong, {"max_probability": doubt}))
    assert found["calibration_error"] == pytest.approx(0.05)
    assert found["auroc/max_probability"] == 1


def test_nothing_to_predict():
    empty = [batch | {"weights": 0 * batch["weights"]} for batch in batches(4)]
    objective = bigram()
    for nothing in ([], empty):
        with pytest.raises(UserError, match="nothing to predict"):
            find_doubts(objective, objective.init(jax.random.key(0)), nothing, seed=0)


def test_judgement_and_its_table():
    doubt, wrong = drawn()
    nll = wrong + doubt
    found = judge(Doubts(nll, wrong, {"energy": doubt, "max_probability": doubt / 9}))
    assert found["wrong"] == found["risk/energy/1.0"] == wrong.mean()
    assert found["auroc/energy"] == found["auroc/max_probability"] > 0.5
    assert found["rank_correlation/energy"] > 0.9
    curve = risk_coverage(doubt, wrong)
    assert found["risk/energy"] == curve.mean()
    assert found["risk/energy/0.1"] == curve[5]
    head, energy, other, last = uncertainty_table(found).splitlines()
    assert head.split()[:2] == ["doubt", "AUROC"] and "risk at 10%" in head
    assert energy.split()[:2] == ["energy", f"{found['auroc/energy']:.4f}"]
    assert other.startswith("max_probability")
    assert f"{wrong.mean():.1%} of the likeliest tokens are wrong" in last


def test_curves_of_doubt():
    doubt, wrong = drawn()
    nll = wrong + doubt
    (curve,) = doubt_curves(Doubts(nll, wrong, {"energy": doubt})).values()
    every = risk_coverage(doubt, wrong)
    assert len(curve["risk"]) == len(curve["coverage"]) == 20
    assert curve["coverage"][-1] == 1 and curve["risk"][-1] == every[-1]
    assert curve["coverage"][4] == 0.25 and curve["risk"][4] == every[14]
    assert len(curve["nll"]) == 10 and sorted(curve["doubt"]) == curve["doubt"]
    order = np.argsort(doubt, kind="stable")
    assert curve["nll"][0] == pytest.approx(nll[order[:6]].mean())
    assert curve["wrong"][9] == pytest.approx(wrong[order[-6:]].mean())
    few = doubt_curves(Doubts(nll[:3], wrong[:3], {"energy": doubt[:3]}))
    assert len(few["energy"]["nll"]) == 3
