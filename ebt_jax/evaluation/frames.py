"""Video from a trained objective, one frame after the other.

Clips are encoded once, and each predicted frame is taken as the next one, in the loop
below, on the device. What one clip becomes does not depend on the others: its draws are
a function of (seed, its index, position).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax.errors import UserError
from ebt_jax.evaluation.decoding import decoder_of, encode
from ebt_jax.interfaces import Objective
from ebt_jax.refine import PyTree
from ebt_jax.thinking import AS_TRAINED, Effort, Thinking, check_thinking


class ContinuedClips(NamedTuple):
    """How clips go on; all continuations of the first clip, then of the second, ...

    Attributes:
      frames: the new ones, float32 `[clips * samples, new_frames, frame_size]`.
      effort: what each took, int32 `[clips * samples, new_frames]`; nothing for a
        feed-forward model.
    """

    frames: np.ndarray
    effort: Effort


def continue_clips(
    objective: Objective,
    params: PyTree,
    clips: np.ndarray,
    *,
    context: int,
    new_frames: int,
    thinking: Thinking = AS_TRAINED,
    samples: int = 1,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> ContinuedClips:
    """Continues clips by frames that are predicted from those before them.

    When the context is full, its older half is forgotten and the rest is encoded anew,
    at positions that start from 0 again.

    Args:
      objective: predicts frames `[batch, seq, frame_size]`.
      params: its parameters.
      clips: float32 `[clips, frames, frame_size]`, as the model was trained on them.
      context: frames that the model sees.
      new_frames: how many frames to add.
      thinking: how the prediction of each is refined.
      samples: continuations of each clip. They differ where refinement starts from
        noise or takes noise in.
      seed: of initial candidates and noise.
      indices: a number that names each clip; default 0, 1, ... The draws of its
        continuation m depend on number * samples + m and not on the rest of the batch.

    Raises:
      UserError: for clips without frames or longer than the context, or a setting out
        of its range.
    """
    clips = np.asarray(clips, np.float32)
    check_clips(clips, context, new_frames, samples)
    check_thinking(thinking)
    numbers = np.arange(len(clips)) if indices is None else np.asarray(indices)
    index = (numbers[:, None] * samples + np.arange(samples)).reshape(-1)
    params = decoder_of(objective).prepare(params)
    extend = functools.partial(
        extend_clips,
        params,
        index=index.astype(np.int32),
        key=jax.random.key(seed),
        objective=objective,
        context=context,
        thinking=thinking,
    )
    shown, copies, pieces, made = clips, samples, [], 0
    while made < new_frames:
        length = shown.shape[1]
        # The frame that follows a full context is predicted, but has no room in it.
        limit = min(new_frames - made, context - length + 1)
        lengths = np.full(len(shown), length, np.int32)
        cache = encode(params, shown, lengths, objective, copies, context)
        frames, effort = jax.device_get(extend(cache, limit=np.int32(limit)))
        frames, *effort = (x[:, :limit] for x in (frames, *effort))
        pieces.append((frames, *effort))
        made += limit
        shown = np.concatenate([np.repeat(shown, copies, axis=0), frames], axis=1)
        shown, copies = shown[:, (context + 1) // 2 :], 1
    whole: list[Any] = [np.concatenate(part, 1) for part in zip(*pieces, strict=True)]
    return ContinuedClips(whole[0], Effort(*whole[1:]))


@functools.partial(jax.jit, static_argnames=("objective", "context", "thinking"))
def extend_clips(
    params: PyTree,
    cache: PyTree,
    *,
    index: jax.Array,
    limit: jax.Array,
    key: jax.Array,
    objective: Objective,
    context: int,
    thinking: Thinking,
) -> tuple[jax.Array, Effort]:
    """Makes frames.

    Args:
      params: the parameters.
      cache: the encoded clips.
      index: what names each clip, `[batch]`.
      limit: how many frames to make of each, at most the context.
      key: the seed.
      objective: whose decoder predicts.
      context: capacity of the cache. The last frame made may be one too many for it.
      thinking: how to predict.

    Returns:
      Frames `[batch, context, frame_size]`, zeros behind the limit, and what each took,
      `[batch, context]`.
    """
    decoder = decoder_of(objective)

    def predict(cache: PyTree) -> PyTree:
        thought = decoder.predict(params, cache, index, key, thinking)
        return thought.candidate, thought.effort

    def body(made: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        cache, all_made = carry
        new = predict(cache)
        all_made = jax.tree.map(lambda x, n: x.at[:, made].set(n), all_made, new)
        return decoder.append(params, cache, new[0]), all_made

    def room(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((shape.shape[0], context, *shape.shape[1:]), shape.dtype)

    nothing = jax.tree.map(room, jax.eval_shape(predict, cache))
    return jax.lax.fori_loop(0, limit, body, (cache, nothing))[1]


def check_clips(clips: np.ndarray, context: int, new_frames: int, samples: int) -> None:
    """Refuses what cannot be continued; see `continue_clips`."""
    if clips.ndim != 3 or not clips.size:
        raise UserError(
            f"clips have shape {clips.shape}, but have to be [clips, frames, "
            "frame_size], at least one frame each"
        )
    if clips.shape[1] > context:
        raise UserError(
            f"clips have {clips.shape[1]} frames, but the model's context has "
            f"{context}; give the last {context} of them, or fewer"
        )
    for name, value in (("new_frames", new_frames), ("samples", samples)):
        if value < 1:
            raise UserError(f"{name} is {value}, but has to be at least 1")
