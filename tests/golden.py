"""Runs golden cases of the published code: `python tests/golden.py FILE.npz ...`

Each case holds flags, parameters, inputs and draws of one run of the published PyTorch
code, with its outputs and gradients. Everything is computed in float32. Prints each
array's largest error relative to the array's largest magnitude; exits 1 if one is above
1e-4 or was not compared.

Beside an array above 1e-4 stands how far parameters and inputs that move by one unit in
the last place move it. Where that is further than the error, float32 does not determine
the array to 1e-4: sums that cancel, second steps of steep landscapes. It fails all the
same; tests/test_golden.py names those that are known.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from golden_image import diffused_image, refined_image

from ebt_jax import interop, models
from ebt_jax.errors import UserError
from ebt_jax.interfaces import Draws
from ebt_jax.objective_config import MIN_STEP_SIZE
from ebt_jax.objectives import refined
from ebt_jax.randomness import fold_in
from ebt_jax.refine import Schedule, make_schedule, refine
from ebt_jax.thinking import AS_TRAINED, Thinking, final_energy, think
from ebt_jax.training.config import Config
from ebt_jax.training.objective import build_objective

TOLERANCE = 1e-4
ULP = 2.0**-23  # relative distance of neighbouring float32 numbers
DRAWS = 8  # of perturbations by one ULP

Arrays = dict[str, Any]
Program = Callable[[Any, Arrays], tuple[Arrays, Any]]


class Comparison(NamedTuple):
    """Relative error of one array, and how far one ULP moves it (None: not needed)."""

    error: float
    spread: float | None = None

    @property
    def passed(self) -> bool:
        """Within 1e-4."""
        return self.error <= TOLERANCE


def run_case(path: str | pathlib.Path) -> dict[str, Comparison]:
    """Compares every output and gradient; an infinite error means not compared."""
    with np.load(path) as file:
        case = dict(file)
    flags = json.loads(str(case.pop("config")))
    mode = flags.pop("mode", "train")
    if mode not in ("train", "thinking"):
        raise UserError(f"golden mode={mode!r} is not supported")
    inference = {
        name: flags.pop(name) for name in list(flags) if name.startswith("infer_")
    }
    group = lambda kind: {
        name.removeprefix(kind): array
        for name, array in case.items()
        if name.startswith(kind)
    }
    inputs, expected = group("in/"), group("out/")
    if mode == "thinking":  # where candidates are on the simplex, whatever else is set
        flags["normalize_initial_condition"] = True
    if "caption" in inputs:
        flags["caption_size"] = inputs["caption"].shape[-1]
    config = interop.config_from_reference(flags)
    params = interop.from_reference(group("param/"), config)
    if mode == "thinking":
        program = thought(config, inference)
    elif config.model.kind == "transformer_pp":
        program = transformer_pp(config)
    elif config.model.kind == "dit":
        program = diffused_image(config)
    elif config.model.space == "image":
        program = refined_image(config, int(expected["num_refinement_steps"]))
    else:
        phase = flags["phase"] if "phase" in flags else "train"
        program = ebt(config, int(expected["num_refinement_steps"]), phase)
    program = jax.jit(program)

    def run(params: Any, inputs: Arrays) -> Arrays:
        outputs, gradients = program(params, inputs)
        named = {}
        if gradients is not None:
            named = interop.to_reference(gradients, config)
        return {
            **{f"out/{name}": np.asarray(array) for name, array in outputs.items()},
            **{f"grad/{name}": array for name, array in named.items()},
        }

    wanted = {k: v for k, v in case.items() if k.startswith(("out/", "grad/"))}
    actual = run(params, inputs)
    result = {
        name: Comparison(relative_error(actual.get(name), array))
        for name, array in wanted.items()
    }
    if all(comparison.passed for comparison in result.values()):
        return result
    rng = np.random.default_rng(0)
    moved = [run(*_perturb((params, inputs), rng)) for _ in range(DRAWS)]
    for name, comparison in result.items():
        if not comparison.passed and name in actual:
            spread = max(relative_error(m[name], actual[name]) for m in moved)
            result[name] = Comparison(comparison.error, spread)
    return result


def text_batch(tokens: Any) -> Arrays:
    """Token 0 is padding: it is not scored."""
    tokens = jnp.asarray(tokens, jnp.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (tokens[:, 1:] != 0).astype(jnp.float32),
        "index": jnp.arange(len(tokens)),
    }


def video_batch(latents: Any) -> Arrays:
    """The frames after them are the targets of all but the last."""
    latents = jnp.asarray(latents)
    return {
        "frames": latents[:, :-1],
        "targets": latents[:, 1:],
        "weights": jnp.ones((len(latents), latents.shape[1] - 1)),
        "index": jnp.arange(len(latents)),
    }


def sequence_batch(config: Config, inputs: Arrays) -> Arrays:
    """Tokens or frames, and what follows them."""
    if config.model.space == "video":
        return video_batch(inputs["latents"])
    return text_batch(inputs["tokens"])


def transformer_pp(config: Config) -> Program:
    """Predictions, loss and gradients of the baseline."""
    objective = build_objective(config)

    def program(params: Any, inputs: Arrays) -> tuple[Arrays, Any]:
        batch, key = sequence_batch(config, inputs), jax.random.key(0)
        value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, _), gradients = value_and_grad(params, batch, key)
        predicted = objective.predict(params, batch, key, AS_TRAINED)
        name = "predictions" if config.model.space == "video" else "logits"
        return {name: predicted, "loss": loss}, gradients

    return program


def ebt(config: Config, steps: int, phase: str) -> Program:
    """Every step's energies and states, all losses, and the gradients."""
    setup, model = config.refine, models.build(config.model)
    if phase != "train":
        setup = dataclasses.replace(setup, step_size_jitter=1.0)
        if steps != make_schedule(setup).length:
            raise UserError(f"{phase} took {steps} steps in the published code")
    landscape = jnp.minimum(jnp.arange(steps), setup.num_landscapes - 1)
    objective = refined(model, setup, config.objective)

    def program(params: Any, inputs: Arrays) -> tuple[Arrays, Any]:
        batch = sequence_batch(config, inputs)
        init = inputs["init"]
        if "replay_init_last_rows" in inputs:
            rows = inputs["replay_init_last_rows"]
            init = init.at[-len(rows) :].set(rows)
        draws = Draws(
            candidate=init,
            noise=inputs.get("langevin_normal"),
            jitter=inputs.get("step_size_uniform"),
            schedule=Schedule(landscape, steps),
        )
        value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
        (loss, metrics), gradients = value_and_grad(
            params, batch, jax.random.key(0), draws
        )
        _, (energies, predictions) = refine(
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
            perturbing=model.perturbing,
        )
        zero = jnp.float32(0)
        return {
            "loss": loss,
            "energies": energies,
            "predictions": predictions,
            "num_refinement_steps": steps,
            "initial_loss": metrics[f"{model.measure}_first_step"],
            "final_step_loss": metrics[model.measure],
            "contrastive_loss": metrics.get("contrastive", zero),
            "initial_final_pred_energies_gap": (energies[0] - energies[-1]).mean(),
            "perplexity": jnp.exp(metrics[model.measure]),
        }, gradients

    return program


