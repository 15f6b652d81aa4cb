"""Speculative decoding makes what greedy decoding makes, token by token."""

import jax
import numpy as np
import pytest
from fake_objectives import bigram
from test_decoding import CONTEXT, VOCAB, trained

from ebt_jax.errors import UserError
from ebt_jax.evaluation.generation import generate_ids
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.evaluation.speculation import Draft, speculate_ids, with_draft
from ebt_jax.thinking import Thinking

STOP = 3
PROMPTS = [np.array(p) for p in ([5], [1, 2, 3, 4], [7, 7])]


def both(name, draft, prompts=PROMPTS, new_tokens=14, **options):
    """Greedy and speculative continuations; contexts fill up on the way."""
    objective, params = trained(name)
    options = {"context": CONTEXT, "new_tokens": new_tokens, "seed": 3, **options}
    plain = generate_ids(objective, params, prompts, sampling=Sampling(0.0), **options)
    made = speculate_ids(objective, params, draft, prompts, **options)
    return plain, made


def same(plain, made):
    for ours, theirs in zip(made.continued, plain, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.num_steps, theirs.num_steps)


def test_any_draft_makes_the_tokens_of_greedy_decoding():
    """One that knows nothing, too; however one thinks, stops and looks on."""
    seen = []
    plain, made = both(
        "time_embed",
        Draft(*trained("transformer_pp"), tokens=2),
        thinking=Thinking(5, tolerance=0.02),
        stop_ids=[STOP],
        on_tokens=lambda row, new: seen.append((row, new.tolist())),
    )
    same(plain, made)
    lengths = [len(continued.tokens) for continued in plain]
    assert len(set(lengths)) == 3 and max(lengths) == 14
    assert made.accepted.sum() < made.proposed.sum()
    for row, continued in enumerate(plain):
        pieces = [new for place, new in seen if place == row]
        # First those of greedy decoding, then those of this.
        assert sum(pieces, []) == 2 * continued.tokens.tolist()


def test_a_draft_that_is_right_spares_rounds():
    """The model itself, which proposes what it will choose."""
    objective, params = trained("anchored")
    draft = Draft(objective, params, tokens=3)
    plain, made = both("anchored", draft, prompts=[np.array([5])], new_tokens=8)
    same(plain, made)
    np.testing.assert_array_equal(made.accepted, made.proposed)
    assert made.rounds.tolist() == [2]
    # Four predictions in each, all of which are counted.
    assert made.continued[0].effort.gradients.sum() == 2 * 4 * 2


def test_no_prompts_are_none():
    plain, made = both("time_embed", Draft(*trained("transformer_pp")), prompts=[])
    assert plain == [] and made.continued == []


def test_mistakes():
    objective, params = trained("time_embed")
    baseline = trained("transformer_pp")
    options = {"context": CONTEXT, "new_tokens": 2}
    for model, draft, message in (
        ((objective, params), Draft(*baseline, tokens=0), "proposes 0 tokens"),
        (baseline, Draft(*baseline), "checks several tokens together"),
        (
            (objective, params),
            Draft(bigram(VOCAB), bigram(VOCAB).init(jax.random.key(0))),
            "cannot be taken back",
        ),
    ):
        with pytest.raises(UserError, match=message):
            speculate_ids(*model, draft, PROMPTS, **options)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        speculate_ids(objective, params, Draft(*baseline), [[]], **options)
    sampled = with_draft(Draft(*baseline))
    with pytest.raises(UserError, match="temperature is 0.8 and samples is 1"):
        sampled(objective, params, PROMPTS, sampling=Sampling(0.8), **options)
    with pytest.raises(UserError, match="temperature is 0 and samples is 2"):
        sampled(
            objective, params, PROMPTS, sampling=Sampling(0.0), samples=2, **options
        )
