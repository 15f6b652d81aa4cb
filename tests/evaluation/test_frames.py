"""Continued clips: what predictions from all frames so far make, one at a time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK

from ebt_jax.errors import UserError
from ebt_jax.evaluation.frames import continue_clips
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import RefineSetup
from ebt_jax.thinking import AS_TRAINED, Thinking
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective

CONTEXT, FRAME = 5, 6
MODELS = {
    "time_embed": {},
    "anchored": {"conditioning": "default", "candidate_input": "anchored"},
    "transformer_pp": {"kind": "transformer_pp"},
}
LANDSCAPES = {"time_embed": 2, "anchored": 1, "transformer_pp": 1}
STARTS = {"time_embed": "noise", "anchored": "most_recent", "transformer_pp": "noise"}


@functools.cache
def trained(name):
    """An objective and parameters all of which matter; noise enters its energy."""
    model = ModelConfig(
        **{
            "space": "video",
            "num_layers": 1,
            "num_heads": 2,
            "dim": 8,
            "frame_size": FRAME,
            "num_landscapes": LANDSCAPES[name],
            **MODELS[name],
        }
    )
    refine = RefineSetup(
        num_landscapes=LANDSCAPES[name],
        noise_std=0.3,
        step_size=1.0,
        initial_candidate=STARTS[name],
    )
    objective = build_objective(Config(model=model, refine=refine))
    rng = np.random.default_rng(0)
    draw = lambda s: 0.5 * rng.standard_normal(s.shape).astype(np.float32)
    params = jax.tree.map(draw, jax.eval_shape(objective.init, jax.random.key(0)))
    if name != "transformer_pp":
        params |= {"step_size": np.float32(1.0), "noise_std": np.float32(0.3)}
    return objective, params


def clips(count, frames, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, frames, FRAME)).astype(np.float32)


@functools.cache
def predict(name):
    jit = functools.partial(jax.jit, compiler_options=QUICK, static_argnums=3)
    return jit(trained(name)[0].predict)


def next_frame(name, shown, index, thinking, seed):
    """By encoding all there is; frames behind it are not seen."""
    width = max(CONTEXT, shown.shape[1])
    frames = np.zeros((len(shown), width, FRAME), np.float32)
    frames[:, : shown.shape[1]] = shown
    batch = {
        "frames": jnp.asarray(frames),
        "targets": jnp.zeros_like(frames),
        "weights": jnp.ones(frames.shape[:2]),
        "index": jnp.asarray(index),
    }
    key = jax.random.key(seed)
    made = predict(name)(trained(name)[1], batch, key, thinking)
    return np.asarray(made[:, shown.shape[1] - 1])


def uncached(name, shown, index, new_frames, thinking, seed):
    made = []
    for _ in range(new_frames):
        if shown.shape[1] > CONTEXT:
            shown = shown[:, (CONTEXT + 1) // 2 :]
        made.append(next_frame(name, shown, index, thinking, seed))
        shown = np.concatenate([shown, made[-1][:, None]], axis=1)
    return np.stack(made, axis=1)


def close(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual / scale, expected / scale, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_cached_frames_are_those_of_whole_clips(name):
    """Past a full context, too, which forgets its older half."""
    objective, params = trained(name)
    thinking = AS_TRAINED
    if name == "time_embed":
        thinking = Thinking(3, best_of=2)
    made = continue_clips(
        objective,
        params,
        clips(2, 3),
        context=CONTEXT,
        new_frames=6,
        thinking=thinking,
        samples=2,
        seed=3,
    )
    assert made.frames.shape == (4, 6, FRAME) and made.frames.dtype == np.float32
    shown = np.repeat(clips(2, 3), 2, axis=0)
    expected = uncached(name, shown, np.arange(4), 6, thinking, 3)
    close(made.frames, expected)
    steps = {"time_embed": 3, "anchored": 2, "transformer_pp": 0}[name]
    assert (made.effort.num_steps == steps).all()
    assert made.effort.num_steps.shape == (4, 6)
    differs = np.abs(made.frames[0] - made.frames[1]).max()
    assert differs == 0 if name == "transformer_pp" else differs > 1e-3


def test_what_a_clip_becomes_depends_on_its_number_and_not_on_the_others():
    objective, params = trained("time_embed")
    options = {"context": CONTEXT, "new_frames": 6}
    thinking = Thinking(3, best_of=2)
    made = continue_clips(objective, params, clips(4, 3), thinking=thinking, **options)
    order = [2, 0, 3, 1]
    again = continue_clips(
        objective,
        params,
        clips(4, 3)[order],
        indices=order,
        thinking=thinking,
        **options,
    )
    close(again.frames, made.frames[order])


def test_a_frame_stops_when_its_energy_does_not_fall():
    """Taken out of the work, with its noise, it is what it is alone."""
    thinking = Thinking(4, tolerance=0.05)
    objective, params = trained("anchored")
    options = {"context": CONTEXT, "new_frames": 2}
    made = continue_clips(objective, params, clips(3, 3), thinking=thinking, **options)
    expected = uncached("anchored", clips(3, 3), np.arange(3), 2, thinking, 0)
    close(made.frames, expected)
    assert len({*made.effort.num_steps.reshape(-1).tolist()}) > 1, made.effort


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((2, 6), {}, "clips have shape (2, 6), but have to be [clips, frames, frame"),
        ((2, 0, 6), {}, "clips have shape (2, 0, 6), but have to be [clips, frames,"),
        ((1, 6, 6), {}, "clips have 6 frames, but the model's context has 5; give the"),
        ((1, 2, 6), {"new_frames": 0}, "new_frames is 0, but has to be at least 1"),
        ((1, 2, 6), {"samples": 0}, "samples is 0, but has to be at least 1"),
        ((1, 2, 6), {"thinking": Thinking(best_of=0)}, "best_of is 0, but has to be"),
    ],
)
def test_what_cannot_be_continued_is_refused(shape, change, message):
    objective, params = trained("anchored")
    options = {"context": CONTEXT, "new_frames": 2, **change}
    with pytest.raises(UserError, match="^" + re.escape(message)):
        continue_clips(objective, params, np.zeros(shape), **options)