def thought(config: Config, flags: Arrays) -> Program:
    """Energies of all candidates at every step, and the predictions that are taken.

    The published code starts from given candidates, those of a prediction in a row.
    """
    setup, model = config.refine, models.build(config.model)
    thinking = thinking_from_reference(flags, config)
    refinement = dataclasses.replace(
        setup,
        num_steps=thinking.num_steps * setup.num_landscapes
        if thinking.landscapes == "each"
        else thinking.num_steps,
        final_landscape_only=thinking.landscapes == "last",
    )

    def program(params: Any, inputs: Arrays) -> tuple[Arrays, Any]:
        tokens = jnp.asarray(inputs["tokens"], jnp.int32)
        samples = thinking.best_of
        starts = inputs["init"].reshape(len(tokens), samples, *inputs["init"].shape[1:])
        context = model.encode_context(params, {"tokens": tokens})
        shared = {"step_size": params["step_size"], "normalize": model.normalize}
        # Keys stand for themselves here: the n-th attempt is handed the n-th start.
        keys = jax.vmap(jax.random.key)(jnp.arange(tokens.size)).reshape(tokens.shape)
        others = [fold_in(keys, i) for i in range(2, samples + 1)]
        order = jnp.stack([fold_in(k, 0) for k in (keys, *others)])
        known = jax.random.key_data(order)

        def initial(attempt: jax.Array) -> jax.Array:
            same = known == jax.random.key_data(attempt)[None]
            return starts[:, jnp.argmax(same.all(axis=(1, 2, 3)))]

        prediction = think(
            model.energy,
            params,
            context,
            keys,
            initial=initial,
            thinking=thinking,
            config=setup,
            **shared,
        ).candidate
        factor = thinking.step_size or 1.0
        shared["step_size"] = factor * (params["step_size"] if factor <= 1 else 1.0)

        def follow(start: jax.Array) -> jax.Array:
            refined = refine(
                model.energy,
                params,
                context,
                start,
                config=refinement,
                observe=lambda step: step.energy,
                **shared,
            )
            final = final_energy(
                model.energy,
                params,
                context,
                refined.candidate,
                refinement,
                model.normalize,
            )
            return jnp.concatenate([refined.trajectory, final[None]])

        energies = jax.vmap(follow, in_axes=1, out_axes=2)(starts)
        energies = energies.reshape(len(energies), -1, tokens.shape[1])
        return {"energies": energies, "prediction": prediction}, None

    return program


