"""What a device holds and sends, against arithmetic."""

import os
import re
import subprocess
import sys

import jax
import pytest
from tiny import tiny

from ebt_jax.data.config import DataConfig
from ebt_jax.errors import UserError
from ebt_jax.evaluation.collectives import Traffic, count_collectives
from ebt_jax.evaluation.inspect import inspect
from ebt_jax.evaluation.planning import candidate_shape, simulate_devices, size_text
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training.config import Config, MeshConfig, TrainConfig
from ebt_jax.training.sharding import make_mesh

CONFIG = Config(
    model=tiny(kind="transformer_pp", dim=64, num_landscapes=1, vocab_size=320),
    data=DataConfig(context=8),
    train=TrainConfig(batch_size=16),
    mesh=MeshConfig(data=2, fsdp=4),
)

HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%body.1 (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered = f32[8,4]{1,0} all-gather(f32[2,4]{1,0} %x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%branch (x: f32[4]) -> f32[4] {
  %permuted = bf16[4]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

ENTRY %main.5 (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%start), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %reduced = (f32[5]{0}, f32[]) all-reduce(%u, %v), replica_groups={{0,1,2,3}}, to_apply=%add
  %w = f32[8,4]{1,0} fusion(%u), kind=kLoop, calls=%add
  %scattered = f32[2,4]{1,0} reduce-scatter(%w), replica_groups=mesh['data'=1,'fsdp'=4] {'fsdp'}, dimensions={0}, to_apply=%add
  %started = (f32[2]{0}, f32[8]{0}) all-gather-start(%y), replica_groups={{0,1,2,3}}
  %done = f32[8]{0} all-gather-done(%started)
  %picked = f32[4] conditional(%z), branch_computations={%branch, %branch}
}
"""  # noqa: E501  lines of another program


def test_collectives_are_counted_as_often_as_they_run():
    assert count_collectives(HLO) == {
        "all-reduce": Traffic(1, 24),
        "all-gather": Traffic(4, 3 * 8 * 4 * 4 + 8 * 4),
        "reduce-scatter": Traffic(1, 4 * 2 * 4 * 4),
        "collective-permute": Traffic(2, 2 * 4 * 2),
    }


def mebibytes(name, text):
    (found,) = re.findall(rf"^  {name} +([\d.,]+) MiB", text, re.MULTILINE)
    return float(found)


def test_bytes_of_a_device_are_those_of_arithmetic():
    text = inspect(CONFIG, memory_gib=1e-4)
    dim, vocab, layers = 64, 320, 2
    matrices = 2 * vocab * dim + layers * 7 * dim * dim
    norms = (2 * layers + 1) * dim
    held = 4 * (matrices / 4 + norms)  # matrices are split over fsdp
    assert mebibytes("parameters", text) == round(held / 2**20, 1)
    # Two moments, and three counters.
    assert mebibytes("optimiser state", text) == round(2 * held / 2**20, 1)
    assert mebibytes("gathered parameters", text) == round(
        4 * (matrices + norms) / 2**20, 1
    )
    assert "DOES NOT FIT in 0.0001 GiB" in text
    assert "blocks/qkv/kernel" in text and "- fsdp" in text
    assert mebibytes("all-gather", text) == round(4 * matrices / 2**20, 1)


def test_candidates_of_a_device():
    config = Config(
        model=tiny(vocab_size=12, num_landscapes=1),
        data=DataConfig(context=8),
        train=TrainConfig(batch_size=16, accumulation=2),
    )
    for axes, shape in (
        ({"data": 8}, (8, 12)),
        ({"data": 2, "fsdp": 2, "model": 2}, (16, 6)),
        ({"data": 1, "seq": 2, "model": 4}, (32, 3)),
    ):
        mesh = make_mesh(MeshConfig(**axes))
        assert candidate_shape(config, mesh) == shape
    blocks = Config(
        model=config.model,
        data=config.data,
        train=config.train,
        refine=RefineSetup(block=5),
    )
    assert candidate_shape(blocks, mesh) == (5, 3)
    assert size_text(3 * 2**20).strip() == "3.0 MiB"
    assert size_text(5 * 2**30).strip() == "5.0 GiB"


def test_devices_cannot_be_simulated_once_there_are_some():
    jax.devices()
    with pytest.raises(UserError, match="9 devices cannot be simulated any more"):
        simulate_devices(9)


def test_a_machine_that_is_not_there():
    command = [sys.executable, "-m", "ebt_jax", "inspect"]
    command += ["--config=experiments/text.py:tiny,transformer_pp", "--devices=32"]
    command += ["--config.mesh.fsdp=4", "--config.train.batch_size=64"]
    command += ["--memory_gib=16"]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "data=8, fsdp=4, seq=1, model=1 (cpu)" in run.stdout
    assert "fits in 16 GiB: 0% of it" in run.stdout
