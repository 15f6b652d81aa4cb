"""Golden cases of image models: what `golden.py` compares of them.

Arrays of a case are NCHW, ours NHWC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ebt_jax import models
from ebt_jax.diffusion import denoise, losses, make_process, q_sample, spaced
from ebt_jax.diffusion_objective import guided
from ebt_jax.interfaces import Denoiser, Draws, EnergyModel
from ebt_jax.objective_config import MIN_STEP_SIZE
from ebt_jax.objectives import refined
from ebt_jax.refine import Schedule, refine
from ebt_jax.training.config import Config

Arrays = dict[str, Any]
Program = Callable[[Any, Arrays], tuple[Arrays, Any]]


def refined_image(config: Config, steps: int) -> Program:
    """Every step's energies and states, all losses, and the gradients."""
    setup, model = config.refine, models.build(config.model, config.diffusion)
    assert isinstance(model, EnergyModel)
    landscape = jnp.minimum(jnp.arange(steps), setup.num_landscapes - 1)
    objective = refined(model, setup, config.objective)
    process = make_process(config.diffusion.schedule, config.diffusion.timesteps)

    def program(params: Any, inputs: Arrays) -> tuple[Arrays, Any]:
        image = last(inputs["target"])
        rows = len(image)
        batch = {"image": image, "weights": jnp.ones(rows), "index": jnp.arange(rows)}
        if "caption" in inputs:
            batch["caption"] = inputs["caption"]
            start = last(inputs["init"])
        else:
            noise = last(inputs["forward_noise"])
            start = q_sample(process, image, jnp.asarray(inputs["timestep"]), noise)
        draws = Draws(
            candidate=start,
            noise=last(inputs["langevin_normal"])
            if "langevin_normal" in inputs
            else None,
            jitter=inputs.get("step_size_uniform"),
            schedule=Schedule(landscape, steps),
        )
        value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, metrics), gradients = value_and_grad(
            params, batch, jax.random.key(0), draws
        )
        final, (energies, predictions) = refine(
            model.energy,
            params,
            model.encode_context(params, batch),
            start,
            step_size=jnp.maximum(params["step_size"], MIN_STEP_SIZE),
            noise_std=params["noise_std"] if setup.noise_std else None,
            config=setup,
            noise=draws.noise,
            jitter=draws.jitter,
            schedule=draws.schedule,
            observe=lambda step: (step.energy, step.after),
        )
        assert model.measures is not None
        return {
            "loss": loss,
            "energies": energies,
            "predictions": first(predictions),
            "num_refinement_steps": steps,
            "initial_loss": metrics["smooth_l1_first_step"],
            "final_step_loss": metrics["smooth_l1"],
            "l1_loss": model.measures(final, batch)["l1"].mean(),
            "initial_final_pred_energies_gap": (energies[0] - energies[-1]).mean(),
        }, gradients

    return program


def diffused_image(config: Config) -> Program:
    """The loss at given timesteps, its gradients, and ten DDIM passes."""
    model = models.build(config.model, config.diffusion)
    assert isinstance(model, Denoiser)
    process = make_process(config.diffusion.schedule, config.diffusion.timesteps)

    def program(params: Any, inputs: Arrays) -> tuple[Arrays, Any]:
        image, noise = last(inputs["target"]), last(inputs["noise"])
        step = jnp.asarray(inputs["timestep"])
        noised = q_sample(process, image, step, noise)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            output = model.predict(params, None, noised, step)
            squared, bound = losses(process, output, image, noised, step, noise)
            return (squared + bound).mean(), (squared.mean(), bound.mean())

        (total, (squared, bound)), gradients = jax.value_and_grad(loss, has_aux=True)(
            params
        )
        ten = denoise(
            spaced(process, 10, 10),
            guided(model, params, None, 1.0),
            last(inputs["noised_t99"]),
            clip=config.diffusion.clip,
        )
        return {
            "model_output": first(model.predict(params, None, image, step)),
            "loss": total,
            "vb_loss": bound,
            "mse": squared,
            "ddim_from_t9": first(ten),
        }, gradients

    return program


def last(array: Any) -> jax.Array:
    """`[..., channels, rows, columns]` with channels last."""
    return jnp.moveaxis(jnp.asarray(array), -3, -1)


def first(array: jax.Array) -> jax.Array:
    """The inverse of `last`."""
    return jnp.moveaxis(array, -1, -3)
