"""Meta-losses: what is minimised with respect to the parameters.

An `Objective` is four pure functions. The train loop, the evaluation and the text
generator see nothing else, so a feed-forward baseline is just another objective.

Batches are dicts of arrays. Every modality has `weights` `[*batch]`, float, 0 where a
prediction does not count (padding), and, for evaluation, `index` `[batch]`, an integer
that names each sequence. What else there is, the model knows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebt_jax.randomness import fold_in, prediction_keys
from ebt_jax.refine import (
    EnergyFn,
    PyTree,
    RefineConfig,
    Schedule,
    Step,
    energy_and_norm,
    make_schedule,
    refine,
)

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

MIN_STEP_SIZE = 1e-4  # learnt step sizes are kept at or above this (published code)


@dataclasses.dataclass(frozen=True)
class RefineSetup(RefineConfig):
    """A refinement together with what it starts from and what of it is learnt."""

    step_size: float = 5.0  # initial step size (alpha)
    step_size_learnable: bool = True  # False: stays as it is
    noise_learnable: bool = False  # True: noise_std is the initial value of a parameter
    initial_candidate: str = "noise"  # noise | zeros
    initial_scale: float = 1.0  # standard deviation of the initial noise
    block: int = 0  # predictions trained on at a time; 0: 512 on a CPU, else all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step_size >= MIN_STEP_SIZE:
            raise ValueError(
                f"step_size is {self.step_size}, but has to be at least {MIN_STEP_SIZE}"
            )
        if self.initial_candidate not in ("noise", "zeros"):
            raise ValueError(
                f"initial_candidate is {self.initial_candidate!r}, but has to be one "
                "of noise, zeros"
            )
        if not self.initial_scale >= 0:
            raise ValueError(
                f"initial_scale is {self.initial_scale}, but cannot be negative"
            )
        if self.block < 0:
            raise ValueError(
                f"block is {self.block}, but has to be positive, or 0 for the default"
            )
        if self.noise_learnable and not self.noise_std:
            raise ValueError(
                "noise_learnable is True, but noise_std is 0; give its initial value"
            )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What of a refinement is scored, and how."""

    loss_steps: str = "all"  # all: mean over steps | last
    reconstruction_weight: float = 1.0  # weight of the refined candidate's loss
    label_smoothing: float = 0.0  # at the first step; falls to 0 at the last
    contrastive_weight: float = 0.0  # weight of E(target) against E(candidate)

    def __post_init__(self) -> None:
        if self.loss_steps not in ("all", "last"):
            raise ValueError(
                f"loss_steps is {self.loss_steps!r}, but has to be one of all, last"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but has to be in [0, 1)"
            )


class Decoder(NamedTuple):
    """How sequences are continued without encoding them anew for each token.

    Attributes:
      prefill: `(params, tokens, lengths) -> cache`; tokens `[batch, capacity]`, with
        anything behind the end of a sequence, lengths `[batch]`, at least 1.
      predict: `(params, cache, index, key, num_steps) -> candidate` `[batch, ...]` for
        what follows each sequence; for text logits `[batch, vocab]`. The same as
        `Objective.predict` gives at the last position of a sequence named `index`.
      append: `(params, cache, tokens) -> cache`, one token `[batch]` more. A sequence
        must not outgrow the capacity.
    """

    prefill: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    predict: Callable[[PyTree, PyTree, jax.Array, jax.Array, int], PyTree]
    append: Callable[[PyTree, PyTree, jax.Array], PyTree]


class Objective(NamedTuple):
    """What the rest of the system knows of a model.

    Attributes:
      init: `(key) -> params`, a plain nested dict of arrays.
      loss: `(params, batch, key) -> (loss, metrics)`. `metrics["tokens"]` is the sum of
        weights that the loss is a mean over.
      evaluate: `(params, batch, key, num_steps) -> arrays`, per prediction and step:
        `nll` `[steps, *batch]`, and where there is an energy, `energy`
        `[steps + 1, *batch]` (its last row: that of the final candidate in the last
        landscape) and `gradient_norm` `[steps, *batch]`. num_steps 0 is the trained
        number. A draw depends on (key, `batch["index"]`, position) alone.
      predict: `(params, batch, key, num_steps) -> candidate` after the last step; for
        text logits `[batch, seq, vocab]`. Draws as in `evaluate`.
      decoder: continues sequences; None where the model has no `caching`.
    """

    init: Callable[[jax.Array], PyTree]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    evaluate: Callable[[PyTree, Batch, jax.Array, int], dict[str, jax.Array]]
    predict: Callable[[PyTree, Batch, jax.Array, int], PyTree]
    decoder: Decoder | None = None


