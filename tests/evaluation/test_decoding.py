"""Cached decoding: the logits and the texts of decoding without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import recomputing
from tiny import QUICK, VOCAB, tiny

from ebt_jax import models
from ebt_jax.evaluation.decoding import NONE, PIECE, encode, extend
from ebt_jax.evaluation.generation import generate_ids
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.objectives import refined
from ebt_jax.thinking import AS_TRAINED, Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective

CONTEXT = 9
MODELS = {
    "default": {"conditioning": "default"},
    "time_embed": {},
    "adaln": {"conditioning": "adaln"},
    "adaln_zero": {"conditioning": "adaln_zero"},
    "anchored": {"conditioning": "default", "candidate_input": "anchored"},
    "trunk": {
        "conditioning": "default",
        "candidate_input": "anchored",
        "candidate_layers": 1,
    },
    "final": {"conditioning": "default", "candidate_input": "final"},
    "scales": {
        "conditioning": "default",
        "candidate_input": "anchored",
        "landscape_scales": True,
    },
    "transformer_pp": {"kind": "transformer_pp"},
}


# Steps are small: large ones magnify what rounding does to their first gradient.
REFINE = RefineSetup(num_landscapes=2, noise_std=0.3, step_size=0.1)
CONFIGS = {
    name: Config(model=tiny(dim=16, **changed), refine=REFINE)
    for name, changed in MODELS.items()
}


@functools.cache
def trained(name):
    """An objective, and parameters all of which matter."""
    objective = build_objective(CONFIGS[name])
    init = jax.jit(objective.init, compiler_options=QUICK)
    params = init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    change = lambda x, key: x + 0.1 * jax.random.normal(key, x.shape)
    return objective, tree.unflatten(map(change, leaves, keys))


def close(logits, expected):
    """Within 1e-5 of the largest."""
    scale = jnp.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_whole_sequence(name):
    objective, params = trained(name)
    prepared = objective.decoder.prepare(params)
    thinking = Thinking(3, best_of=2 if name == "time_embed" else 1)
    rows, key = jnp.arange(3), jax.random.key(5)
    tokens = jax.random.randint(jax.random.key(1), (3, CONTEXT), 0, VOCAB)
    batch = {"tokens": tokens, "weights": jnp.ones((3, CONTEXT)), "index": rows + 4}
    jit = functools.partial(jax.jit, compiler_options=QUICK)
    whole = jit(objective.predict, static_argnums=3)(params, batch, key, thinking)
    lengths = jnp.array([3, 1, 5])
    decoder = objective.decoder
    predict = jit(decoder.predict, static_argnums=4)
    append = jit(decoder.append)
    cache = jit(decoder.prefill)(prepared, tokens, lengths)
    for made in range(5):
        thought = predict(prepared, cache, rows + 4, key, thinking)
        close(thought.candidate, whole[rows, lengths + made - 1])
        steps = 0 if name == "transformer_pp" else 3
        assert thought.num_steps.tolist() == [steps] * 3
        if made < 4:
            cache = append(prepared, cache, tokens[rows, lengths + made])


@pytest.mark.parametrize("name", ["time_embed", "transformer_pp"])
def test_the_loop_makes_what_uncached_predictions_make(name):
    """Ragged prompts and samples."""
    objective, params = trained(name)
    uncached = objective._replace(decoder=recomputing(objective.predict))
    made, expected = (
        generate_ids(
            which,
            params,
            [np.array(p) for p in ([5], [1, 2, 3, 4])],
            context=CONTEXT,
            new_tokens=6,
            sampling=Sampling(1.0),
            samples=2,
            seed=3,
        )
        for which in (objective, uncached)
    )
    for ours, theirs in zip(made, expected, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert len({tuple(continued.tokens.tolist()) for continued in made}) == 4


def test_a_prediction_stops_when_its_energy_does_not_fall():
    objective, params = trained("time_embed")
    prompts = [np.array(p) for p in ([5], [1, 2, 3, 4], [9, 7])]
    options = {
        "context": CONTEXT,
        "new_tokens": 5,
        "sampling": Sampling(),
        "thinking": Thinking(30, tolerance=0.05),
    }
    made = generate_ids(objective, params, prompts, **options)
    steps = np.concatenate([continued.num_steps for continued in made])
    assert steps.min() >= 1 and len(set(steps.tolist())) > 2
    order = [2, 0, 1]
    again = generate_ids(
        objective, params, [prompts[i] for i in order], indices=order, **options
    )
    for i, other in zip(order, again, strict=True):
        np.testing.assert_array_equal(other.tokens, made[i].tokens)
        np.testing.assert_array_equal(other.num_steps, made[i].num_steps)


def test_sequences_that_have_stopped_leave_the_work():
    """Steps and logits are those of all sequences going on together."""
    name = "anchored"
    objective, params = trained(name)
    decoder = objective.decoder
    prompts = jax.random.randint(jax.random.key(1), (4, 5), 0, VOCAB)
    lengths, rows = jnp.array([3, 1, 5, 2]), jnp.arange(4)
    prepared = decoder.prepare(params)
    prefill = jax.jit(decoder.prefill, compiler_options=QUICK)
    cache = prefill(prepared, prompts, lengths)
    model = models.build(CONFIGS[name].model)
    together = refined(
        model._replace(caching=model.caching._replace(rows=None)),
        CONFIGS[name].refine,
        ObjectiveConfig(),
    ).decoder

    def solve(decoder):
        predict = jax.jit(decoder.predict, static_argnums=4, compiler_options=QUICK)
        how = Thinking(30, tolerance=0.02)
        return predict(prepared, cache, rows, jax.random.key(5), how)

    ours, expected = solve(decoder), solve(together)
    close(ours.candidate, expected.candidate)
    np.testing.assert_array_equal(ours.num_steps, expected.num_steps)
    assert len(set(ours.num_steps.tolist())) > 1


# The loop itself ----------------------------------------------------------------------


def start(lengths, samples=1, context=CONTEXT, width=None):
    """What `extend` takes."""
    objective, params = trained("time_embed")
    params = objective.decoder.prepare(params)
    tokens = np.arange(len(lengths) * context, dtype=np.int32) % VOCAB
    tokens = tokens.reshape(-1, context)[:, :width]
    lengths = np.array(lengths, np.int32)
    cache = encode(params, tokens, lengths, objective, samples, context)
    length = np.repeat(lengths, samples)
    return {
        "params": params,
        "cache": cache,
        "index": np.arange(len(length), dtype=np.int32),
        "length": length,
        "total": length,
        "stopped": np.zeros(len(length), bool),
        "limit": np.int32(PIECE),
        "key": jax.random.key(0),
        "stop_ids": np.zeros(0, np.int32),
        "objective": objective,
        "context": context,
        "thinking": AS_TRAINED,
        "sampling": Sampling(1.0),
        "vocab_size": None,
    }


def run(given, **change):
    # A copy, since the cache is used up.
    given = {**given, "cache": jax.tree.map(jnp.copy, given["cache"]), **change}
    cache, *made = extend(**given)
    return cache, *jax.device_get(made)


def test_the_loop_ends_at_its_limit_at_a_full_context_and_when_all_have_stopped():
    given = start([3, 6])
    _, tokens, _, stopped, made = run(given, limit=np.int32(2))
    assert made == 2 and not stopped.any()
    assert (tokens[:, :2] >= 0).all() and (tokens[:, 2:] == 0).all()
    # The context holds 9: the fourth token of the second is one too many.
    _, longer, _, _, made = run(given)
    assert made == 4
    np.testing.assert_array_equal(longer[:, :2], tokens[:, :2])
    # One that has stopped needs no room.
    _, other, _, stopped, made = run(given, stopped=np.array([False, True]))
    assert made == 7 and stopped.tolist() == [False, True]
    assert (other[1, :7] == NONE).all()
    np.testing.assert_array_equal(other[0, :4], longer[0, :4])
    every = np.arange(VOCAB, dtype=np.int32)
    _, tokens, _, stopped, made = run(given, stop_ids=every)
    assert made == 1 and stopped.all() and (tokens[:, 0] == NONE).all()
    assert run(given, stopped=np.ones(2, bool))[-1] == 0


def test_two_calls_of_the_loop_make_what_one_makes():
    given = start([3, 2], samples=2)
    cache, first, _, _, _ = run(given, limit=np.int32(2))
    more = {name: given[name] + 2 for name in ("length", "total")}
    _, second, *_ = run({**given, "cache": cache}, **more, limit=np.int32(3))
    _, whole, *_ = run(given, limit=np.int32(5))
    both = np.concatenate([first[:, :2], second[:, :3]], axis=1)
    np.testing.assert_array_equal(both, whole[:, :5])


def test_a_cache_has_room_behind_what_was_encoded():
    given = start([3, 2], samples=2)
    short = start([3, 2], samples=2, width=4)
    leaves = (jax.tree.leaves(which["cache"]) for which in (short, given))
    for narrow, wide in zip(*leaves, strict=True):
        assert narrow.shape == wide.shape
    _, tokens, *_ = run(short, limit=np.int32(5))
    _, expected, *_ = run(given, limit=np.int32(5))
    np.testing.assert_array_equal(tokens, expected)


def test_nothing_of_a_cache_is_copied():
    """Neither to read one landscape nor to write a token."""
    given = start([3, 6], context=400)
    cache = sum(x.nbytes for x in jax.tree.leaves(given["cache"]))
    memory = extend.lower(**given).compile().memory_analysis()
    landscapes, layers, pair = 2, 2, 2
    assert memory.temp_size_in_bytes < cache / (landscapes * layers * pair)


def test_the_cache_stays_where_it_is():
    """The loop starts from its buffers and ends in them."""
    given = start([3, 6])
    addresses = lambda tree: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)]
    before = addresses(given["cache"])
    cache, *_ = extend(**given)
    assert addresses(cache) == before
    assert all(x.is_deleted() for x in jax.tree.leaves(given["cache"]))
