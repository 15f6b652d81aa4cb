"""What the model of a run thinks about held-out text, token by token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax import models
from ebt_jax.data import pipeline, tokenizers
from ebt_jax.evaluation.analysis import (
    Slice,
    Trace,
    landscape_slice,
    trace,
    trace_feed_forward,
)
from ebt_jax.interfaces import Denoiser, EnergyModel, FeedForward, Recurrent
from ebt_jax.refine import make_schedule
from ebt_jax.thinking import Thinking
from ebt_jax.training import checkpoint
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective
from ebt_jax.training.resolve import resolve
from ebt_jax.training.workdir import read_config

TOP = 5  # candidates shown of each step
FIELDS = ("tokens", "targets", "weights")  # of a batch, by prediction
POINTS = 25  # rows and columns of a landscape
NAMES = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "": "∅"}


class Landscape(NamedTuple):
    """A slice of the energies of one prediction.

    Attributes:
      prediction: which one, a place in `Thoughts.target`.
      why: why this one is shown.
      plane: its slice; arrays without batch axes.
    """

    prediction: int
    why: str
    plane: Slice


class Policy(NamedTuple):
    """What predictions took, and what came of it, with a policy of thinking.

    Attributes:
      thinking: the policy.
      steps: int `[predictions]`, refinement steps.
      gradients: int `[predictions]`, evaluations of an energy and its gradient.
      nll: `[predictions]`, nats.
    """

    thinking: Thinking
    steps: np.ndarray
    gradients: np.ndarray
    nll: np.ndarray


class Thoughts(NamedTuple):
    """What a model predicts for held-out tokens.

    Attributes:
      step: of the checkpoint.
      trained_steps: refinement steps in training; 0 of a feed-forward model.
      target: int `[predictions]`, the tokens that are predicted, in the text's order.
      before: int `[predictions]`, the token before each.
      starts: bool `[predictions]`, whether a sequence starts with this one.
      scored: bool `[predictions]`.
      trace: NumPy arrays `[steps, predictions, ...]`.
      labels: how tokens are shown; those of `target`, `before` and `trace.top`.
      texts: the same, as they stand in a text.
      landscapes: of a few predictions.
      policy: None where none was asked for, or the model does not think.
    """

    step: int
    trained_steps: int
    target: np.ndarray
    before: np.ndarray
    starts: np.ndarray
    scored: np.ndarray
    trace: Trace
    labels: dict[int, str]
    texts: dict[int, str]
    landscapes: list[Landscape]
    policy: Policy | None


def think_over(
    path: Path, *, tokens: int, steps: int = 0, thinking: Thinking | None = None
) -> Thoughts:
    """Runs the newest checkpoint of a run over the first tokens that it has held out.

    Args:
      path: of the workdir.
      tokens: how many predictions, at least 1.
      steps: refinement steps, 0 for `eval.curve_steps` or that of `thinking`; at least
        the trained number is taken.
      thinking: a policy to compare with fixed numbers of steps.

    Raises:
      UserError: if there is no checkpoint, data or tokenizer, or they do not fit.
    """
    config = read_config(path)
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = resolve(config, tokenizer.vocab_size)
    step = checkpoint.pick_step(path)
    params = checkpoint.load_params(path, step, config)
    batch = held_out_batch(config, tokenizer, tokens)
    model = models.build(config.model)
    assert not isinstance(model, Denoiser | Recurrent)  # of text there are none
    key = jax.random.key(config.eval.seed)
    top = min(TOP, config.model.vocab_size)
    if isinstance(model, FeedForward):
        trained, landscapes, policy = 0, [], None
        look = functools.partial(trace_feed_forward, model, top=top)
        seen = _flat(jax.jit(look)(params, batch), tokens)
    else:
        trained = config.eval.num_steps or int(make_schedule(config.refine).length)
        most = thinking.num_steps if thinking else 0
        steps = max(steps or max(config.eval.curve_steps, most), trained)
        look = functools.partial(trace, model, config.refine, num_steps=steps, top=top)
        seen = _flat(jax.jit(look)(params, batch, key), tokens)
        landscapes = _landscapes(
            model, config, params, batch, key, _interesting(seen, batch, trained)
        )
        policy = thinking and _with_policy(config, params, batch, key, thinking, tokens)
    flat = {name: np.asarray(batch[name]).reshape(-1)[:tokens] for name in FIELDS}
    shown = {*flat["targets"], *flat["tokens"], *seen.top.reshape(-1)}
    texts = {int(i): tokenizer.decode([int(i)]) for i in shown}
    length = batch["tokens"].shape[1]
    return Thoughts(
        step=step,
        trained_steps=trained,
        target=flat["targets"],
        before=flat["tokens"],
        starts=np.arange(len(flat["targets"])) % length == 0,
        scored=flat["weights"] > 0,
        trace=seen,
        labels={i: label(i, text) for i, text in texts.items()},
        texts=texts,
        landscapes=landscapes,
        policy=policy,
    )


def held_out_batch(
    config: Config, tokenizer: tokenizers.Tokenizer, tokens: int
) -> pipeline.Batch:
    """The first held-out sequences, as many as hold so many tokens.

    They are cut where that is enough: what is left is predicted as in the whole.
    """
    count = -(-tokens // config.data.context)
    batches = pipeline.held_out_batches(
        config.data, tokenizer, batch_size=count, sequences=count
    )
    batch = next(iter(batches))
    return {k: v[:, :tokens] if v.ndim > 1 else v for k, v in batch.items()}


def label(token: int, text: str) -> str:
    """How a token is shown by itself: what cannot be seen gets a sign."""
    if text in NAMES:
        return NAMES[text]
    if "\ufffd" in text or (len(text) == 1 and not text.isprintable()):
        return f"‹{token}›"  # a part of a character, or a control character
    return "".join(
        NAMES[c] if c in NAMES else c if c.isprintable() else "·" for c in text
    )


def token_kinds(texts: Sequence[str], before: Sequence[str]) -> list[str]:
    """What kind of token each is, to see what thinking is spent on.

    Args:
      texts: of the tokens.
      before: the text of the token before each.
    """
    return [_kind(text, previous) for text, previous in zip(texts, before, strict=True)]


def _kind(text: str, before: str) -> str:
    if "\ufffd" in text:
        return "part of a character"
    if not text.strip():
        return "white space"
    if any(c.isalpha() for c in text):
        inside = text[0].isalpha() and before[-1:].isalpha()
        return "inside a word" if inside else "start of a word"
    return "digits" if any(c.isdigit() for c in text) else "punctuation"


def _with_policy(
    config: Config,
    params: Any,
    batch: pipeline.Batch,
    key: jax.Array,
    thinking: Thinking,
    tokens: int,
) -> Policy:
    assess = build_objective(config).assess
    assert assess is not None  # an energy model thinks
    found = jax.jit(assess, static_argnums=3)(params, batch, key, thinking)
    flat = lambda array: _as_numpy(array).reshape(-1)[:tokens]
    return Policy(
        thinking=thinking,
        steps=flat(found["num_steps"]),
        gradients=flat(found["gradients"]),
        nll=flat(found["nll"][0]),
    )


def _as_numpy(array: jax.Array) -> np.ndarray:
    """An array for NumPy: of bfloat16 not all of its functions know."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32)
    return np.asarray(array)


