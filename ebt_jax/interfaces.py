"""The contracts between models, losses and everything that uses them.

A model is an `EnergyModel` or a `FeedForward`; `objectives.py` makes an `Objective` of
it, a few pure functions. The train loop, the evaluation and the text generator
see nothing else, so a feed-forward baseline is just another objective.

Batches are dicts of arrays. Every modality has `weights` `[*batch]`, float, 0 where a
prediction does not count (padding), and, for evaluation, `index` `[batch]`, an integer
that names each sequence. `[*batch]` is `[batch, seq]` of text and video, where each
place of a sequence is predicted, and `[batch]` of images and boards. What else there
is, the model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from ebt_jax.refine import EnergyFn, Perturbing, PyTree, Schedule
from ebt_jax.thinking import Thinking, Thought

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Objective(NamedTuple):
    """What the rest of the system knows of a model.

    Attributes:
      init: `(key) -> params`, a plain nested dict of arrays.
      loss: `(params, batch, key) -> (loss, metrics)`. `metrics["tokens"]` is the sum of
        weights that the loss is a mean over.
      evaluate: `(params, batch, key, num_steps) -> arrays`, per prediction and step:
        `nll` (the loss, whatever its `measure`), and what `EnergyModel.measures` gives,
        `[steps, *batch]`, and where there is an energy, `energy`
        `[steps + 1, *batch]` (its last row: that of the final candidate in the last
        landscape) and `gradient_norm` `[steps, *batch]`. num_steps 0 is the trained
        number. A draw depends on (key, `batch["index"]`, position) alone.
      predict: `(params, batch, key, thinking) -> candidate` after the last step; for
        text logits `[batch, seq, vocab]`. Draws as in `evaluate`. A feed-forward model
        does not think, whatever it is told.
      decoder: continues sequences; None where the model has no `caching`.
      assess: `(params, batch, key, thinking) -> arrays` of the predictions of
        `predict`: `nll` `[1, *batch]`, `energy` `[2, *batch]`, as first and last of
        `evaluate`, and `[*batch]` what `Thought.effort` holds and `spread`. None of a
        model that does not think.
      replaying: the loss with a replay buffer; None where there is none.
      measure: what the loss of a prediction is: `nll` in nats, or `smooth_l1`.
    """

    init: Callable[[jax.Array], PyTree]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    evaluate: Callable[[PyTree, Batch, jax.Array, int], dict[str, jax.Array]]
    predict: Callable[[PyTree, Batch, jax.Array, Thinking], PyTree]
    decoder: Decoder | None = None
    assess: Callable[..., dict[str, jax.Array]] | None = None
    replaying: Replaying | None = None
    measure: str = "nll"


class Replaying(NamedTuple):
    """How a loss takes in what earlier batches led to. See `replay.py`.

    Attributes:
      empty: `() -> replay`, a buffer that holds nothing, `[capacity, ...]`.
      loss: `(params, batch, key, replay) -> (loss, (metrics, replay))`. As
        `Objective.loss`, with replayed sequences besides those of the batch:
        `metrics["tokens"]` counts theirs, too, `metrics["replayed"]` is the share of
        those. The batch is in the new buffer.
    """

    empty: Callable[[], PyTree]
    loss: Callable[..., tuple[jax.Array, tuple[Metrics, PyTree]]]


class Decoder(NamedTuple):
    """How sequences are continued without encoding them anew for each token.

    Attributes:
      prepare: `(params) -> params` for the functions below, which take them with and
        without; they read prepared ones faster. Not to be called under `jit`.
      prefill: `(params, tokens, lengths) -> cache`; tokens `[batch, capacity]`, or
        frames `[batch, capacity, frame_size]`, with anything behind the end of a
        sequence, lengths `[batch]`, at least 1.
      predict: `(params, cache, index, key, thinking) -> Thought`, what follows each
        sequence: candidates `[batch, ...]`, for text logits `[batch, vocab]`, and what
        they took. The same as `Objective.predict` gives at the last
        position of a sequence named `index`.
      append: `(params, cache, tokens) -> cache`, one token `[batch]`, or frame, more. A
        sequence that outgrows the capacity is lost; no other is.
      rewinding: how tokens are taken back; None where they cannot be.
      predict_at: `(params, cache, marks, index, key, thinking) -> Thought`, what
        follows each sequence at each of several marks, `[batch, marks, ...]`, found
        together. The same as `predict` gives, there. None of a model that predicts in
        one pass.
    """

    prepare: Callable[[PyTree], PyTree]
    prefill: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    predict: Callable[[PyTree, PyTree, jax.Array, jax.Array, Thinking], Thought]
    append: Callable[[PyTree, PyTree, jax.Array], PyTree]
    rewinding: Rewinding | None = None
    predict_at: Callable[..., Thought] | None = None


class EnergyModel(NamedTuple):
    """An energy network and the space it predicts in.

    Attributes:
      init: `(key) -> params`.
      encode_context: `(params, batch) -> context`, all that no candidate can change.
      energy: see `refine.EnergyFn`.
      initial_candidate: `(key, batch) -> candidate` of standard normals; `key` may be
        an array of keys, one for each prediction.
      normalize: stored candidate -> energy space.
      loss: `(candidate, batch, smoothing) -> [*batch]`, of a stored candidate.
      target: `(batch) -> candidate`, the right answer in energy space.
      caching: continues sequences; None where predictions are not one after another.
      categorical: a faster way to train; None where candidates are not distributions.
      measure: see `Objective`.
      measures: `(candidate, batch) -> {name: [*batch]}`, what is evaluated besides the
        loss, such as `mse`; None for nothing.
      starts: initial candidates `(batch) -> candidate` by the names that
        `RefineSetup.initial_candidate` has for them, besides noise and zeros.
      corrupt: `(keys, batch, training) -> batch` with what a prediction draws of its
        input, such as a noised image; keys `[*batch]`, training a bool. None where
        inputs are taken as they are.
      perturbing: how noise enters; None where it is added to candidates.
      guess: `(params, context) -> candidate`, a stored one that the context alone
        suggests: the amortised start, which is trained beside the refinement; None
        where there is none.
    """

    init: Callable[[jax.Array], PyTree]
    encode_context: Callable[[PyTree, Batch], PyTree]
    energy: EnergyFn
    initial_candidate: Callable[[jax.Array, Batch], PyTree]
    normalize: Callable[[PyTree], PyTree]
    loss: Callable[..., jax.Array]
    target: Callable[[Batch], PyTree]
    caching: Caching | None = None
    categorical: Categorical | None = None
    measure: str = "nll"
    measures: Callable[[PyTree, Batch], dict[str, jax.Array]] | None = None
    starts: Mapping[str, Callable[[Batch], PyTree]] = MappingProxyType({})
    corrupt: Callable[[jax.Array, Batch, bool], Batch] | None = None
    perturbing: Perturbing | None = None
    guess: Callable[[PyTree, PyTree], PyTree] | None = None


class FeedForward(NamedTuple):
    """A model that predicts in one pass.

    Attributes:
      init: `(key) -> params`.
      predict: `(params, batch) -> candidate`; for text logits `[batch, seq, vocab]`.
      loss: `(candidate, batch, smoothing) -> [*batch]`.
      caching: continues sequences; None where predictions are not one after another.
      measure: see `Objective`.
      measures: as in `EnergyModel`.
    """

    init: Callable[[jax.Array], PyTree]
    predict: Callable[[PyTree, Batch], PyTree]
    loss: Callable[..., jax.Array]
    caching: Caching | None = None
    measure: str = "nll"
    measures: Callable[[PyTree, Batch], dict[str, jax.Array]] | None = None


class Recurrent(NamedTuple):
    """A model that predicts several times, each time from what it made before.

    Attributes:
      init: `(key) -> params`.
      iterate: `(params, batch, count) -> candidates`, those of each pass, stacked
        `[count, ...]`.
      iterations: passes in training.
      loss: `(candidate, batch, smoothing) -> [*batch]`.
      measure: see `Objective`.
      measures: as in `EnergyModel`.
    """

    init: Callable[[jax.Array], PyTree]
    iterate: Callable[[PyTree, Batch, int], PyTree]
    iterations: int
    loss: Callable[..., jax.Array]
    measure: str = "nll"
    measures: Callable[[PyTree, Batch], dict[str, jax.Array]] | None = None


class Denoiser(NamedTuple):
    """A diffusion model: predicts the noise in images, and a variance.

    Attributes:
      init: `(key) -> params`.
      condition: `(params, batch) -> [rows, dim]`, what it is told besides the time;
        None for nothing.
      unconditional: `(params) -> [1, dim]` in place of that where nothing is to be
        told; None where it is always told.
      predict: `(params, condition, noised, timestep) -> [batch, ..., 2 channels]`, see
        `diffusion.Predict`.
      loss: `(candidate, batch, smoothing) -> [batch]`, of a denoised image.
      measure: see `Objective`.
      measures: as in `EnergyModel`.
      corrupt: as in `EnergyModel`: gives a batch its `noised` images.
    """

    init: Callable[[jax.Array], PyTree]
    condition: Callable[[PyTree, Batch], jax.Array | None]
    unconditional: Callable[[PyTree], jax.Array] | None
    predict: Callable[..., jax.Array]
    loss: Callable[..., jax.Array]
    measure: str
    measures: Callable[[PyTree, Batch], dict[str, jax.Array]]
    corrupt: Callable[[jax.Array, Batch, bool], Batch]


class Rewinding(NamedTuple):
    """How sequences that have grown are cut off again.

    Attributes:
      mark: `(cache) -> mark`, where the sequences end now; a small tree of arrays.
      restore: `(cache, mark) -> cache`, whose sequences end at a mark of it again.
      lengths: `(marks) -> [marks, batch]`, tokens of the sequences at stacked marks.
      newest: `(marks) -> batch`, as `Caching.newest` at each of several marks,
        `[batch, marks, ...]`.
      following: `(params, cache, marks) ->` the context of a candidate for what follows
        at each of several marks `[marks, ...]`; the candidates are `[batch, marks,
        ...]`. None of a model that predicts in one pass.
    """

    mark: Callable[[PyTree], PyTree]
    restore: Callable[[PyTree, PyTree], PyTree]
    lengths: Callable[[PyTree], jax.Array]
    newest: Callable[[PyTree], Batch]
    following: Callable[[PyTree, PyTree, PyTree], PyTree] | None


class Caching(NamedTuple):
    """Sequences that are encoded once and grow by a token, or a frame, at a time.

    Attributes:
      prepare: as in `Decoder`.
      prefill: as in `Decoder`.
      append: as in `Decoder`.
      following: `(params, cache) ->` what follows each sequence, `[batch, 1, ...]`: of
        an energy model the context of a candidate for it, of a feed-forward model its
        prediction.
      length: `(cache) -> [batch]`, tokens of each sequence.
      newest: `(cache) -> batch` of the last token or frame of each sequence,
        `[batch, 1, ...]`: what initial candidates are made of.
      rewinding: as in `Decoder`.
      rows: `(context, index) ->` the context of some of the sequences `[some]`, of one
        that `following` gave, its own or that of `rewinding`; None where candidates
        have none, or it cannot be taken apart.
    """

    prepare: Callable[[PyTree], PyTree]
    prefill: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    append: Callable[[PyTree, PyTree, jax.Array], PyTree]
    following: Callable[[PyTree, PyTree], PyTree]
    length: Callable[[PyTree], jax.Array]
    newest: Callable[[PyTree], Batch]
    rewinding: Rewinding | None = None
    rows: Callable[[PyTree, jax.Array], PyTree] | None = None


class Categorical(NamedTuple):
    """An energy network whose candidates are distributions over a vocabulary.

    Attributes:
      tables: names of the parameters that have a row for each entry of the vocabulary;
        no other function than `table` and `token_table` uses them.
      table: `(params) -> [vocab, dim]`, W.
      token_table: `(params) -> [vocab, dim]`, whose rows contexts are encoded from.
      prepare: `(params) -> params`, another arrangement of those that are not tables,
        for `encode` and `energy`.
      dtype: of products and activations; None for that of the parameters.
      encode: `(params, embedded, batch, landscape) -> past`, float arrays, what
        candidates see in one landscape.
      energy: `(params, past, batch, index, x, landscape) -> [batch, seq]`, energies by
        embedded candidates x `[batch, seq, dim]`, that stand at `index` `[seq]` of
        their sequences.
      num_contexts: 1 where the past is the same in all landscapes, else their number.
    """

    tables: tuple[str, ...]
    table: Callable[[PyTree], jax.Array]
    token_table: Callable[[PyTree], jax.Array]
    prepare: Callable[[PyTree], PyTree]
    dtype: Any
    encode: Callable[..., PyTree]
    energy: Callable[..., jax.Array]
    num_contexts: int


class Draws(NamedTuple):
    """What training draws, given instead of drawn where it is not None.

    Attributes:
      candidate: the initial candidate.
      noise: standard normals `[num_steps, *batch, ...]`.
      jitter: standard uniforms `[*batch]`.
      schedule: number of steps and landscapes.
    """

    candidate: PyTree | None = None
    noise: PyTree | None = None
    jitter: jax.Array | None = None
    schedule: Schedule | None = None
