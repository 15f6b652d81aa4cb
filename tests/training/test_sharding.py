import jax
import numpy as np
import pytest

from ebt_jax.errors import UserError
from ebt_jax.training.config import MeshConfig, TrainConfig
from ebt_jax.training.sharding import (
    check_batch,
    global_batch,
    make_mesh,
    replicated,
)


@pytest.mark.parametrize("data, devices", [(-1, 8), (1, 1), (3, 3), (8, 8)])
def test_mesh(data, devices):
    assert make_mesh(MeshConfig(data=data)).shape == {"data": devices}


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match="mesh.data is 9, but there are 8 devices"):
        make_mesh(MeshConfig(data=9))


def test_batch_has_to_be_divisible_by_devices():
    mesh = make_mesh(MeshConfig())
    check_batch(TrainConfig(batch_size=16, accumulation=2), mesh)
    with pytest.raises(UserError, match="train.batch_size is 12, which the 8 devices"):
        check_batch(TrainConfig(batch_size=12), mesh)
    with pytest.raises(UserError, match=r"is 16 / 4 = 4, which the 8 devices"):
        check_batch(TrainConfig(batch_size=16, accumulation=4), mesh)


def test_global_batch_is_split_and_complete():
    mesh = make_mesh(MeshConfig(data=4))
    tokens = np.arange(24, dtype=np.int32).reshape(8, 3)
    batch = global_batch({"tokens": tokens}, mesh)["tokens"]
    np.testing.assert_array_equal(batch, tokens)
    assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 3)] * 4


def test_parameters_are_born_on_every_device():
    mesh = make_mesh(MeshConfig())
    born = jax.jit(lambda: jax.numpy.ones(3), out_shardings=replicated(mesh))()
    assert born.sharding.is_fully_replicated and len(born.addressable_shards) == 8
