"""Generation: ragged batches, filters, seeds, the window, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_objectives import VOCAB, Bytes, bigram, thinker, with_predict

from ebt_jax.errors import UserError
from ebt_jax.evaluation.generation import Sampling, choose, generate, generate_ids
from ebt_jax.models.config import ModelConfig
from ebt_jax.objectives import RefineSetup
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective

GREEDY = Sampling(temperature=0.0)
PROMPTS = [np.array(p, np.int32) for p in ([5], [1, 2, 3, 4], [9, 8, 7, 6, 5, 4, 3, 2])]


def counter():
    """Feed-forward: the next token is the last one plus 1."""

    def predict(params, batch, key, num_steps):
        return jax.nn.one_hot((batch["tokens"] + 1) % VOCAB, VOCAB)

    return with_predict(predict)


def test_greedy_follows_the_logits():
    assert generate(counter(), {}, Bytes(), ["a", "0"], context=8, new_tokens=4) == [
        "abcde",
        "01234",
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ragged_prompts_continue_as_they_do_alone(temperature):
    objective = thinker()
    params = objective.init(jax.random.key(0))
    options = {
        "context": 8,  # so that contexts fill up, at different times
        "new_tokens": 6,
        "sampling": Sampling(temperature, top_k=20, top_p=0.9),
        "seed": 4,
    }
    together = generate_ids(objective, params, PROMPTS, **options)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate_ids(objective, params, [prompt], indices=[i], **options)
        np.testing.assert_array_equal(together[i], alone)


def test_a_full_context_forgets_its_older_half():
    objective = thinker()
    params = objective.init(jax.random.key(0))
    (prompt,) = PROMPTS[1:2]
    (new,) = generate_ids(
        objective, params, [prompt], context=4, new_tokens=4, sampling=GREEDY
    )
    text = np.concatenate([prompt, new])
    for made, window in ((1, text[2:5]), (2, text[2:6]), (3, text[4:7])):
        (again,) = generate_ids(
            objective, params, [window], context=4, new_tokens=1, sampling=GREEDY
        )
        assert again[0] == new[made]


def test_a_context_of_one_token_is_enough():
    objective = bigram()
    params = objective.init(jax.random.key(0))
    (new,) = generate_ids(
        objective, params, [[3]], context=1, new_tokens=3, sampling=GREEDY
    )
    best = np.argmax(params["table"], axis=-1)
    assert new.tolist() == [best[3], best[best[3]], best[best[best[3]]]]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"conditioning": "default"},
        {"conditioning": "adaln"},
        {"conditioning": "default", "candidate_input": "anchored"},
        {"kind": "transformer_pp"},
    ],
)
def test_cached_logits_are_those_of_the_whole_sequence(model):
    config = Config(
        model=ModelConfig(
            num_layers=2, num_heads=2, dim=16, vocab_size=11, num_landscapes=2, **model
        ),
        refine=RefineSetup(num_landscapes=2, noise_std=0.3),
    )
    objective = build_objective(config)
    params = objective.init(jax.random.key(0))
    rows, key, num_steps = jnp.arange(3), jax.random.key(5), 3
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 11)
    batch = {"tokens": tokens, "weights": jnp.ones((3, 9)), "index": rows + 4}
    whole = jax.jit(objective.predict, static_argnums=3)(params, batch, key, num_steps)
    lengths = jnp.array([3, 1, 5])
    decoder = objective.decoder
    predict = jax.jit(decoder.predict, static_argnums=4)
    append = jax.jit(decoder.append)
    cache = decoder.prefill(params, tokens, lengths)
    for made in range(4):
        logits = predict(params, cache, rows + 4, key, num_steps)
        expected = whole[rows, lengths + made - 1]
        scale = jnp.abs(expected).max()
        np.testing.assert_allclose(logits / scale, expected / scale, atol=3e-4)
        cache = append(params, cache, tokens[rows, lengths + made])


def test_the_seed_decides():
    objective = bigram()
    params = {"table": jnp.zeros((VOCAB, VOCAB))}
    draw = lambda seed: generate_ids(
        objective,
        params,
        [PROMPTS[0], PROMPTS[0]],
        context=4,
        new_tokens=16,
        sampling=Sampling(1.0),
        seed=seed,
    )
    first, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).any()
    assert (first[0] != first[1]).any()  # equal prompts draw differently
    assert len(set(first[0].tolist())) > 8  # and not the same at every position


def test_num_steps_reaches_the_objective():
    seen = []

    def predict(params, batch, key, num_steps):
        seen.append(num_steps)
        return jnp.zeros((*batch["tokens"].shape, VOCAB))

    objective = with_predict(predict)
    generate_ids(
        objective, {}, PROMPTS, context=8, new_tokens=5, num_steps=7, sampling=GREEDY
    )
    assert seen == [7]  # and one compilation serves every token and length


def test_a_stop_token_ends_its_sequence_alone():
    made = generate(
        counter(), {}, Bytes(), ["a", "d", "z"], context=8, new_tokens=4, stop_token="e"
    )
    assert made == ["abcd", "d", "z{|}~"]
    by_id = generate(
        counter(), {}, Bytes(), ["a"], context=8, new_tokens=9, stop_token=ord("c")
    )
    assert by_id == ["ab"]


def test_a_character_may_begin_in_the_prompt_and_end_in_the_continuation():
    first, second = "é".encode()

    def predict(params, batch, key, num_steps):
        return jax.nn.one_hot(jnp.full(batch["tokens"].shape, second), VOCAB)

    class Halves(Bytes):
        def encode(self, text, /):
            return np.array([first], np.int32)

    objective = with_predict(predict)
    assert generate(objective, {}, Halves(), ["?"], context=4, new_tokens=1) == ["é"]


def test_tokens_that_the_tokenizer_lacks_are_never_chosen():
    objective = with_predict(
        lambda p, batch, k, n: jnp.broadcast_to(
            jnp.arange(300.0), (*batch["tokens"].shape, 300)
        )
    )
    assert generate(objective, {}, Bytes(), ["a"], context=4, new_tokens=1)[0][0] == "a"
    (new,) = generate_ids(
        objective,
        {},
        PROMPTS[:1],
        context=4,
        new_tokens=1,
        vocab_size=VOCAB,
        sampling=GREEDY,
    )
    assert new == [VOCAB - 1]


def drawn(sampling, probabilities=(0.4, 0.3, 0.2, 0.1), draws=4000):
    logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)), (draws, 4))
    keys = jax.random.split(jax.random.key(0), draws)
    return np.bincount(choose(logits, keys, sampling), minlength=4) / draws


def test_sampling_follows_the_probabilities():
    np.testing.assert_allclose(drawn(Sampling(1.0)), [0.4, 0.3, 0.2, 0.1], atol=0.03)
    square_root = np.sqrt([0.4, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(
        drawn(Sampling(2.0)), square_root / square_root.sum(), atol=0.03
    )


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (Sampling(1.0, top_k=2), [0.4, 0.3, 0, 0]),
        (Sampling(1.0, top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(1.0, top_p=0.69), [0.4, 0.3, 0, 0]),
        (Sampling(1.0, top_p=0.71), [0.4, 0.3, 0.2, 0]),
        (Sampling(1.0, top_p=1e-6), [1, 0, 0, 0]),
        (Sampling(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),  # 0.4 / 0.7 > 0.5
        (Sampling(0.0, top_k=2), [1, 0, 0, 0]),
    ],
)
def test_filters_leave_the_most_likely_tokens(sampling, left):
    expected = np.array(left) / np.sum(left)
    np.testing.assert_allclose(drawn(sampling), expected, atol=0.03)
    assert (drawn(sampling)[expected == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["ab", ""]}, "prompt '' has no tokens.*newline"),
        ({"prompts": ["abcdefghi"]}, "prompt 1 has 9 tokens.*context has 8"),
        ({"new_tokens": 0}, "new_tokens is 0.*at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5.*negative"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1.*negative"),
        ({"top_p": 0.0}, "top_p is 0.0.*above 0"),
        ({"top_p": 1.5}, "top_p is 1.5.*at most 1"),
        ({"stop_token": "ab"}, "stop token 'ab' is 2 tokens.*one"),
        ({"stop_token": ""}, "stop token '' is 0 tokens.*one"),
        ({"stop_token": 256}, "stop token is 256.*0 to 255"),
    ],
)
def test_errors(change, message):
    options = {"prompts": ["ab"], "context": 8, "new_tokens": 1} | change
    prompts = options.pop("prompts")
    with pytest.raises(UserError, match=message):
        generate(counter(), {}, Bytes(), prompts, **options)


def test_an_empty_row_of_ids_is_an_error_and_no_prompts_are_none():
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate_ids(
            counter(),
            {},
            [np.zeros(0, np.int32)],
            context=8,
            new_tokens=1,
            sampling=GREEDY,
        )
    assert generate(counter(), {}, Bytes(), [], context=8, new_tokens=1) == []