class Caching(NamedTuple):
    """Sequences that are encoded once and grow by a token at a time.

    Attributes:
      prefill: as in `Decoder`.
      append: as in `Decoder`.
      following: `(params, cache) ->` what follows each sequence, `[batch, 1, ...]`: of
        an energy model the context of a candidate for it, of a feed-forward model its
        prediction.
      length: `(cache) -> [batch]`, tokens of each sequence.
    """

    prefill: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    append: Callable[[PyTree, PyTree, jax.Array], PyTree]
    following: Callable[[PyTree, PyTree], PyTree]
    length: Callable[[PyTree], jax.Array]


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
    """

    init: Callable[[jax.Array], PyTree]
    encode_context: Callable[[PyTree, Batch], PyTree]
    energy: EnergyFn
    initial_candidate: Callable[[jax.Array, Batch], PyTree]
    normalize: Callable[[PyTree], PyTree]
    loss: Callable[..., jax.Array]
    target: Callable[[Batch], PyTree]
    caching: Caching | None = None


class FeedForward(NamedTuple):
    """A model that predicts in one pass.

    Attributes:
      init: `(key) -> params`.
      predict: `(params, batch) -> candidate`; for text logits `[batch, seq, vocab]`.
      loss: `(candidate, batch, smoothing) -> [*batch]`.
      caching: continues sequences; None where predictions are not one after another.
    """

    init: Callable[[jax.Array], PyTree]
    predict: Callable[[PyTree, Batch], PyTree]
    loss: Callable[..., jax.Array]
    caching: Caching | None = None


def refined(
    model: EnergyModel, setup: RefineSetup, config: ObjectiveConfig
) -> Objective:
    """The loss of refined candidates (paper, algorithm 1), with its options.

    Parameters are the model's, `step_size` and `noise_std`. A learnt step size is kept
    at or above 1e-4. Label smoothing at step i of N is s (N-1-i) / (N-1). The
    contrastive term is the cross-entropy of [-E(target), -E(candidate before the last
    update)] with label 0, in the last landscape.
    """

    def init(key: jax.Array) -> PyTree:
        return {
            **model.init(key),
            "step_size": jnp.float32(setup.step_size),
            "noise_std": jnp.float32(setup.noise_std),
        }

    def sizes(params: PyTree) -> dict[str, Any]:
        step_size = jnp.maximum(params["step_size"], MIN_STEP_SIZE)
        noise_std = params["noise_std"] if setup.noise_std else None
        if not setup.step_size_learnable:
            step_size = jax.lax.stop_gradient(step_size)
        if not setup.noise_learnable:
            noise_std = jax.lax.stop_gradient(noise_std)
        return {"step_size": step_size, "noise_std": noise_std}

    def initial(key: jax.Array, batch: Batch) -> PyTree:
        candidate = model.initial_candidate(key, batch)
        scale = setup.initial_scale if setup.initial_candidate == "noise" else 0.0
        return jax.tree.map(lambda z: scale * z, candidate)

    def loss(
        params: PyTree, batch: Batch, key: jax.Array, draws: Draws | None = None
    ) -> tuple[jax.Array, Metrics]:
        draws = Draws() if draws is None else draws
        initial_key, schedule_key, refine_key = jax.random.split(key, 3)
        candidate, schedule = draws.candidate, draws.schedule
        if candidate is None:
            candidate = initial(initial_key, batch)
        if schedule is None:
            schedule = make_schedule(setup, schedule_key)
        context = model.encode_context(params, batch)
        tokens = jnp.maximum(batch["weights"].sum(), 1.0)

        def mean(values: jax.Array) -> jax.Array:
            return (values * batch["weights"]).sum() / tokens

        def observe(step: Step) -> dict[str, jax.Array]:
            smoothing = _falling(config.label_smoothing, step.index, schedule.length)
            seen = jax.tree.map(mean, energy_and_norm(step))
            seen["loss"] = mean(model.loss(step.after, batch, smoothing))
            if config.contrastive_weight:
                seen["live_energy"] = step.energy
            return seen

        _, steps = refine(
            model.energy,
            params,
            context,
            candidate,
            config=setup,
            key=refine_key,
            normalize=model.normalize,
            observe=observe,
            schedule=schedule,
            noise=draws.noise,
            jitter=draws.jitter,
            **sizes(params),
        )
        last = schedule.length - 1
        losses = steps["loss"]
        total = losses[last]
        if config.loss_steps == "all":
            total = losses.sum() / schedule.length
        total = config.reconstruction_weight * total
        metrics = {
            "nll": losses[last],
            "nll_first_step": losses[0],
            "energy_first": steps["energy"][0],
            "energy_last": steps["energy"][last],
            "energy_gap": steps["energy"][0] - steps["energy"][last],
            "gradient_norm_first": steps["gradient_norm"][0],
            "gradient_norm_last": steps["gradient_norm"][last],
            "refine_steps": jnp.float32(schedule.length),
            "step_size": params["step_size"],
            "tokens": batch["weights"].sum(),
        }
        if setup.noise_std:
            metrics["noise_std"] = params["noise_std"]
        if config.contrastive_weight:
            target = model.energy(
                params, context, model.target(batch), schedule.landscape[last]
            )
            margin = target - steps["live_energy"][last]
            metrics["contrastive"] = mean(jax.nn.softplus(margin))
            total = total + config.contrastive_weight * metrics["contrastive"]
        return total, {"loss": total, **metrics}

    def think(params, context, batch, positions, key, num_steps, observe):
        """Refines as in evaluation: nothing depends on how a batch is laid out."""
        config = dataclasses.replace(
            setup,
            num_steps=num_steps or make_schedule(setup).length,
            min_steps=0,
            final_landscape_only=True,
            step_size_jitter=1.0,
            backprop="per_step",
        )
        keys = prediction_keys(key, batch["index"], positions)
        return refine(
            model.energy,
            params,
            context,
            initial(fold_in(keys, 0), batch),
            config=config,
            key=fold_in(keys, 1),
            normalize=model.normalize,
            observe=observe,
            **sizes(params),
        )

    def think_batch(params, batch, key, num_steps, observe):
        context = model.encode_context(params, batch)
        positions = jnp.arange(batch["weights"].shape[1])
        return context, think(
            params, context, batch, positions, key, num_steps, observe
        )

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        def observe(step: Step) -> dict[str, jax.Array]:
            return {**energy_and_norm(step), "nll": model.loss(step.after, batch)}

        context, result = think_batch(params, batch, key, num_steps, observe)
        final = model.energy(
            params,
            context,
            model.normalize(result.candidate),
            jnp.int32(setup.num_landscapes - 1),
        )
        energy = jnp.concatenate([result.trajectory["energy"], final[None]])
        return {**result.trajectory, "energy": energy}

    def predict(params: PyTree, batch: Batch, key: jax.Array, num_steps: int) -> PyTree:
        _, result = think_batch(params, batch, key, num_steps, _nothing)
        return result.candidate

    def predict_next(
        caching: Caching,
        params: PyTree,
        cache: PyTree,
        index: jax.Array,
        key: jax.Array,
        num_steps: int,
    ) -> PyTree:
        context = caching.following(params, cache)
        last = caching.length(cache)[:, None] - 1
        batch = {"index": index, "tokens": last}
        result = think(params, context, batch, last, key, num_steps, _nothing)
        return jax.tree.map(lambda z: z[:, 0], result.candidate)

    decoder = _decoder(model.caching, predict_next)
    return Objective(init, loss, evaluate, predict, decoder)


def feed_forward(model: FeedForward, config: ObjectiveConfig) -> Objective:
    """The loss of a model that predicts in one pass, such as Transformer++."""

    def loss(params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key  # nothing is drawn
        losses = model.loss(model.predict(params, batch), batch, config.label_smoothing)
        tokens = batch["weights"].sum()
        mean = (losses * batch["weights"]).sum() / jnp.maximum(tokens, 1.0)
        return mean, {"loss": mean, "nll": mean, "tokens": tokens}

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        del key, num_steps  # one pass, nothing drawn
        return {"nll": model.loss(model.predict(params, batch), batch)[None]}

    def predict(params: PyTree, batch: Batch, key: jax.Array, num_steps: int) -> PyTree:
        del key, num_steps
        return model.predict(params, batch)

    def predict_next(
        caching: Caching,
        params: PyTree,
        cache: PyTree,
        index: jax.Array,
        key: jax.Array,
        num_steps: int,
    ) -> PyTree:
        del index, key, num_steps
        return jax.tree.map(lambda y: y[:, 0], caching.following(params, cache))

    decoder = _decoder(model.caching, predict_next)
    return Objective(model.init, loss, evaluate, predict, decoder)


def _decoder(
    caching: Caching | None, predict_next: Callable[..., PyTree]
) -> Decoder | None:
    if caching is None:
        return None
    predict = functools.partial(predict_next, caching)
    return Decoder(caching.prefill, predict, caching.append)


def _nothing(step: Step) -> None:
    """Observes nothing."""


def _falling(start: float, index: jax.Array, length: int | jax.Array) -> Any:
    """start (N-1-i) / (N-1), and 0 where N is 1."""
    if not start:
        return 0.0
    span = jnp.maximum(length - 1, 1)
    return start * jnp.maximum(length - 1 - index, 0) / span
