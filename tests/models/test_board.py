"""Boards as a space: energies, losses and measures, and the three networks of them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import QUICK

from ebt_jax import models
from ebt_jax.data import boards
from ebt_jax.data.board_config import BoardConfig
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Recurrent
from ebt_jax.iterated_objective import iterated
from ebt_jax.models import board
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.thinking import Thinking
from ebt_jax.training.board_task import resolve_board, side_by_side
from ebt_jax.training.config import Config, MeshConfig, from_json, to_json
from ebt_jax.training.objective import batch_shapes, build_objective
from ebt_jax.training.sharding import make_mesh, parameter_specs

jit = functools.partial(jax.jit, compiler_options=QUICK)
SMALL = BoardConfig(2, 2, 7, 11, 4, 6, held_out=0.3, pool=8)
MODEL = ModelConfig(
    space="board",
    conditioning="default",
    num_layers=1,
    num_heads=2,
    dim=8,
    iterations=3,
)
CONFIG = resolve_board(
    Config(
        model=MODEL,
        refine=RefineSetup(num_steps=2, num_landscapes=1, step_size=30.0),
        board=SMALL,
    )
)
KEY = jax.random.key(0)


def of_kind(kind, **changes):
    model = dataclasses.replace(CONFIG.model, kind=kind)
    return dataclasses.replace(CONFIG, model=model, **changes)


@pytest.fixture(scope="module")
def batch():
    examples = boards.train_examples(SMALL, 0)
    rows = [examples[place] for place in range(3)]
    return {n: jnp.stack([jnp.asarray(row[n]) for row in rows]) for n in rows[0]}


@pytest.fixture(scope="module")
def energies(batch):
    """The energy of boards by params and candidate, and params."""
    model = board.energy_model(CONFIG.model)

    @jax.jit
    def of(params, candidate):
        context = model.encode_context(params, batch)
        return model.energy(params, context, candidate, jnp.int32(0))

    return of, model.init(KEY)


def candidates(seed=1):
    return jax.nn.softmax(jax.random.normal(jax.random.key(seed), (3, 16, 4)))


def test_a_board_has_one_energy_of_its_own(energies, batch):
    of, params = energies
    before = of(params, candidates())
    assert before.shape == (3,)
    changed = candidates().at[1].set(candidates(2)[1])
    after = of(params, changed)
    np.testing.assert_array_equal(before == after, [True, False, True])
    # One cell of a board changes what the energy says of the others.
    empty = np.flatnonzero(batch["puzzle"][0] == 0)
    slope = jax.jit(jax.grad(lambda c: of(params, c)[0]))
    bent = candidates().at[0, empty[0]].set(jnp.eye(4)[2])
    difference = slope(bent)[0, empty[1]] - slope(candidates())[0, empty[1]]
    assert float(jnp.abs(difference).max()) > 1e-6


def test_given_cells_are_what_they_are(energies, batch):
    of, params = energies
    given = (batch["puzzle"] > 0)[..., None]
    other = jnp.where(given, candidates(3), candidates())
    np.testing.assert_array_equal(of(params, other), of(params, candidates()))
    slope = jax.grad(lambda c: of(params, c).sum())(candidates())
    assert not np.asarray(slope)[np.asarray(given[..., 0])].any()
    assert np.asarray(slope)[~np.asarray(given[..., 0])].any(axis=-1).all()


def test_cells_differ_by_row_column_and_box(energies, batch):
    del energies
    params = board.init(CONFIG.model, KEY)
    blank = jnp.zeros((1, 16), jnp.int32)
    cells = np.asarray(board.embed_cells(CONFIG.model, params, blank))[0]
    distances = np.abs(cells[:, None] - cells[None]).max(axis=-1)
    assert (distances + np.eye(16) > 1e-3).all()


def test_loss_and_measures_are_of_empty_cells(batch):
    logits = jax.random.normal(KEY, (3, 16, 4))
    log_prob = np.asarray(jax.nn.log_softmax(logits))
    puzzle, solution = np.asarray(batch["puzzle"]), np.asarray(batch["solution"])
    for row in range(3):
        empty = np.flatnonzero(puzzle[row] == 0)
        nll = -log_prob[row, empty, solution[row, empty] - 1]
        found = board.cross_entropy(logits, batch)[row]
        np.testing.assert_allclose(found, nll.mean(), rtol=1e-6)
        smooth = board.cross_entropy(logits, batch, 0.1)[row]
        expected = 0.9 * nll.mean() - 0.1 * log_prob[row, empty].mean()
        np.testing.assert_allclose(smooth, expected, rtol=1e-6)
        right = log_prob[row, empty].argmax(-1) + 1 == solution[row, empty]
        share = board.measures(CONFIG.model, logits, batch)["cell_accuracy"][row]
        np.testing.assert_allclose(share, right.mean(), rtol=1e-6)
    elsewhere = jnp.where((batch["puzzle"] > 0)[..., None], 9.0, logits)
    np.testing.assert_array_equal(
        board.cross_entropy(elsewhere, batch), board.cross_entropy(logits, batch)
    )


def test_a_board_is_solved_where_every_cell_is_right(batch):
    true = 5.0 * jax.nn.one_hot(batch["solution"] - 1, 4)
    wrong = jnp.flip(true[1], axis=-1)  # other digits, where cells are empty
    logits = true.at[1].set(wrong)
    found = board.measures(CONFIG.model, logits, batch)
    for name in ("solved", "valid"):
        np.testing.assert_array_equal(found[name], [1, 0, 1])
    assert found["cell_accuracy"].tolist() == [1, 0, 1]


def test_the_gradient_of_refined_boards_is_that_of_plain_autodiff(batch):
    whole = dataclasses.replace(CONFIG.refine, backprop="full")
    gradients = []
    for refine in (whole, dataclasses.replace(whole, meta_gradient="autodiff")):
        objective = build_objective(dataclasses.replace(CONFIG, refine=refine))
        params = objective.init(KEY)
        loss = lambda p, of=objective: of.loss(p, batch, KEY)[0]
        gradients.append(jit(jax.grad(loss))(params))
    for found, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert jnp.isfinite(found).all()
        size = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-4 * size + 1e-7)
    # And that of differences, along one direction.
    objective = build_objective(dataclasses.replace(CONFIG, refine=whole))
    params, step = objective.init(KEY), 1e-2
    score = jit(objective.loss)
    along = gradients[0]["energy"]["kernel"]
    along = along / jnp.linalg.norm(along)

    def at(distance):
        moved = {"kernel": params["energy"]["kernel"] + distance * along}
        return float(score({**params, "energy": moved}, batch, KEY)[0])

    difference = (at(step) - at(-step)) / (2 * step)
    slope = float(jnp.sum(along * gradients[0]["energy"]["kernel"]))
    assert difference == pytest.approx(slope, rel=0.02)


def test_steps_go_on_and_draws_belong_to_a_board(batch):
    objective = build_objective(CONFIG)
    params = objective.init(KEY)
    evaluate = jit(objective.evaluate, static_argnums=3)
    whole = evaluate(params, batch, KEY, 4)
    assert whole["solved"].shape == (4, 3) and whole["energy"].shape == (5, 3)
    assert float(whole["energy"][0].mean()) > float(whole["energy"][-1].mean())
    turned = {name: values[::-1] for name, values in batch.items()}
    again = evaluate(params, turned, KEY, 4)
    np.testing.assert_allclose(again["nll"][:, ::-1], whole["nll"], rtol=1e-4)
    logits = jit(objective.predict, static_argnums=3)(params, batch, KEY, Thinking(4))
    np.testing.assert_allclose(
        board.cross_entropy(logits, batch), whole["nll"][-1], rtol=1e-4
    )


def test_a_landscape_of_its_own_for_each_step(batch):
    model = dataclasses.replace(
        CONFIG.model, conditioning="time_embed", num_landscapes=2
    )
    made = board.energy_model(model)
    params = made.init(KEY)
    context = made.encode_context(params, batch)
    first, second = (
        made.energy(params, context, candidates(), jnp.int32(i)) for i in (0, 1)
    )
    assert (jnp.abs(first - second) > 1e-6).all()


def test_the_recurrent_network_scores_each_pass_and_goes_on(batch):
    config = of_kind("recurrent").model
    model = models.build(config)
    assert isinstance(model, Recurrent)
    objective = iterated(model, ObjectiveConfig())
    params = model.init(KEY)
    seen = jit(objective.evaluate, static_argnums=3)(params, batch, KEY, 5)
    assert seen["nll"].shape == (5, 3)
    total, metrics = jit(objective.loss)(params, batch, KEY)
    each = seen["nll"][:3].mean(axis=1)
    np.testing.assert_allclose(total, each.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], each[2], rtol=1e-5)
    last = iterated(model, ObjectiveConfig(loss_steps="last"))
    np.testing.assert_allclose(last.loss(params, batch, KEY)[0], each[2], rtol=1e-5)
    predicted = objective.predict(params, batch, KEY, Thinking(5))
    np.testing.assert_allclose(
        board.cross_entropy(predicted, batch), seen["nll"][4], rtol=1e-5
    )
    # Its first pass is the network that has no other.
    once = board.transformer_pp(of_kind("transformer_pp").model).predict(params, batch)
    np.testing.assert_allclose(
        board.cross_entropy(once, batch), seen["nll"][0], rtol=1e-5
    )


def test_methods_differ_by_what_makes_them_up():
    sizes = {}
    for kind in ("ebt", "transformer_pp", "recurrent"):
        shapes = jax.eval_shape(models.build(of_kind(kind).model).init, KEY)
        sizes[kind] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sizes["transformer_pp"] == sizes["recurrent"]
    assert abs(sizes["ebt"] - sizes["recurrent"]) <= 8  # a head of 1 in place of bias


def test_every_parameter_knows_how_it_is_split():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    for kind in ("ebt", "transformer_pp", "recurrent"):
        model = dataclasses.replace(of_kind(kind).model, conditioning="time_embed")
        shapes = jax.eval_shape(models.build(model).init, KEY)
        specs = parameter_specs(shapes, mesh)
        assert specs["blocks"]["out"]["kernel"] == P(None, "model", "fsdp")
        assert specs["row_embed"]["embedding"] == P()
    assert specs["output"]["kernel"] == P("fsdp", "model")


def test_batches_have_the_shapes_that_are_announced(batch):
    shapes = batch_shapes(dataclasses.replace(CONFIG))
    for name, values in batch.items():
        assert shapes[name].shape[1:] == values.shape[1:]
        assert shapes[name].dtype == values.dtype


def test_boards_are_shown_as_given_and_as_filled():
    puzzle = np.array([0, 2, 3, 4] + 12 * [1])
    answer = np.array([4, 2, 3, 4] + 12 * [1])
    solution = np.array([1, 2, 3, 4] + 12 * [1])
    lines = side_by_side(puzzle, answer, solution, 4).splitlines()
    assert lines[0].split() == [".", "2", "3", "4", "4!", "2", "3", "4"]
    assert lines[4] == "15 given, 1 wrong"


def test_runs_of_before_there_were_boards_are_read():
    tree = json.loads(to_json(Config()))
    del tree["board"]
    for name in ("box_rows", "box_columns", "iterations"):
        del tree["model"][name]
    assert from_json(json.dumps(tree)) == Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dit"}, "of board there are ebt, transformer_pp and recurrent"),
        ({"conditioning": "adaln"}, "of boards there are default and time_embed"),
        ({"iterations": 0}, "model.iterations is 0"),
        ({"space": "text", "kind": "recurrent"}, "of text there are ebt and transf"),
    ],
)
def test_errors_of_models(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(MODEL, **changes)


def test_errors_of_configs():
    model = dataclasses.replace(MODEL, vocab_size=9)
    with pytest.raises(UserError, match="model.vocab_size is 9, but the boards' is 4"):
        resolve_board(dataclasses.replace(CONFIG, model=model))
    with pytest.raises(UserError, match="boards are no sequences that could be split"):
        build_objective(dataclasses.replace(CONFIG, mesh=MeshConfig(seq=2)))
    with pytest.raises(ValueError, match="set them to the boards'"):
        models.build(dataclasses.replace(MODEL, vocab_size=4))