def thinking_from_reference(flags: Arrays, config: Config) -> Thinking:
    """How the published code was told to think.

    Its number of steps is that of each landscape, or with `infer_steps_final_landscape`
    of the last one alone.
    """
    steps, last = flags["infer_ebt_num_steps"], config.refine.num_landscapes - 1
    only_last = flags["infer_steps_final_landscape"]
    if config.model.conditioning == "default":
        only_last, last = True, 0
    by = {"min": "energy", "max_gap": "drop"}[flags["infer_energy_sampling_technique"]]
    return Thinking(
        num_steps=steps + last if only_last else steps,
        best_of=flags["infer_generated_samples"],
        by=by,
        landscapes="last" if only_last else "each",
        step_size=float(flags["infer_ebt_override_alpha"]),
    )


def relative_error(actual: Any, expected: np.ndarray) -> float:
    """Largest difference over largest magnitude; infinite where not comparable."""
    if actual is None or np.shape(actual) != expected.shape:
        return float("inf")
    actual = np.asarray(actual, np.float64)
    finite = np.isfinite(expected)  # a perplexity may overflow, in both or in none
    if not np.array_equal(actual[~finite], expected[~finite]):
        return float("inf")
    scale = np.abs(expected[finite]).max(initial=0.0)
    difference = np.abs(actual[finite] - expected[finite]).max(initial=0.0)
    error = difference / scale if scale > 0 else difference
    return float(error) if np.isfinite(error) else float("inf")


def _perturb(tree: Any, rng: np.random.Generator) -> Any:
    def move(x: np.ndarray) -> np.ndarray:
        if not np.issubdtype(x.dtype, np.floating):
            return x
        noise = ULP * rng.standard_normal(x.shape)
        return (x * (1 + noise)).astype(x.dtype)

    return jax.tree.map(move, tree)


def main(paths: list[str]) -> int:
    """Runs the cases and prints a line for each array."""
    if not paths:
        print("usage: python tests/golden.py FILE.npz ...", file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        try:
            result = run_case(path)
        except (ValueError, OSError) as error:  # UserError is a ValueError
            print(f"FAIL {path}: {error}")
            failed += 1
            continue
        bad = not all(comparison.passed for comparison in result.values())
        failed += bad
        worst = max(comparison.error for comparison in result.values())
        print(f"{'FAIL' if bad else 'ok  '} {path}: worst {worst:.1e}")
        for name, (error, spread) in result.items():
            why = "" if spread is None else f"  one ULP moves it by {spread:.1e}"
            print(f"    {name}: {error:.1e}{why}")
    print(f"{len(paths) - failed} of {len(paths)} cases agree")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