def _flat(seen: Trace, tokens: int) -> Trace:
    """With one axis of predictions for `[batch, seq]`."""

    def reshape(array: jax.Array) -> np.ndarray:
        steps, batch, seq, *rest = array.shape
        return _as_numpy(array).reshape(steps, batch * seq, *rest)[:, :tokens]

    return jax.tree.map(reshape, seen)


def _interesting(
    seen: Trace, batch: pipeline.Batch, trained: int
) -> list[tuple[int, str]]:
    """Predictions of the first sequence that differ in how refinement goes."""
    length = min(batch["tokens"].shape[1], seen.nll.shape[1])
    places = np.flatnonzero(batch["weights"][0, :length] > 0)
    if not len(places):
        return []
    final, gain = seen.nll[trained], seen.nll[0] - seen.nll[trained]
    order = places[np.argsort(final[places], kind="stable")]
    chosen = {
        int(places[gain[places].argmax()]): "refinement helped it most",
        int(order[len(order) // 2]): "the median loss",
        int(order[-1]): "the largest loss",
    }
    return list(chosen.items())


def _landscapes(
    model: EnergyModel,
    config: Config,
    params: Any,
    batch: pipeline.Batch,
    key: jax.Array,
    chosen: list[tuple[int, str]],
) -> list[Landscape]:
    look = functools.partial(
        landscape_slice,
        model,
        config.refine,
        num_steps=config.eval.num_steps,
        points=POINTS,
    )
    first = {name: array[:1] for name, array in batch.items()}
    planes = jax.tree.map(_as_numpy, jax.jit(look)(params, first, key))

    def of(place: int) -> Slice:
        # `batch` and `seq` are the last axes but for those that end in (x, y).
        pairs = {"path": planes.path[:, 0, place], "target": planes.target[0, place]}
        alone = {
            name: array[..., 0, place]
            for name, array in planes._asdict().items()
            if name not in pairs
        }
        return Slice(**alone, **pairs)

    return [Landscape(place, why, of(place)) for place, why in chosen]
