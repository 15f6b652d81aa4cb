"""Where a run begins: another run's state, parameters of a run or of a file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebt_jax.cli import run as ebt
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.training import checkpoint, initial
from ebt_jax.training.config import Config, LogConfig, MeshConfig, TrainConfig
from ebt_jax.training.loop import fit
from ebt_jax.training.objective import build_objective
from ebt_jax.training.optim import make_optimizer
from ebt_jax.training.resolve import resolve
from ebt_jax.training.saving import Saver
from ebt_jax.training.sharding import make_mesh, state_target
from ebt_jax.training.step import init_state
from ebt_jax.training.task import show_text
from ebt_jax.training.workdir import checkpoint_steps, claim_workdir

TABLES = ("embed/embedding", "candidate_embed/kernel")


def config_of(vocab=20, kind="ebt", context=16, **train):
    model = ModelConfig(kind=kind, num_layers=2, num_heads=2, dim=8, vocab_size=vocab)
    log = LogConfig(tensorboard=False, plots=False, compilation_cache=False)
    config = Config(
        model=model,
        refine=RefineSetup(noise_std=1.0, noise_learnable=True),
        train=TrainConfig(**train),
        mesh=MeshConfig(data=1),
        log=log,
    )
    data = dataclasses.replace(config.data, context=context)
    return resolve(dataclasses.replace(config, data=data), vocab)


def first_state(config):
    """What makes a run's state, and its shapes and shardings.

    Parameters have the model's names and shapes, and numbers that compile fast.
    """
    objective = build_objective(config)
    shapes = jax.eval_shape(objective.init, jax.random.key(0))

    def fresh(key):
        first = jax.random.key_data(key)[-1] % 1000
        return jax.tree.map(
            lambda s: (first + jnp.arange(s.size).reshape(s.shape)).astype(s.dtype),
            shapes,
        )

    objective = objective._replace(init=fresh)
    optimizer = make_optimizer(config.optim, config.refine, shapes)
    init = lambda key: init_state(objective, optimizer, key)
    state = jax.eval_shape(init, jax.random.key(config.train.seed))
    target = state_target(state, make_mesh(config.mesh))
    return init, target


def begin(config, resume_from=""):
    """What a new run with this config begins with, parameters by name."""
    init, target = first_state(config)
    origin = initial.find_origin(config, resume_from, target.params)
    restored = initial.begin(config, None, origin, init, target)
    for leaf, wanted in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True
    ):
        assert leaf.sharding == wanted.sharding
    return checkpoint.named(restored.state.params), restored


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Workdir of a run with checkpoints 1 and 2, and the parameters of both."""
    path = tmp_path_factory.mktemp("trained") / "run"
    config = config_of(seed=5)
    claim_workdir(path, config)
    init, target = first_state(config)
    shardings = jax.tree.map(lambda s: s.sharding, target)
    first = jax.jit(init, out_shardings=shardings)(jax.random.key(5))
    second = jax.tree.map(lambda x: x + 1, first)
    with Saver(path, config.checkpoint) as saver:
        saver.save(1, first, 16, config)
        saver.save(2, second, 32, config)
    params = [
        {k: np.asarray(v) for k, v in checkpoint.named(state.params).items()}
        for state in (first, second)
    ]
    return path, *params


def test_parameters_of_another_run(trained):
    path, first, second = trained
    for source, expected in ((f"{path}@1", first), (str(path), second)):
        params, restored = begin(config_of(init_from=source, context=64))
        assert all(np.array_equal(params[name], expected[name]) for name in expected)
        assert restored.next_example == 0 and int(restored.state.step) == 0
        moments = jax.tree.leaves(restored.state.opt_state)
        assert not any(np.asarray(leaf).any() for leaf in moments)


def test_what_is_not_learnt_is_the_configs(trained):
    # As from System 1, without noise and with another step size, to System 2.
    path, _, known = trained
    setup = RefineSetup(noise_std=3.0, step_size_learnable=False)
    config = dataclasses.replace(config_of(init_from=str(path)), refine=setup)
    params, _ = begin(config)
    fresh, _ = begin(dataclasses.replace(config_of(), refine=setup))
    for name, array in known.items():
        kept = name in ("step_size", "noise_std")
        assert np.array_equal(params[name], fresh[name] if kept else array), name
        assert not np.array_equal(fresh[name], array)


@pytest.mark.parametrize("kind", ["ebt", "transformer_pp"])
@pytest.mark.parametrize("vocab", [12, 31])
def test_another_vocabulary_keeps_the_common_entries(trained, tmp_path, kind, vocab):
    path, _, known = trained
    if kind == "transformer_pp":
        path, config = tmp_path / "plain", config_of(kind=kind)
        claim_workdir(path, config)
        init, _ = first_state(config)
        state = init(jax.random.key(0))
        known = checkpoint.named(state.params)
        with Saver(path, config.checkpoint) as saver:
            saver.save(1, state, 0, config)
    fresh, _ = begin(config_of(vocab, kind))
    params, _ = begin(config_of(vocab, kind, init_from=str(path)))
    common = min(vocab, 20)
    changed = 0
    for name in known:
        if params[name].shape == known[name].shape:
            assert np.array_equal(params[name], known[name])
            continue
        changed += 1
        axis = initial.VOCABULARY[name]
        cut = lambda array, at, axis=axis: np.split(np.asarray(array), [at], axis)
        assert np.array_equal(cut(params[name], common)[0], cut(known[name], common)[0])
        assert np.array_equal(cut(params[name], common)[1], cut(fresh[name], common)[1])
    assert changed == 2


