"""Generation on several devices: the same tokens, and a cache that is split."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny

from ebt_jax.evaluation.decoding import encode
from ebt_jax.evaluation.generation import generate_ids
from ebt_jax.evaluation.sampling import Sampling
from ebt_jax.evaluation.speculation import Draft, speculate_ids
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training.config import Config, MeshConfig
from ebt_jax.training.objective import build_objective
from ebt_jax.training.sharding import gathered, make_mesh

CONFIG = Config(
    model=tiny(num_layers=1, num_heads=2, num_landscapes=2),
    refine=RefineSetup(num_steps=2, num_landscapes=2, step_size=0.1),
)
PROMPTS = [np.arange(3 + i, dtype=np.int32) for i in range(4)]


def setup(mesh):
    config = dataclasses.replace(CONFIG, mesh=mesh)
    objective = build_objective(config)
    params = objective.init(jax.random.key(0))
    return objective, gathered(params, make_mesh(mesh))


def continuations(mesh):
    objective, params = setup(mesh)
    made = generate_ids(
        objective, params, PROMPTS, context=16, new_tokens=6, sampling=Sampling(0.0)
    )
    return [list(map(int, continuation.tokens)) for continuation in made]


@pytest.fixture(scope="module")
def on_one_device():
    return continuations(MeshConfig(data=1))


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=1, model=2), MeshConfig(data=2, fsdp=2, model=2)]
)
def test_tokens_are_those_of_one_device(on_one_device, mesh):
    assert continuations(mesh) == on_one_device


def test_a_draft_changes_no_token_on_a_mesh(on_one_device):
    mesh = MeshConfig(data=2, fsdp=2, model=2)
    objective, params = setup(mesh)
    made = speculate_ids(
        objective,
        params,
        Draft(objective, params, tokens=2),
        PROMPTS,
        context=16,
        new_tokens=6,
        seed=0,
    )
    tokens = [list(map(int, continued.tokens)) for continued in made.continued]
    assert tokens == on_one_device and made.accepted.sum() > 0


def test_keys_and_values_are_split_over_heads():
    objective, params = setup(MeshConfig(data=1, model=2))
    tokens = np.zeros((4, 8), np.int32)
    lengths = np.full(4, 5, np.int32)
    cache = encode(params, tokens, lengths, objective, 1, 16)
    big = [x for x in jax.tree.leaves(cache) if x.ndim >= 4]
    assert big
    for x in big:  # `[..., heads, keys, head_dim]`
        (shape,) = {shard.data.shape for shard in x.addressable_shards}
        assert shape[-3] == x.shape[-3] // 2
