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

from ebt_jax.categorical import Categorical, Plan, covers, falling, loss_and_gradient
from ebt_jax.meta_gradient import with_gradient
from ebt_jax.randomness import fold_in, prediction_keys, typed, uniform
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
from ebt_jax.thinking import Thinking, Thought, final_energy, think

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
      prepare: `(params) -> params` for the functions below, which take them with and
        without; they read prepared ones faster. Not to be called under `jit`.
      prefill: `(params, tokens, lengths) -> cache`; tokens `[batch, capacity]`, with
        anything behind the end of a sequence, lengths `[batch]`, at least 1.
      predict: `(params, cache, index, key, thinking) -> Thought`, what follows each
        sequence: candidates `[batch, ...]`, for text logits `[batch, vocab]`, and their
        refinement steps `[batch]`. The same as `Objective.predict` gives at the last
        position of a sequence named `index`.
      append: `(params, cache, tokens) -> cache`, one token `[batch]` more. A sequence
        that outgrows the capacity is lost; no other is.
    """

    prepare: Callable[[PyTree], PyTree]
    prefill: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    predict: Callable[[PyTree, PyTree, jax.Array, jax.Array, Thinking], Thought]
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
      predict: `(params, batch, key, thinking) -> candidate` after the last step; for
        text logits `[batch, seq, vocab]`. Draws as in `evaluate`. A feed-forward model
        does not think, whatever it is told.
      decoder: continues sequences; None where the model has no `caching`.
    """

    init: Callable[[jax.Array], PyTree]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    evaluate: Callable[[PyTree, Batch, jax.Array, int], dict[str, jax.Array]]
    predict: Callable[[PyTree, Batch, jax.Array, Thinking], PyTree]
    decoder: Decoder | None = None


