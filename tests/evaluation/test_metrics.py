"""Evaluation against hand sums in float64, and its independence of the batch size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_objectives import batches, bigram, thinker

from ebt_jax.errors import UserError
from ebt_jax.evaluation.metrics import evaluate
from ebt_jax.thinking import Thinking


def by_hand(objective, params, seed, num_steps=0):
    """Weighted means over all predictions at once, from the arrays themselves."""
    (batch,) = batches(12)
    evaluate = jax.jit(objective.evaluate, static_argnums=3)
    arrays = evaluate(params, batch, jax.random.key(seed), num_steps)
    arrays = {name: np.asarray(value, np.float64) for name, value in arrays.items()}
    return batch, arrays


def test_feed_forward_has_the_nll_and_nothing_of_a_refinement():
    objective = bigram()
    params = objective.init(jax.random.key(0))
    batch, arrays = by_hand(objective, params, 0)
    total = (arrays["nll"][0] * batch["weights"]).sum()
    tokens = batch["weights"].sum()
    length = (batch["bytes"] * batch["weights"]).sum()
    result = evaluate(objective, params, batches(5), seed=0)
    assert result == pytest.approx(
        {
            "nll": total / tokens,
            "perplexity": math.exp(total / tokens),
            "bits_per_byte": total / math.log(2) / length,
            "tokens": tokens,
            "sequences": 12,
        },
        rel=1e-6,
    )


def test_refinement_reports_every_step_and_the_energies():
    objective = thinker()
    params = objective.init(jax.random.key(0))
    batch, arrays = by_hand(objective, params, 7)
    weights = batch["weights"]
    mean = lambda values: (values * weights).sum((-2, -1)) / weights.sum()
    result = evaluate(objective, params, batches(4), seed=7)
    for i, (nll, norm) in enumerate(
        zip(mean(arrays["nll"]), mean(arrays["gradient_norm"]), strict=True), 1
    ):
        assert result[f"nll/step_{i}"] == pytest.approx(nll, rel=1e-6)
        assert result[f"gradient_norm/step_{i}"] == pytest.approx(norm, rel=1e-6)
    assert "nll/step_4" not in result
    assert result["nll"] == result["nll/step_3"]
    energies = mean(arrays["energy"])
    assert result["energy_before"] == pytest.approx(energies[0], rel=1e-6)
    assert result["energy_after"] == pytest.approx(energies[-1], rel=1e-6)
    assert result["energy_gap"] == pytest.approx(energies[0] - energies[-1], rel=1e-6)
    assert result["energy_rose"] == 0.0
    longer = evaluate(objective, params, batches(4), seed=7, thinking=Thinking(5))
    assert longer["nll/step_5"] and longer["refinement_steps"] == 5
    for name in ("refinement_steps", "energy_gradients"):
        assert result[name] == 3
    assert result["energy_evaluations"] == 0


@pytest.mark.parametrize("objective", [bigram(), thinker()], ids=["bigram", "thinker"])
def test_no_result_depends_on_the_batch_size(objective):
    params = objective.init(jax.random.key(1))
    expected = evaluate(objective, params, batches(12), seed=3)
    result = evaluate(objective, params, batches(5), seed=3)
    assert result == pytest.approx(expected, rel=1e-6)


def test_energy_rose_counts_scored_predictions_only():
    def arrays(params, batch, key, num_steps):
        rose = batch["index"][:, None] < 3  # the first three sequences
        after = jnp.broadcast_to(jnp.where(rose, 1.0, -0.5), batch["weights"].shape)
        energy = jnp.stack([jnp.zeros_like(after), after])
        return {
            "nll": jnp.ones((1, *batch["weights"].shape)),
            "energy": energy,
            "gradient_norm": energy[:1],
        }

    objective = bigram()._replace(evaluate=arrays)
    (batch,) = batches(12)
    share = batch["weights"][:3].sum() / batch["weights"].sum()
    assert evaluate(objective, {}, batches(5), seed=0)["energy_rose"] == share


def test_padding_may_hold_anything_but_a_scored_nan_is_reported():
    def nll(params, batch, key, num_steps):
        bad = jnp.where(
            params["spare"], batch["weights"] == 0, batch["index"][:, None] == 0
        )
        return {"nll": jnp.where(bad, jnp.nan, 1.0)[None]}

    objective = bigram()._replace(evaluate=nll)
    padding = evaluate(objective, {"spare": True}, batches(4), seed=0)
    assert padding["nll"] == 1.0
    scored = evaluate(objective, {"spare": False}, batches(4), seed=0)
    assert math.isnan(scored["nll"]) and math.isnan(scored["perplexity"])


def test_a_huge_nll_is_an_infinite_perplexity():
    constant = lambda params, batch, key, n: {
        "nll": jnp.full((1, *batch["weights"].shape), 1e4)
    }
    objective = bigram()._replace(evaluate=constant)
    assert evaluate(objective, {}, batches(4), seed=0)["perplexity"] == math.inf


def test_compiles_once_for_all_batches_and_calls():
    traces = []

    def counted(params, batch, key, num_steps):
        traces.append(num_steps)
        return {"nll": jnp.zeros((1, *batch["weights"].shape))}

    objective = bigram()._replace(evaluate=counted)
    evaluate(objective, {}, batches(4), seed=0)
    evaluate(objective, {}, batches(4), seed=1)
    assert traces == [0]


def test_thinking_that_is_more_than_steps_is_assessed():
    """Means over scored predictions, of whatever each took."""

    def assess(params, batch, key, thinking):
        shape = batch["weights"].shape
        steps = jnp.broadcast_to(batch["index"][:, None], shape)
        return {
            "nll": jnp.full((1, *shape), 0.5),
            "energy": jnp.stack([jnp.ones(shape), jnp.zeros(shape)]),
            "num_steps": steps,
            "gradients": steps + 1,
            "energies": jnp.full(shape, thinking.best_of),
            "spread": jnp.full(shape, 0.25),
        }

    objective = thinker()._replace(assess=assess)
    (batch,) = batches(12)
    weights = batch["weights"]
    steps = (weights * batch["index"][:, None]).sum() / weights.sum()
    options = {"seed": 0, "thinking": Thinking(9, best_of=2, tolerance=0.0)}
    result = evaluate(objective, {}, batches(5), **options)
    del result["bits_per_byte"]
    assert result == pytest.approx(
        {
            "nll": 0.5,
            "perplexity": math.exp(0.5),
            "energy_before": 1.0,
            "energy_after": 0.0,
            "energy_gap": 1.0,
            "energy_rose": 0.0,
            "refinement_steps": steps,
            "energy_gradients": steps + 1,
            "energy_evaluations": 2.0,
            "energy_spread": 0.25,
            "tokens": weights.sum(),
            "sequences": 12,
        },
        rel=1e-6,
    )
    with pytest.raises(UserError, match="best_of is 0"):
        evaluate(objective, {}, batches(5), seed=0, thinking=Thinking(best_of=0))


def test_nothing_to_score_is_an_error():
    empty = [batch | {"weights": 0 * batch["weights"]} for batch in batches(4)]
    for nothing in ([], empty):
        with pytest.raises(UserError, match="nothing to evaluate"):
            evaluate(bigram(), bigram().init(jax.random.key(0)), nothing, seed=0)


def test_progress_goes_to_stderr(capsys):
    objective = bigram()
    params = objective.init(jax.random.key(0))
    evaluate(objective, params, batches(6), seed=0, progress=True)
    seen = capsys.readouterr()
    assert "evaluated 2 batches" in seen.err and not seen.out
