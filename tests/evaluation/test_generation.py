"""Generation: ragged batches, samples, streams, the window, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_objectives import VOCAB, Bytes, bigram, thinker, with_predict

from ebt_jax.errors import UserError
from ebt_jax.evaluation.decoding import PIECE
from ebt_jax.evaluation.generation import generate, generate_ids
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.thinking import Thinking

GREEDY = Sampling(temperature=0.0)
PROMPTS = [np.array(p, np.int32) for p in ([5], [1, 2, 3, 4], [9, 8, 7, 6, 5, 4, 3, 2])]


def counter():
    """Feed-forward: the next token is the last one plus 1."""

    def predict(params, batch, key, thinking):
        return jax.nn.one_hot((batch["tokens"] + 1) % VOCAB, VOCAB)

    return with_predict(predict)


def texts(objective, prompts, codec=None, **options):
    options = {"context": 8, "sampling": GREEDY, **options}
    made = generate(objective, {}, codec or Bytes(), prompts, **options)
    return [continuation.text for continuation in made]


def same(made, expected):
    """Whether continuations are equal, in tokens and steps."""
    for ours, theirs in zip(made, expected, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_array_equal(ours.num_steps, theirs.num_steps)


def test_greedy_follows_the_logits():
    assert texts(counter(), ["a", "0"], new_tokens=4) == ["abcde", "01234"]


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
        alone = generate_ids(objective, params, [prompt], indices=[i], **options)
        same(together[i : i + 1], alone)


def test_a_full_context_forgets_its_older_half():
    objective = thinker()
    params = objective.init(jax.random.key(0))
    (prompt,) = PROMPTS[1:2]
    (new,) = generate_ids(
        objective, params, [prompt], context=4, new_tokens=4, sampling=GREEDY
    )
    text = np.concatenate([prompt, new.tokens])
    for made, window in ((1, text[2:5]), (2, text[2:6]), (3, text[4:7])):
        (again,) = generate_ids(
            objective, params, [window], context=4, new_tokens=1, sampling=GREEDY
        )
        assert again.tokens[0] == new.tokens[made]


def test_a_context_of_one_token_is_enough():
    objective = bigram()
    params = objective.init(jax.random.key(0))
    (new,) = generate_ids(
        objective, params, [[3]], context=1, new_tokens=3, sampling=GREEDY
    )
    best = np.argmax(params["table"], axis=-1)
    assert new.tokens.tolist() == [best[3], best[best[3]], best[best[best[3]]]]


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
    same(first, again)
    assert (first[0].tokens != other[0].tokens).any()
    assert (first[0].tokens != first[1].tokens).any()  # as equal prompts do
    assert len(set(first[0].tokens.tolist())) > 8  # and not the same everywhere


def test_one_compiled_program_makes_any_number_of_tokens():
    seen = []

    def predict(params, batch, key, thinking):
        seen.append(thinking)
        return jnp.zeros((*batch["tokens"].shape, VOCAB))

    thinking = Thinking(7, best_of=2, tolerance=0.5)
    objective = with_predict(predict)
    for new_tokens, on_tokens in ((PIECE + 5, None), (3, lambda row, new: None)):
        made = generate_ids(
            objective,
            {},
            PROMPTS,
            context=16,
            new_tokens=new_tokens,
            thinking=thinking,
            sampling=GREEDY,
            on_tokens=on_tokens,
        )
        assert [len(x.tokens) for x in made] == [new_tokens] * len(PROMPTS)
        assert set(made[0].num_steps.tolist()) == {7}
    assert seen == [thinking]


def test_samples_are_what_prompts_of_their_own_become():
    """Prompts of other lengths, and contexts that fill up."""
    objective = thinker()
    params = objective.init(jax.random.key(0))
    options = {"context": 8, "new_tokens": 6, "sampling": Sampling(1.0), "seed": 2}
    made = generate_ids(objective, params, PROMPTS, samples=3, **options)
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    same(made, generate_ids(objective, params, repeated, **options))
    named = {"indices": [1, 0], "samples": 3}
    again = generate_ids(objective, params, PROMPTS[1::-1], **named, **options)
    same(again, [*made[3:6], *made[:3]])
    assert any((made[0].tokens != other.tokens).any() for other in made[1:3])


def test_continuations_come_prompt_by_prompt():
    made = generate(
        counter(),
        {},
        Bytes(),
        ["a", "0"],
        context=8,
        new_tokens=2,
        samples=2,
        sampling=GREEDY,
    )
    assert [(x.prompt, x.sample, x.text) for x in made] == [
        ("a", 0, "abc"),
        ("a", 1, "abc"),
        ("0", 0, "012"),
        ("0", 1, "012"),
    ]
    assert bytes(made[0].tokens.tolist()) == b"bc"
    assert made[0].num_steps.tolist() == [0, 0]


def test_a_stop_token_ends_its_sequence_alone():
    made = texts(counter(), ["a", "d", "z"], new_tokens=4, stop_tokens=["e"])
    assert made == ["abcd", "d", "z{|}~"]
    assert texts(counter(), ["a"], new_tokens=9, stop_tokens=[ord("c")]) == ["ab"]


def test_the_first_of_several_stop_tokens_ends_a_sequence():
    stops = ["e", ord("c"), "{"]
    made = texts(counter(), ["a", "c", "z"], new_tokens=9, stop_tokens=stops)
    assert made == ["ab", "cd", "z"]


def test_a_sequence_that_goes_on_is_not_changed_by_one_that_has_stopped():
    """Not even where the one that has stopped would have outgrown the context."""
    objective = bigram()
    params = objective.init(jax.random.key(0))
    options = {"context": 6, "new_tokens": 9, "sampling": Sampling(1.0)}
    prompts = [np.arange(6), np.array([3])]
    free = generate_ids(objective, params, prompts, **options)
    stop = int(free[0].tokens[0])
    assert stop not in free[1].tokens
    stopped, other = generate_ids(
        objective, params, prompts, stop_ids=[stop], **options
    )
    assert len(stopped.tokens) == 0
    same([other], free[1:])


# Streams ------------------------------------------------------------------------------


def streamed(*arguments, **options):
    """Continuations, and the pieces of each."""
    pieces = {}
    on_text = lambda row, text: pieces.setdefault(row, []).append(text)
    made = generate(*arguments, on_text=on_text, **options)
    return made, pieces


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_pieces_add_up_to_the_text(temperature):
    """Whatever bytes there are, and where contexts fill up at different times."""
    objective = thinker()
    params = objective.init(jax.random.key(0))
    options = {
        "context": 8,
        "new_tokens": 11,
        "samples": 2,
        "sampling": Sampling(temperature),
        "stop_tokens": [10],
    }
    arguments = objective, params, Bytes(), ["Ein", "Bär"]
    made, pieces = streamed(*arguments, **options)
    assert ["".join(pieces[row]) for row in range(4)] == [x.text for x in made]
    same(made, generate(*arguments, **options))
    assert pieces[0][0] == "Ein" and len(pieces[0]) > 2


def test_a_character_is_shown_when_its_last_byte_is_there():
    letters = list("aé€𝄞".encode())
    assert len(set(letters)) == len(letters)
    following = jnp.zeros(VOCAB, jnp.int32)
    following = following.at[jnp.array(letters)].set(jnp.roll(jnp.array(letters), -1))

    def predict(params, batch, key, thinking):
        return jax.nn.one_hot(following[batch["tokens"]], VOCAB)

    made, pieces = streamed(
        with_predict(predict),
        {},
        Bytes(),
        ["a"],
        context=32,
        new_tokens=18,
        sampling=GREEDY,
    )
    text = "aé€𝄞aé€𝄞".encode()[:19].decode(errors="replace")
    assert made[0].text == "".join(pieces[0]) == text
    assert text.endswith("\ufffd")  # the end is what it is
    assert not any("\ufffd" in piece for piece in pieces[0][:-1])


def test_a_stream_of_tokens_begins_with_none_and_adds_up():
    seen = []
    (made,) = generate_ids(
        counter(),
        {},
        [[97]],
        context=8,
        new_tokens=10,
        sampling=GREEDY,
        on_tokens=lambda row, tokens: seen.append((row, tokens.tolist())),
    )
    assert seen[0] == (0, [])
    assert sum((tokens for _, tokens in seen), []) == made.tokens.tolist()
    assert len(seen) > 3 and all(row == 0 for row, _ in seen)


# The tokenizer ------------------------------------------------------------------------


def test_a_character_may_begin_in_the_prompt_and_end_in_the_continuation():
    first, second = "é".encode()

    def predict(params, batch, key, thinking):
        return jax.nn.one_hot(jnp.full(batch["tokens"].shape, second), VOCAB)

    class Halves(Bytes):
        def encode(self, text, /):
            return np.array([first], np.int32)

    assert texts(with_predict(predict), ["?"], Halves(), new_tokens=1) == ["é"]


def test_tokens_that_the_tokenizer_lacks_are_never_chosen():
    objective = with_predict(
        lambda p, batch, k, t: jnp.broadcast_to(
            jnp.arange(300.0), (*batch["tokens"].shape, 300)
        )
    )
    assert texts(objective, ["a"], new_tokens=1)[0][0] == "a"
    (new,) = generate_ids(
        objective,
        {},
        PROMPTS[:1],
        context=4,
        new_tokens=1,
        vocab_size=VOCAB,
        sampling=GREEDY,
    )
    assert new.tokens.tolist() == [VOCAB - 1]


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["ab", ""]}, "prompt '' has no tokens.*newline"),
        ({"prompts": ["abcdefghi"]}, "prompt 1 has 9 tokens.*context has 8"),
        ({"new_tokens": 0}, "new_tokens is 0.*at least 1"),
        ({"samples": 0}, "samples is 0.*at least 1"),
        ({"sampling": Sampling(-0.5)}, "temperature is -0.5.*negative"),
        ({"thinking": Thinking(-1)}, "num_steps is -1.*trained number"),
        ({"thinking": Thinking(best_of=0)}, "best_of is 0.*at least 1"),
        ({"thinking": Thinking(tolerance=-0.5)}, "tolerance is -0.5.*negative"),
        ({"thinking": Thinking(tolerance=float("nan"))}, "tolerance is nan"),
        ({"stop_tokens": ["ab"]}, "stop token 'ab' is 2 tokens.*one"),
        ({"stop_tokens": ["a", ""]}, "stop token '' is 0 tokens.*one"),
        ({"stop_tokens": [256]}, "stop token is 256.*0 to 255"),
    ],
)
def test_errors(change, message):
    shown = []
    options = {"prompts": ["ab"], "new_tokens": 1} | change
    with pytest.raises(UserError, match=message):
        texts(counter(), on_text=lambda row, text: shown.append(text), **options)
    assert not shown


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
    assert texts(counter(), [], new_tokens=1) == []


def test_an_objective_without_a_decoder_cannot_generate():
    with pytest.raises(ValueError, match="no decoder"):
        texts(counter()._replace(decoder=None), ["a"], new_tokens=1)