def test_a_fresh_vocabulary(trained):
    path, _, known = trained
    for vocab in (20, 31):
        fresh, _ = begin(config_of(vocab))
        config = config_of(vocab, init_from=str(path), init_vocab="fresh")
        params, _ = begin(config)
        for name in known:
            expected = fresh if name in TABLES else known
            assert np.array_equal(params[name], expected[name])


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("names", ["ours", "published"])
def test_a_file_is_written_and_read_again(trained, tmp_path, capsys, suffix, names):
    path, first, _ = trained
    out = tmp_path / f"model.{suffix}"
    flags = [f"--workdir={path}", f"--out={out}", "--checkpoint=1", f"--names={names}"]
    assert ebt(["checkpoints", "export", *flags]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: ") and "of checkpoint 1" in said
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
    params, _ = begin(config_of(init_from=str(out)))
    assert all(np.array_equal(params[name], first[name]) for name in first)
    longer, _ = begin(config_of(31, init_from=str(out)))
    for name in TABLES:
        assert np.array_equal(longer[name][:20], first[name])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dim": 16}, "of shape .* only the vocabulary and the context may differ"),
        ({"num_layers": 3}, r"has blocks/\S+ of shape \(2, .* not \(3, "),
        ({"kind": "transformer_pp"}, "has a parameter candidate_embed/kernel, which"),
        ({"norm": "layer"}, "lacks the parameter blocks/"),
    ],
)
def test_parameters_that_do_not_fit(trained, settings, message):
    config = config_of(init_from=str(trained[0]))
    model = dataclasses.replace(config.model, **settings)
    with pytest.raises(UserError, match=f"train.init_from: .* {message}"):
        begin(dataclasses.replace(config, model=model))


def test_origins_that_are_not_there(trained, tmp_path):
    path = trained[0]
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 this is none")
    claim_workdir(tmp_path / "empty", config_of())
    for source, message in (
        (tmp_path / "nowhere", "train.init_from: .* holds no run"),
        (tmp_path / "empty", "train.init_from: .*empty holds no checkpoint yet"),
        (f"{path}@7", "train.init_from: .* no checkpoint of step 7; .* those of 1, 2"),
        (tmp_path / "nowhere.npz", "nowhere.npz' does not exist"),
        (tmp_path / "broken.npz", "train.init_from: .*broken.npz cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            begin(config_of(init_from=str(source)))
    with pytest.raises(UserError, match="train.init_vocab is 'old', but has to be ext"):
        TrainConfig(init_vocab="old")


def test_a_new_run_begins_with_the_whole_state_of_another(toy, tmp_path, capsys):
    objective = toy.bigram(noise=0.3).objective
    held_out = toy.held_out_batches()

    def run(path, resume_from="", **sections):
        config = toy.config(log={"every": 1, "example_ids": True}, **sections)
        data = toy.training_batches(8)
        pieces = (
            objective,
            show_text(config, toy.tokenizer),
            data,
            held_out,
            resume_from,
        )
        fit(config, path, *pieces)
        rows = (path / "metrics.jsonl").read_text().splitlines()
        lines = (path / "examples-0.jsonl").read_text().splitlines()
        losses = [json.loads(row)["train/loss"] for row in rows]
        return losses, [json.loads(line) for line in lines]

    straight, ids = run(tmp_path / "first")
    assert [row["step"] for row in ids] == list(range(1, 13))
    source = f"{tmp_path / 'first'}@10"
    branched, later = run(tmp_path / "second", source)
    assert branched == straight[10:] and later == ids[10:]
    assert checkpoint_steps(tmp_path / "second") == [10, 12]
    # Its own checkpoints come first; the flag may stay in the command.
    assert run(tmp_path / "second", source)[1] == later
    assert f"continuing {tmp_path / 'first'} at step 10" in capsys.readouterr().err
    with pytest.raises(UserError, match="train.seed is 0 there and 1 here"):
        run(tmp_path / "third", source, train={"seed": 1})
    assert not (tmp_path / "third").exists()


def test_lists_of_examples_are_rewound(toy, tmp_path):
    config = toy.config(train={"steps": 6}, log={"example_ids": True})
    objective, path = toy.bigram().objective, tmp_path / "run"
    go = lambda: fit(
        config,
        path,
        objective,
        show_text(config, toy.tokenizer),
        toy.training_batches(8),
        toy.held_out_batches(),
    )
    go()
    expected = (path / "examples-0.jsonl").read_text()
    before = "".join(line + "\n" for line in expected.splitlines()[:5])
    # As if killed while writing, and as another process once wrote.
    (path / "examples-0.jsonl").write_text(expected + '{"step": 7, "i')
    (path / "examples-1.jsonl").write_text(expected)
    (path / "summary.json").unlink()
    (path / "checkpoints" / "6" / "_CHECKPOINT_METADATA").unlink()
    go()  # from step 5
    assert (path / "examples-0.jsonl").read_text() == expected
    assert (path / "examples-1.jsonl").read_text() == before
