"""Runs golden cases of the published code: `python tests/golden.py FILE.npz ...`

Each case holds flags, parameters, inputs and draws of one run of the published PyTorch
code, with its outputs and gradients. Prints each array's largest error relative to the
array's largest magnitude; exits 1 if one is above 1e-4 or was not compared.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ebt_jax import interop, models
from ebt_jax.errors import UserError
from ebt_jax.objectives import MIN_STEP_SIZE, Draws, refined
from ebt_jax.refine import Schedule, make_schedule, refine
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective

TOLERANCE = 1e-4


def run_case(path: str | pathlib.Path) -> dict[str, float]:
    """Relative error of every output and gradient; infinite where not compared."""
    with np.load(path) as file:
        case = dict(file)
    flags = json.loads(str(case.pop("config")))
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in case.items():
        kind, _, rest = name.partition("/")
        groups.setdefault(kind, {})[rest] = array
    if "mode" in flags:
        raise UserError(f"golden mode={flags['mode']!r} is not supported")
    config = interop.config_from_reference(flags)
    params = interop.from_reference(groups["param"], config)
    phase = flags["phase"] if "phase" in flags else "train"
    run = transformer_pp if config.model.kind == "transformer_pp" else ebt
    outputs, gradients = run(config, params, groups["in"], groups["out"], phase)
    gradients = interop.to_reference(gradients, config)
    errors = {}
    for name, expected in groups["out"].items():
        errors[f"out/{name}"] = _error(outputs.get(name), expected)
    for name, expected in groups.get("grad", {}).items():
        errors[f"grad/{name}"] = _error(gradients.get(name), expected)
    return errors


def text_batch(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Token 0 is padding: it is not scored."""
    tokens = jnp.asarray(inputs["tokens"], jnp.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (tokens[:, 1:] != 0).astype(jnp.float32),
    }


def transformer_pp(config: Config, params, inputs, outputs, phase):
    """Logits, loss and gradients of the baseline."""
    del outputs, phase
    objective = build_objective(config)
    batch = text_batch(inputs) | {"index": jnp.arange(len(inputs["tokens"]))}
    key = jax.random.key(0)
    value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
    (loss, _), gradients = value_and_grad(params, batch, key)
    logits = objective.predict(params, batch, key, 0)
    return {"logits": logits, "loss": loss}, gradients


def ebt(config: Config, params, inputs, outputs, phase):
    """Every step's energies and states, all losses, and the gradients."""
    setup, model = config.refine, models.build(config.model)
    batch = text_batch(inputs)
    steps = int(outputs["num_refinement_steps"])
    if phase != "train":
        setup = dataclasses.replace(setup, step_size_jitter=1.0)
        if steps != make_schedule(setup).length:
            raise UserError(f"{phase} took {steps} steps in the published code")
    init = jnp.asarray(inputs["init"])
    if "replay_init_last_rows" in inputs:
        rows = inputs["replay_init_last_rows"]
        init = init.at[-len(rows) :].set(rows)
    landscape = jnp.minimum(jnp.arange(steps), setup.num_landscapes - 1)
    draws = Draws(
        candidate=init,
        noise=_optional(inputs, "langevin_normal"),
        jitter=_optional(inputs, "step_size_uniform"),
        schedule=Schedule(landscape, steps),
    )
    objective = refined(model, setup, config.objective)
    (loss, metrics), gradients = jax.value_and_grad(objective.loss, has_aux=True)(
        params, batch, jax.random.key(0), draws
    )
    trajectory = refine(
        model.energy,
        params,
        model.encode_context(params, batch),
        init,
        step_size=jnp.maximum(params["step_size"], MIN_STEP_SIZE),
        noise_std=params["noise_std"] if setup.noise_std else None,
        config=setup,
        noise=draws.noise,
        jitter=draws.jitter,
        schedule=draws.schedule,
        normalize=model.normalize,
        observe=lambda step: (step.energy, step.after),
    ).trajectory
    energies, predictions = trajectory
    return {
        "loss": loss,
        "energies": energies,
        "predictions": predictions,
        "num_refinement_steps": steps,
        "initial_loss": metrics["nll_first_step"],
        "final_step_loss": metrics["nll"],
        "contrastive_loss": metrics["contrastive"] if "contrastive" in metrics else 0,
        "initial_final_pred_energies_gap": energies[0].mean() - energies[-1].mean(),
        "perplexity": jnp.exp(metrics["nll"]),
    }, gradients


def _optional(inputs: dict[str, np.ndarray], name: str) -> jax.Array | None:
    return jnp.asarray(inputs[name]) if name in inputs else None


def _error(actual, expected: np.ndarray) -> float:
    if actual is None or np.shape(actual) != expected.shape:
        return float("inf")
    scale = np.abs(expected).max()
    difference = np.abs(np.asarray(actual, np.float64) - expected).max()
    error = difference / scale if scale > 0 else difference
    return float(error) if np.isfinite(error) else float("inf")


def main(paths: list[str]) -> int:
    """Runs the cases and prints a line for each array."""
    if not paths:
        print("usage: python tests/golden.py FILE.npz ...", file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        try:
            errors = run_case(path)
        except (UserError, OSError) as error:
            print(f"{path}: error: {error}")
            failed += 1
            continue
        worst = max(errors.values())
        bad = worst > TOLERANCE
        failed += bad
        print(f"{'FAIL' if bad else 'ok  '} {path}: worst {worst:.1e}")
        for name, error in errors.items():
            mark = "  <-- above 1e-4" if error > TOLERANCE else ""
            print(f"    {name}: {error:.1e}{mark}")
    print(f"{len(paths) - failed} of {len(paths)} cases within {TOLERANCE}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
