"""What inspect counts, against what can be counted by hand."""

import dataclasses

import jax.numpy as jnp

from ebt_jax.data.config import DataConfig
from ebt_jax.evaluation.flops import count_non_embedding
from ebt_jax.evaluation.inspect import (
    batch_shapes,
    inspect,
    parameter_table,
)
from ebt_jax.models.config import ModelConfig
from ebt_jax.training.config import Config, MeshConfig, TrainConfig
from ebt_jax.training.sharding import make_mesh

TINY = Config(
    model=ModelConfig(num_layers=2, num_heads=1, dim=16),
    data=DataConfig(context=8),
    train=TrainConfig(batch_size=8),
)


def test_parameters_are_listed_with_their_totals():
    params = {
        "embed": {"embedding": jnp.zeros((7, 3))},
        "blocks": {"kernel": jnp.zeros((2, 3, 3))},
        "step_size": jnp.float32(0),
    }
    table = parameter_table(params, make_mesh(MeshConfig()))
    row = next(line for line in table.splitlines() if "blocks/kernel" in line)
    assert row.split() == ["blocks/kernel", "2", "x", "3", "x", "3", "18", "0.00"]
    assert "total 40 parameters, 19 of them non-embedding" in table
    assert count_non_embedding(params) == 19


def test_shapes_are_those_of_the_batches():
    shapes = batch_shapes(TINY)
    assert {name: (s.shape, s.dtype.name) for name, s in shapes.items()} == {
        "tokens": ((8, 8), "int32"),
        "targets": ((8, 8), "int32"),
        "weights": ((8, 8), "float32"),
        "index": ((8,), "int32"),
    }
    packed = dataclasses.replace(TINY.data, packing="first_fit")
    assert set(batch_shapes(dataclasses.replace(TINY, data=packed))) == {
        *shapes,
        "segments",
        "positions",
    }


def test_inspect_tells_parameters_flops_memory_and_mesh():
    model = dataclasses.replace(TINY.model, kind="transformer_pp")
    text = inspect(dataclasses.replace(TINY, model=model))
    for part in (
        "blocks/down/kernel",
        "non-embedding",
        "data=8, fsdp=1, seq=1, model=1 (cpu)",
        "8 x 8 = 64 tokens, 1 sequences per device",
        "matrix multiplications",
        "by formula",
        "a loop's body once",
        "temporaries",
        "MiB",
        "bytes per device",
        "all-reduce",
    ):
        assert part in text
