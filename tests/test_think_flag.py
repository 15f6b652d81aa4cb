"""What `--think=` says, and what it refuses."""

import pytest

from ebt_jax.errors import UserError
from ebt_jax.thinking import (
    AS_TRAINED,
    Adam,
    Annealed,
    Langevin,
    Lower,
    Mala,
    Momentum,
    Thinking,
)
from ebt_jax.verbs.thinking import DETAILS, parse_thinking


@pytest.mark.parametrize(
    ("text", "thinking"),
    [
        (None, AS_TRAINED),
        ("fixed", AS_TRAINED),
        ("fixed:steps=4", Thinking(4)),
        (
            "fixed:steps=4,landscapes=each,step_size=0.5",
            Thinking(4, 1, None, "energy", "each", 0.5),
        ),
        ("until", Thinking(tolerance=0.0)),
        ("until:tolerance=0.01,steps=16", Thinking(16, 1, 0.01)),
        ("best_of:n=4", Thinking(best_of=4)),
        ("best_of:n=4,by=drop", Thinking(best_of=4, by="drop")),
        ("annealed:rate=0.5,steps=8", Thinking(8, method=Annealed(0.5))),
        ("momentum", Thinking(method=Momentum(0.9))),
        ("adam:decay=0.5,decay_squares=0.9,rate=2", Thinking(method=Adam(2, 0.5, 0.9))),
        ("langevin:noise=3", Thinking(method=Langevin(3.0))),
        ("lower:shrink=0.25", Thinking(method=Lower(0.25))),
        ("mala:temperature=0.1", Thinking(method=Mala(0.1))),
        (
            "until:steps=9+momentum:decay=0.5+best_of:n=2",
            Thinking(9, 2, 0.0, method=Momentum(0.5)),
        ),
    ],
)
def test_policies(text, thinking):
    assert parse_thinking(text) == thinking
    assert text is None or text.split(":")[0].split("+")[0] in DETAILS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("untl", "no policy 'untl'; did you mean 'until'?"),
        ("", "no policy ''; there are fixed, until, best_of, annealed"),
        ("fixed:step=4", "fixed has no key 'step'; did you mean 'steps'?"),
        ("best_of:x=4", "best_of has no key 'x'; there are n, by"),
        ("fixed:steps=four", "steps is 'four', but has to be an integer"),
        ("until:tolerance=low", "tolerance is 'low', but has to be a number"),
        ("fixed:landscapes", "landscapes has no value; write landscapes=VALUE"),
        ("fixed:steps=2,steps=3", "steps is said twice"),
        ("fixed:steps=2+until:steps=3", "num_steps is said twice"),
        ("momentum+adam", "method is said twice"),
        ("best_of", "best_of needs a number of candidates"),
        ("best_of:n=0", "best_of is 0, but has to be at least 1"),
        ("until:tolerance=-1", "tolerance is -1.0, but cannot be negative"),
        ("fixed:steps=-1", "num_steps is -1, but cannot be negative"),
        ("lower+until", "lower takes all its steps; leave one out"),
        ("lower:shrink=2", "shrink of lower is 2.0, but has to be in"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError) as caught:
        parse_thinking(text)
    assert str(caught.value).startswith(f"--think={text}: ")
    assert message in str(caught.value)
