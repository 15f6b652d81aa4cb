import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.training.config import Config, MeshConfig, TrainConfig
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.resolve import resolve
from ebt_jax.training.sharding import (
    PARAMETERS,
    arrange,
    batch_sharding,
    check_batch,
    gathered,
    global_batch,
    left_whole,
    local_rows,
    make_mesh,
    mesh_shape,
    on_first_device,
    parameter_specs,
    state_shardings,
    state_target,
)
from ebt_jax.training.step import init_state

GOLDEN = Path(__file__).parent / "parameter_specs.json"


@pytest.mark.parametrize(
    "axes, shape",
    [
        ({}, (8, 1, 1, 1)),
        ({"data": 1}, (1, 1, 1, 1)),
        ({"data": 3}, (3, 1, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "model": 2}, (2, 2, 1, 2)),
        ({"data": -1, "seq": 2, "model": 2}, (2, 1, 2, 2)),
    ],
)
def test_mesh(axes, shape):
    mesh = make_mesh(MeshConfig(**axes))
    assert mesh.axis_names == ("data", "fsdp", "seq", "model")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": 9}, "takes 9 devices, but there are 8"),
        ({"fsdp": 3}, "the other axes make 3, which does not divide the 8 devices"),
        ({"data": 8, "slices": 3}, r"mesh.data is 8, which mesh.slices \(3\)"),
    ],
)
def test_axes_that_do_not_fit(axes, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(MeshConfig(**axes), 8, "cpu")


def test_axes_that_nobody_can_have():
    with pytest.raises(UserError, match="mesh.data and mesh.fsdp are both -1"):
        MeshConfig(fsdp=-1)
    with pytest.raises(UserError, match="mesh.model is 0, but has to be positive"):
        MeshConfig(model=0)


def test_several_processes_leave_no_device_out(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="uses 4 of 8 devices, but with 2 processes"):
        make_mesh(MeshConfig(data=4))


def device(index, per_slice):
    return SimpleNamespace(
        id=index,
        platform="gpu",
        device_kind="some",
        process_index=index // per_slice,
        slice_index=index // per_slice,
    )


def test_only_data_crosses_from_slice_to_slice():
    devices = [device(i, per_slice=4) for i in range(8)]
    grid = arrange(devices, (4, 2, 1, 1), slices=2)
    assert grid.shape == (4, 2, 1, 1)
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    np.testing.assert_array_equal(slices[:, :, 0, 0], [[0, 0], [0, 0], [1, 1], [1, 1]])
    with pytest.raises(UserError, match="mesh.slices is 4, but the 8 devices belong"):
        arrange(devices, (4, 2, 1, 1), slices=4)


def test_batch_has_to_be_divisible_by_devices():
    mesh = make_mesh(MeshConfig(fsdp=2))
    check_batch(TrainConfig(batch_size=16, accumulation=2), mesh, 8)
    with pytest.raises(UserError, match="train.batch_size is 12, which the 8 devices"):
        check_batch(TrainConfig(batch_size=12), mesh, 8)
    with pytest.raises(UserError, match=r"is 16 / 4 = 4, which the 8 devices"):
        check_batch(TrainConfig(batch_size=16, accumulation=4), mesh, 8)
    mesh = make_mesh(MeshConfig(data=4, seq=2))
    with pytest.raises(UserError, match=r"data.context is 7, which mesh.seq \(2\)"):
        check_batch(TrainConfig(batch_size=16), mesh, 7)


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "fsdp": 2, "seq": 2}])
def test_global_batch_is_split_and_complete(axes):
    mesh = make_mesh(MeshConfig(**axes))
    tokens = np.arange(32, dtype=np.int32).reshape(8, 4)
    batch = global_batch({"tokens": tokens, "index": tokens[:, 0]}, mesh, 8)
    np.testing.assert_array_equal(batch["tokens"], tokens)
    np.testing.assert_array_equal(batch["index"], tokens[:, 0])
    shapes = {shard.data.shape for shard in batch["tokens"].addressable_shards}
    assert shapes == {(2, 4 // mesh.shape["seq"])}
    assert local_rows(mesh, 8) == list(range(8))


def test_a_batch_that_devices_cannot_share_is_copied():
    mesh = make_mesh(MeshConfig())
    tokens = np.arange(9, dtype=np.int32).reshape(3, 3)
    batch = global_batch({"tokens": tokens}, mesh)["tokens"]
    np.testing.assert_array_equal(batch, tokens)
    assert batch.sharding.is_fully_replicated


def variants():
    """Configs that together have every parameter there is."""
    for conditioning in ("default", "time_embed", "adaln", "adaln_zero"):
        for norm in ("rms", "layer", "dyt", "none"):
            yield ModelConfig(conditioning=conditioning, norm=norm)
    yield ModelConfig(tied_embedding=True, landscape_scales=True)
    yield ModelConfig(kind="transformer_pp")
    for kind in ("ebt", "transformer_pp"):
        yield ModelConfig(kind=kind, space="video", frame_size=8)
    for kind in ("ebt", "dit"):
        for told in (0, 8):
            yield ModelConfig(**image_fields(kind, told))
    yield ModelConfig(space="board", box_rows=16, box_columns=16)


def image_fields(kind, told=0):
    """What makes a model of images, with captions of `told` numbers."""
    return {
        "space": "image",
        "kind": kind,
        "image_size": 32,
        "channels": 4,
        "condition": "caption" if told else "none",
        "condition_size": told,
    }


def shapes_of(model):
    objective = build_objective(resolve(Config(model=model), 256))
    return jax.eval_shape(objective.init, jax.random.key(0))


def test_every_parameter_matches_one_pattern_and_every_pattern_is_used():
    mesh, names = make_mesh(MeshConfig(fsdp=2, model=2)), set()
    for model in variants():
        shapes = shapes_of(model)
        parameter_specs(shapes, mesh)  # raises unless each matches one pattern
        names |= {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        }
    for pattern, _ in PARAMETERS:
        assert fnmatch.filter(names, pattern), f"nothing matches {pattern}"
    with pytest.raises(ValueError, match="parameter other/kernel matches 0 patterns"):
        parameter_specs({"other": {"kernel": np.zeros(2)}}, mesh)


def specs_of(size, **model):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    shapes = shapes_of(ModelConfig(size=size, **model))
    specs = jax.tree.leaves(parameter_specs(shapes, mesh))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {
            "shape": list(leaf.shape),
            "split": list(spec),
        }
        for (path, leaf), spec in zip(leaves, specs, strict=True)
    }


def test_the_spec_of_every_parameter():
    """A change of this table changes where every array of a big run lives."""
    found = {
        "xxs": specs_of("xxs"),
        "large, adaln": specs_of("large", conditioning="adaln"),
        "large, transformer_pp": specs_of("large", kind="transformer_pp"),
        "xxs, video": specs_of("xxs", space="video", frame_size=3136),
        "xxs, video transformer_pp": specs_of(
            "xxs", kind="transformer_pp", space="video", frame_size=3136
        ),
        "large, image": specs_of("large", **image_fields("ebt")),
        "large, dit": specs_of("large", **image_fields("dit", told=768)),
    }
    assert found == json.loads(GOLDEN.read_text())


def test_axes_that_do_not_divide_leave_a_parameter_whole():
    mesh = make_mesh(MeshConfig(fsdp=2, model=2))
    shapes = {"embed": {"embedding": jax.ShapeDtypeStruct((51, 8), "float32")}}
    assert parameter_specs(shapes, mesh)["embed"]["embedding"] == (
        jax.sharding.PartitionSpec(None, "fsdp")
    )
    assert left_whole(shapes, mesh) == [
        "embed/embedding stays whole over mesh.model: 2 does not divide its 51"
    ]


def test_state_is_born_split_and_the_optimiser_follows():
    config = resolve(Config(model=ModelConfig(num_layers=1, dim=32)), 64)
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    init = lambda: init_state(objective, optimizer, 0)
    target = state_target(jax.eval_shape(init), mesh)
    shardings = state_shardings(target, mesh)
    state = jax.jit(init, out_shardings=shardings)()
    held = lambda tree: sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
    )
    all_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    # Matrices are split four ways; what is copied to all devices is small.
    assert held(state.params) < 0.3 * all_of(state.params)
    assert held(state.opt_state) < 0.3 * all_of(state.opt_state)
    assert all_of(state.opt_state) > 1.9 * all_of(state.params)
    one = jax.jit(init)()
    jax.tree.map(np.testing.assert_array_equal, state, one)
    assert jax.tree.map(lambda t: t.sharding, target) == shardings

    whole = gathered(state.params, mesh)
    assert whole["embed"]["embedding"].sharding.spec == ("model",) or held(
        whole["embed"]
    ) == 0.5 * all_of(whole["embed"])
    mine = on_first_device(state.params, mesh)
    assert {x.sharding.num_devices for x in jax.tree.leaves(mine)} == {1}
    jax.tree.map(np.testing.assert_array_equal, mine, one.params)


def test_sharding_of_a_batch():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2))
    assert batch_sharding(mesh, 1).shard_shape((8,)) == (2,)
    assert batch_sharding(mesh, 2).shard_shape((8, 6)) == (2, 3)
