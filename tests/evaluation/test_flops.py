"""FLOPs: what is counted, against what can be counted by hand, and the formula."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ebt_jax.data.config import DataConfig
from ebt_jax.evaluation.flops import (
    analytic_flops,
    count_flops,
    formula,
    mean_steps,
    thinking_flops,
)
from ebt_jax.evaluation.inspect import batch_shapes
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.thinking import Thinking
from ebt_jax.training.config import Config, TrainConfig
from ebt_jax.training.objective import build_objective
from ebt_jax.training.resolve import resolve

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


WIDTH, LAYERS, VOCAB, SEQ = 32, 2, 64, 64
SYSTEM_2 = {
    "num_steps": 3,
    "backprop": "truncated",
    "noise_std": 3.0,
    "step_size_learnable": False,
}


LIGHT = {"candidate_input": "final", "candidate_layers": 1}
TRUNK = {"candidate_input": "anchored", "candidate_layers": 1}


def config(loss_steps="all", *, kind="ebt", start=None, **refine):
    conditioning = "default" if "num_landscapes" not in refine else "time_embed"
    model = ModelConfig(
        **(start or {}),
        kind=kind,
        num_layers=LAYERS,
        num_heads=2,
        dim=WIDTH,
        conditioning=conditioning,
    )
    return resolve(
        Config(
            model=model,
            refine=RefineSetup(**refine),
            objective=ObjectiveConfig(loss_steps=loss_steps),
            data=DataConfig(context=SEQ),
            train=TrainConfig(batch_size=1),
        ),
        VOCAB,
    )


def shapes(config):
    return jax.eval_shape(build_objective(config).init, jax.random.key(0))


def counted(config):
    """FLOPs per token of the gradient of the traced loss."""
    objective = build_objective(config)
    gradient = jax.jit(jax.grad(lambda *x: objective.loss(*x)[0]))
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = gradient.trace(shapes(config), batch_shapes(config), key)
    return count_flops(traced.jaxpr.jaxpr) / SEQ


@pytest.mark.parametrize(
    ("loss_steps", "values", "text"),
    [
        ("all", {"kind": "transformer_pp"}, "6 N + 12 L S D + 6 V D"),
        (
            "all",
            {"num_steps": 1},
            "6 (N - M) + 12 N + (12 (L - 1) + 24 L) S D + 10 V D",
        ),
        (
            "all",
            {"num_steps": 3},
            "6 (N - M) + 36 N + (12 (L - 1) + 72 L) S D + 22 V D",
        ),
        (
            "all",
            {"num_steps": 2, "num_landscapes": 2},
            "12 (N - M) + 24 N + (24 (L - 1) + 48 L) S D + 16 V D",
        ),
        (
            "all",
            {"num_steps": 1, "start": LIGHT},
            "6 N + 12 N K / L + (12 L + 24 K) S D + 10 V D",
        ),
        (
            "all",
            {"num_steps": 1, "start": TRUNK},
            "6 (N - M) + 12 N K / L + (12 (L - 1) + 24 K) S D + 10 V D",
        ),
        # Noise parts a step's result from the next step's candidate.
        (
            "all",
            {"num_steps": 2, "noise_std": 1.0},
            "6 (N - M) + 24 N + (12 (L - 1) + 48 L) S D + 20 V D",
        ),
        (
            "all",
            {"num_steps": 2, "sharpen": 2.0},
            "6 (N - M) + 24 N + (12 (L - 1) + 48 L) S D + 20 V D",
        ),
        (
            "last",
            {"num_steps": 3},
            "6 (N - M) + 20 N + (12 (L - 1) + 40 L) S D + 18 V D",
        ),
        ("last", SYSTEM_2, "6 (N - M) + 20 N + (12 (L - 1) + 40 L) S D + 18 V D"),
        (
            "last",
            {**SYSTEM_2, "min_steps": 2},
            "6 (N - M) + 18 N + (12 (L - 1) + 36 L) S D + 16 V D",
        ),
        # A context that only steps before the last one use gets no gradient.
        (
            "last",
            {**SYSTEM_2, "num_landscapes": 3},
            "10 (N - M) + 20 N + (20 (L - 1) + 40 L) S D + 18 V D",
        ),
        (
            "last",
            {**SYSTEM_2, "step_size_learnable": True},
            "6 (N - M) + 20 N + (12 (L - 1) + 40 L) S D + 20 V D",
        ),
        (
            "all",
            {"num_steps": 3, "backprop": "full"},
            "6 (N - M) + 36 N + (12 (L - 1) + 72 L) S D + 34 V D",
        ),
    ],
)
def test_the_formula_is_that_of_the_config(loss_steps, values, text):
    assert formula(config(loss_steps, **values)) == text


def test_the_parts_of_the_formula_are_its_terms_times_its_sizes():
    c = config(num_steps=2, num_landscapes=2)
    blocks, attention, vocabulary = analytic_flops(c, shapes(c))
    # q, k, v, out, gate, up, down; of a context's last block the first three.
    assert blocks == (12 * (LAYERS * 7 - 4) + 24 * LAYERS * 7) * WIDTH**2
    assert attention == (24 * (LAYERS - 1) + 48 * LAYERS) * SEQ * WIDTH
    assert vocabulary == 16 * VOCAB * WIDTH
    total = analytic_flops(c, shapes(c)).total
    assert total == blocks + attention + vocabulary


def test_the_formula_takes_any_number_of_steps_and_the_mean_of_drawn_ones():
    c = config("last", **SYSTEM_2, min_steps=2)
    assert mean_steps(c.refine) == 2.5
    two, three = (analytic_flops(c, shapes(c), steps).total for steps in (2, 3))
    assert analytic_flops(c, shapes(c)).total == pytest.approx((two + three) / 2)


def test_modulations_see_no_token():
    c = config(num_steps=2, num_landscapes=2)
    adaln = dataclasses.replace(c.model, conditioning="adaln")
    modulated = dataclasses.replace(c, model=adaln)
    assert analytic_flops(modulated, shapes(modulated)) == analytic_flops(c, shapes(c))


def test_blocks_of_keys_that_no_query_sees_are_passed_over():
    c = config(num_steps=1)
    blocks = dataclasses.replace(c.model, attention_block=SEQ // 4)
    blockwise = dataclasses.replace(c, model=blocks)
    share = (1 + 2 + 3 + 4) / (4 * 4)
    whole = analytic_flops(c, shapes(c))
    assert analytic_flops(blockwise, shapes(c)).attention == share * whole.attention


@pytest.mark.parametrize(
    ("loss_steps", "values"),
    [
        ("all", {"kind": "transformer_pp"}),
        ("all", {"num_steps": 3}),
        ("all", {"num_steps": 2, "num_landscapes": 2}),
        ("last", {"num_steps": 3}),
        ("last", SYSTEM_2),
        ("all", {"num_steps": 1, "start": LIGHT}),
        ("rising", {"num_steps": 2, "start": TRUNK}),
    ],
)
def test_the_program_computes_what_the_formula_says(loss_steps, values):
    c = config(loss_steps, **values)
    needed = analytic_flops(c, shapes(c)).total
    # Besides, it has the energy head, and with landscapes a step token in each context.
    more = 1.001 + ("num_landscapes" in values) / SEQ
    assert needed <= counted(c) < more * needed


@pytest.mark.parametrize(
    ("values", "thinking", "gradients", "energies"),
    [
        ({"kind": "transformer_pp"}, Thinking(), 0, 0),
        ({"num_steps": 2}, Thinking(4), 4, 0),
        ({"num_steps": 2, "num_landscapes": 2}, Thinking(best_of=3), 6, 3),
        ({"num_steps": 2}, Thinking(best_of=2, by="drop"), 4, 4),
        ({"num_steps": 1, "start": LIGHT}, Thinking(2), 2, 0),
    ],
)
def test_thinking_computes_what_its_formula_says(values, thinking, gradients, energies):
    c = config(**values)
    objective = build_objective(c)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = {**batch_shapes(c), "index": jax.ShapeDtypeStruct((1,), jnp.int32)}
    predict = jax.jit(objective.predict, static_argnums=3)
    traced = predict.trace(shapes(c), batch, key, thinking)
    counted = count_flops(traced.jaxpr.jaxpr) / SEQ
    needed = thinking_flops(c, shapes(c), gradients, energies).total
    # As above, and a context's last block, which only the compiler leaves out.
    more = 1.05 + ("num_landscapes" in values) / SEQ
    assert needed <= counted < more * needed