class Caching(NamedTuple):
    """Sequences that are encoded once and grow by a token at a time.

    Attributes:
      prepare: as in `Decoder`.
      prefill: as in `Decoder`.
      append: as in `Decoder`.
      following: `(params, cache) ->` what follows each sequence, `[batch, 1, ...]`: of
        an energy model the context of a candidate for it, of a feed-forward model its
        prediction.
      length: `(cache) -> [batch]`, tokens of each sequence.
    """

    prepare: Callable[[PyTree], PyTree]
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
      categorical: a faster way to train; None where candidates are not distributions.
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
        schedule = draws.schedule
        if schedule is None:
            schedule = make_schedule(setup, fold_in(key, 0))
        keys = _training_keys(fold_in(key, 1), batch)
        if model.categorical is not None and covers(setup, config):
            total, steps = quickly(params, batch, keys, schedule, draws)
        else:
            total, steps = plainly(params, batch, keys, schedule, draws)
        last = schedule.length - 1
        losses, energies, norms = (
            steps[name] for name in ("loss", "energy", "gradient_norm")
        )
        metrics = {
            "loss": total,
            "nll": losses[last],
            "nll_first_step": losses[0],
            "energy_first": energies[0],
            "energy_last": energies[last],
            "energy_gap": energies[0] - energies[last],
            "gradient_norm_first": norms[0],
            "gradient_norm_last": norms[last],
            "refine_steps": jnp.float32(schedule.length),
            "step_size": params["step_size"],
            "tokens": batch["weights"].sum(),
        }
        if setup.noise_std:
            metrics["noise_std"] = params["noise_std"]
        if config.contrastive_weight:
            metrics["contrastive"] = steps["contrastive"]
        return total, metrics

    def plainly(
        params: PyTree, batch: Batch, keys: jax.Array, schedule: Schedule, draws: Draws
    ) -> tuple[jax.Array, Metrics]:
        """The loss and its parts at each step, by `refine`."""
        candidate = draws.candidate
        if candidate is None:
            candidate = initial(fold_in(keys, 0), batch)
        context = model.encode_context(params, batch)
        tokens = jnp.maximum(batch["weights"].sum(), 1.0)

        def mean(values: jax.Array) -> jax.Array:
            return (values * batch["weights"]).sum() / tokens

        def observe(step: Step) -> dict[str, jax.Array]:
            smoothing = falling(config.label_smoothing, step.index, schedule.length)
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
            key=fold_in(keys, 1),
            normalize=model.normalize,
            observe=observe,
            schedule=schedule,
            noise=draws.noise,
            jitter=draws.jitter,
            **sizes(params),
        )
        last = schedule.length - 1
        total = steps["loss"][last]
        if config.loss_steps == "all":
            total = steps["loss"].sum() / schedule.length
        total = config.reconstruction_weight * total
        if config.contrastive_weight:
            target = model.energy(
                params, context, model.target(batch), schedule.landscape[last]
            )
            margin = target - steps["live_energy"][last]
            steps["contrastive"] = mean(jax.nn.softplus(margin))
            total = total + config.contrastive_weight * steps["contrastive"]
        return total, steps

    def quickly(
        params: PyTree, batch: Batch, keys: jax.Array, schedule: Schedule, draws: Draws
    ) -> tuple[jax.Array, Metrics]:
        """The same from `categorical.py`, which finds the gradient as it goes."""
        categorical = model.categorical
        assert categorical is not None  # the caller has looked
        most, factor = setup.step_size_jitter, jnp.ones(keys.shape, jnp.float32)
        if most > 1:
            jitter = draws.jitter
            if jitter is None:
                jitter = uniform(fold_in(fold_in(keys, 1), 1), keys.shape, jnp.float32)
            factor = 1 / most + jitter * (most - 1 / most)

        def both(params: PyTree) -> Any:
            plan = Plan(
                keys=keys,
                schedule=schedule,
                factor=factor,
                candidate=draws.candidate,
                noise=draws.noise,
                **sizes(params),
            )
            result, gradient = loss_and_gradient(
                categorical, setup, config, params, batch, plan
            )
            slope = jax.grad(lambda params: sizes(params)["step_size"])(params)
            gradient["step_size"] *= slope["step_size"]
            return result, gradient

        return with_gradient(both, params)

    def evaluated(num_steps: int) -> RefineConfig:
        """Refinement as in evaluation: nothing depends on how a batch is laid out."""
        return dataclasses.replace(
            setup,
            num_steps=num_steps or make_schedule(setup).length,
            min_steps=0,
            final_landscape_only=True,
            step_size_jitter=1.0,
            backprop="per_step",
        )

    def evaluate(
        params: PyTree, batch: Batch, key: jax.Array, num_steps: int
    ) -> dict[str, jax.Array]:
        def observe(step: Step) -> dict[str, jax.Array]:
            return {**energy_and_norm(step), "nll": model.loss(step.after, batch)}

        context = model.encode_context(params, batch)
        keys = prediction_keys(key, batch["index"], _positions(batch))
        config = evaluated(num_steps)
        candidate, trajectory = refine(
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
        final = final_energy(
            model.energy, params, context, candidate, config, model.normalize
        )
        energy = jnp.concatenate([trajectory["energy"], final[None]])
        return {**trajectory, "energy": energy}

    def thought(
        params: PyTree, context: PyTree, batch: Batch, keys: jax.Array, how: Thinking
    ) -> Thought:
        """Starts and draws as `evaluate` does."""
        return think(
            model.energy,
            params,
            context,
            keys,
            initial=lambda keys: initial(keys, batch),
            thinking=how,
            config=evaluated(0),
            normalize=model.normalize,
            **sizes(params),
        )

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        context = model.encode_context(params, batch)
        keys = prediction_keys(key, batch["index"], _positions(batch))
        return thought(params, context, batch, keys, thinking).candidate

    def predict_next(
        caching: Caching,
        params: PyTree,
        cache: PyTree,
        index: jax.Array,
        key: jax.Array,
        thinking: Thinking,
    ) -> Thought:
        context = caching.following(params, cache)
        last = caching.length(cache)[:, None] - 1
        keys = prediction_keys(key, index, last)
        following = thought(params, context, {"tokens": last}, keys, thinking)
        return jax.tree.map(lambda x: x[:, 0], following)

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

    def predict(
        params: PyTree, batch: Batch, key: jax.Array, thinking: Thinking
    ) -> PyTree:
        del key, thinking
        return model.predict(params, batch)

    def predict_next(
        caching: Caching,
        params: PyTree,
        cache: PyTree,
        index: jax.Array,
        key: jax.Array,
        thinking: Thinking,
    ) -> Thought:
        del key, thinking
        predicted = jax.tree.map(lambda y: y[:, 0], caching.following(params, cache))
        return Thought(predicted, jnp.zeros(index.shape, jnp.int32))

    decoder = _decoder(model.caching, predict_next)
    return Objective(model.init, loss, evaluate, predict, decoder)


def _decoder(
    caching: Caching | None, predict_next: Callable[..., Thought]
) -> Decoder | None:
    if caching is None:
        return None
    predict = functools.partial(predict_next, caching)
    return Decoder(caching.prepare, caching.prefill, predict, caching.append)


def _training_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """A key for each prediction, by its place in the batch."""
    shape = batch["weights"].shape
    return jax.random.split(typed(key), shape)


def _positions(batch: Batch) -> jax.Array:
    """Places `[seq]` of a batch's predictions."""
    return jnp.arange(batch["weights"].shape[1])
