"""What inspect counts, against what can be counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ebt_jax.data.config import DataConfig
from ebt_jax.evaluation.inspect import (
    analytic_flops,
    batch_shapes,
    count_flops,
    count_non_embedding,
    inspect,
    parameter_table,
)
from ebt_jax.models.config import ModelConfig
from ebt_jax.objectives import RefineSetup
from ebt_jax.training.config import Config, TrainConfig, resolve

TINY = Config(
    model=ModelConfig(num_layers=2, num_heads=1, dim=16),
    data=DataConfig(context=8),
    train=TrainConfig(batch_size=8),
)
A, B = jnp.ones((4, 5)), jnp.ones((5, 6))
PRODUCT = 2 * 4 * 5 * 6


def flops(function, *inputs):
    return count_flops(jax.jit(function).trace(*inputs).jaxpr.jaxpr)


def test_a_product_counts_twice_its_multiplications():
    assert flops(lambda a, b: a @ b, A, B) == PRODUCT
    assert flops(lambda a: jnp.einsum("ij,ij->", a, a), A) == 2 * 4 * 5
    batched = lambda a, b: jnp.einsum("nij,njk->nik", a, b)
    assert flops(batched, jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))) == 3 * PRODUCT


def test_loops_count_as_often_as_they_run():
    def body(b, _):
        return jax.nn.relu(A.T @ (A @ b)), None

    looped = lambda b: jax.lax.scan(body, b, length=7)[0]
    assert flops(looped, B) == 7 * 2 * PRODUCT
    # Backwards each product gives two more; one of them is with a constant here.
    gradient = jax.grad(lambda b: looped(b).sum())
    assert flops(gradient, B) == 2 * 7 * 2 * PRODUCT
    remat = jax.grad(lambda b: jax.lax.scan(jax.checkpoint(body), b, length=7)[0].sum())
    assert flops(remat, B) > flops(gradient, B)


def test_a_conditional_counts_as_its_dearest_branch_and_dead_code_as_nothing():
    cond = lambda x, a, b: jax.lax.cond(x, lambda: a @ b, lambda: (a @ b) @ b.T @ b)
    assert flops(cond, True, A, B) == 3 * PRODUCT

    def wasteful(a, b):
        jnp.sin(a @ b)
        return a

    assert flops(wasteful, A, B) == 0


def test_parameters_are_listed_with_their_totals():
    params = {
        "embed": {"embedding": jnp.zeros((7, 3))},
        "blocks": {"kernel": jnp.zeros((2, 3, 3))},
        "step_size": jnp.float32(0),
    }
    table = parameter_table(params)
    row = next(line for line in table.splitlines() if "blocks/kernel" in line)
    assert row.split() == ["blocks/kernel", "2", "x", "3", "x", "3", "18", "0.00"]
    assert "total 40 parameters, 19 of them non-embedding" in table
    assert count_non_embedding(params) == 19


@pytest.mark.parametrize(
    ("model", "refine", "formula"),
    [
        ({"kind": "transformer_pp"}, {}, "6 N + 6 V D"),
        (
            {"conditioning": "default"},
            {"num_steps": 3},
            "6 N x 1 + 12 N x 3 + 10 V D x 3",
        ),
        (
            {"conditioning": "time_embed"},
            {"num_steps": 3, "num_landscapes": 2},
            "6 N x 2 + 12 N x 3 + 10 V D x 3",
        ),
    ],
)
def test_the_formula_is_that_of_the_config(model, refine, formula):
    config = resolve(
        dataclasses.replace(
            TINY,
            model=dataclasses.replace(TINY.model, **model),
            refine=RefineSetup(**refine),
        ),
        256,
    )
    params = {"blocks": jnp.zeros(1000), "embed": jnp.zeros(3)}
    text, value = analytic_flops(config, params)
    assert text == formula
    products = formula.replace("V D", "256 * 16").replace("N", "1000")
    products = products.replace(" x ", " * ").replace("6 1000", "6 * 1000")
    products = products.replace("2 1000", "2 * 1000").replace(" 256", " * 256")
    assert value == eval(products)


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
        "blocks/query/kernel",
        "non-embedding",
        "data=8 (cpu)",
        "8 x 8 = 64 tokens, 1 sequences per device",
        "matrix multiplications",
        "by formula",
        "a loop's body once",
        "temporaries",
        "MiB",
    ):
        assert part in text
