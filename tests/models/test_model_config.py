"""Model configs refuse what cannot be built, in one line."""

import re

import pytest

from ebt_jax import models
from ebt_jax.errors import UserError
from ebt_jax.models.config import SIZES, ModelConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unroll": -1}, "model.unroll is -1, but has to be 0 (always scan) or more"),
        ({"kind": "rnn"}, "model.kind is 'rnn', but has to be one of ebt, transformer"),
        ({"size": "huge"}, "model.size is 'huge', but has to be one of 4xs, 3xs, xxs"),
        (
            {"conditioning": "film"},
            "model.conditioning is 'film', but has to be one of default, time_embed, "
            "adaln, adaln_zero",
        ),
        (
            {"candidate_input": "both"},
            "model.candidate_input is 'both', but has to be one of embedding, "
            "anchored, final",
        ),
        (
            {"norm": "batch"},
            "model.norm is 'batch', but has to be one of rms, layer, dyt, none",
        ),
        (
            {"activation": "tanh"},
            "model.activation is 'tanh', but has to be one of silu, relu, gelu, elu",
        ),
        (
            {"dtype": "float16"},
            "model.dtype is 'float16', but has to be one of float32, bfloat16",
        ),
        (
            {"remat": "some"},
            "model.remat is 'some', but has to be one of none, dots, full",
        ),
        *(
            (
                {name: -1},
                f"model.{name} is -1, but has to be positive, or 0 for its default",
            )
            for name in (
                "num_layers",
                "num_heads",
                "dim",
                "vocab_size",
                "num_landscapes",
            )
        ),
        (
            {"ffn_multiplier": 0.001},
            "model.ffn_multiplier is 0.001, which leaves 0 hidden units of 128",
        ),
        (
            {"num_heads": 3},
            "model: 3 heads do not divide width 128; change model.num_heads or "
            "model.dim",
        ),
        (
            {"dim": 6},
            "model: width 6 over 2 heads gives head size 3, but rotary positions need "
            "an even one; change model.num_heads or model.dim",
        ),
        (
            {"candidate_input": "anchored"},
            "model.candidate_input is 'anchored', which has no step token, but "
            "model.conditioning is 'time_embed'; set it to 'default', 'adaln' or "
            "'adaln_zero'",
        ),
        (
            {"candidate_input": "final"},
            "model.candidate_input is 'final', which has no step token, but "
            "model.conditioning is 'time_embed'; set it to 'default'",
        ),
        (
            {"candidate_input": "final", "conditioning": "adaln"},
            "model: candidates start from a hidden state that all landscapes share, "
            "but model.conditioning is 'adaln'; set it to 'default'",
        ),
        (
            {"candidate_layers": 3},
            "model.candidate_layers is 3, but there are 2 blocks; lower it, or 0 for",
        ),
        (
            {"candidate_layers": 1},
            "model.candidate_layers is 1, which leaves blocks to the context alone, "
            "but model.candidate_input is 'embedding', which knows nothing of them; "
            "set it to 'anchored' or 'final'",
        ),
    ],
)
def test_model_config_refuses(fields, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        ModelConfig(**fields)


def test_a_model_needs_a_vocabulary_and_landscapes():
    with pytest.raises(ValueError, match="vocab_size is 0; set it to the tokenizer's"):
        models.build(ModelConfig(num_landscapes=1))
    with pytest.raises(ValueError, match=r"landscapes is 0; set it to refine\.num_l"):
        models.build(ModelConfig(vocab_size=5))


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_those_of_the_table_unless_overridden(size):
    config = ModelConfig(size=size)
    assert (config.layers, config.heads, config.width) == SIZES[size]
    assert config.hidden == config.width and config.head_dim % 2 == 0
    other = ModelConfig(size=size, num_layers=1, num_heads=2, dim=20)
    assert (other.layers, other.heads, other.width, other.head_dim) == (1, 2, 20, 10)
