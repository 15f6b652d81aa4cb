"""Images as a space, and the objectives of both models of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK

from ebt_jax import models
from ebt_jax.diffusion import make_process
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.diffusion_objective import guided
from ebt_jax.errors import UserError
from ebt_jax.models import image
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.replay import ReplayConfig
from ebt_jax.thinking import AS_TRAINED, Thinking
from ebt_jax.training.config import Config, MeshConfig
from ebt_jax.training.objective import batch_shapes, build_objective

jit = functools.partial(jax.jit, compiler_options=QUICK)
MODEL = ModelConfig(
    space="image", image_size=4, channels=2, num_layers=1, num_heads=2, dim=8, patch=2
)
EBT = Config(
    model=MODEL,
    refine=RefineSetup(
        num_steps=2, num_landscapes=1, step_size=3.0, initial_candidate="noised"
    ),
    diffusion=DiffusionConfig(timesteps=50, noise_level=0.2),
)
DIT = Config(
    model=dataclasses.replace(MODEL, kind="dit", condition="caption", condition_size=3),
    diffusion=DiffusionConfig(timesteps=50, noise_level=0.2, sampling_steps=2),
)
BATCH = {
    "image": jax.random.uniform(jax.random.key(1), (4, 4, 4, 2), minval=-1.0),
    "caption": jax.random.normal(jax.random.key(2), (4, 3)),
    "weights": jnp.array([1.0, 1.0, 0.0, 1.0]),
    "index": jnp.array([5, 6, 7, 8]),
}
KEY = jax.random.key(0)
PIXELS = {"image": jnp.zeros((1, 1, 1, 4))}


def params_of(objective):
    """Parameters of which none is 0, as after training."""
    shapes = jax.eval_shape(objective.init, KEY)
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), jnp.float32)
    params = jax.tree.map(draw, shapes)
    return {k: jnp.abs(p) if k == "step_size" else p for k, p in params.items()}


def rows(batch, which):
    return {name: values[jnp.array(which)] for name, values in batch.items()}


def test_smooth_l1_is_a_square_up_to_one_and_a_line_beyond():
    candidate = jnp.array([0.0, 0.5, -1.0, 3.0]).reshape(1, 1, 1, 4)
    expected = np.mean([0, 0.125, 0.5, 2.5])
    np.testing.assert_allclose(image.smooth_l1(candidate, PIXELS), [expected])
    found = image.distances(candidate, PIXELS)
    np.testing.assert_allclose(found["mse"], [np.mean([0, 0.25, 1, 9])])
    np.testing.assert_allclose(found["l1"], [np.mean([0, 0.5, 1, 3])])


def steps_of(noised, level):
    """By how much one image was noised, whatever noise was drawn: none is in it."""
    process = make_process(level.schedule, level.timesteps)
    share = float(noised.std() ** 2)
    return int(np.abs(1 - process.kept - share).argmin())


def test_images_are_noised_up_to_their_step():
    big = dataclasses.replace(MODEL, image_size=64)
    batch = {"image": jnp.zeros((3, 64, 64, 2))}
    keys = jax.random.split(KEY, 3)
    corrupt = lambda level, training: image.noising(big, level)(keys, batch, training)
    fixed = DiffusionConfig(timesteps=40, noise_level=0.25)
    for training in (True, False):
        noised = corrupt(fixed, training)["noised"]
        assert all(abs(steps_of(x, fixed) - 9) <= 1 for x in noised)
        assert len(np.unique(noised)) > 0.9 * noised.size
    some = dataclasses.replace(fixed, random_level=True)
    levels = [steps_of(x, some) for x in corrupt(some, True)["noised"]]
    assert len(set(levels)) > 1 and max(levels) <= 10
    assert all(abs(steps_of(x, some) - 9) <= 1 for x in corrupt(some, False)["noised"])
    given = {"noised": jnp.ones(3)}
    assert image.noising(big, fixed)(keys, given, True) is given


def test_a_whole_schedule_leaves_nothing_of_the_image():
    whole = DiffusionConfig(noise_level=1.0)
    keys = jax.random.split(KEY, 4)
    with_image = image.noising(MODEL, whole)(keys, BATCH, False)["noised"]
    without = image.noising(MODEL, whole)(keys, {}, False)["noised"]
    np.testing.assert_array_equal(with_image, without)


@pytest.mark.parametrize("config", [EBT, DIT], ids=["ebt", "dit"])
def test_evaluation_does_not_depend_on_the_batch(config):
    objective = build_objective(config)
    params = params_of(objective)
    evaluate = jit(objective.evaluate, static_argnums=3)
    whole = evaluate(params, BATCH, KEY, 0)
    part = evaluate(params, rows(BATCH, [3, 1]), KEY, 0)
    assert {"nll", "mse", "l1"} <= set(whole)
    for name, values in whole.items():
        expected = values[:, jnp.array([3, 1])]
        np.testing.assert_allclose(part[name], expected, rtol=2e-5, atol=2e-6)
    predict = jit(objective.predict, static_argnums=3)
    predicted = predict(params, BATCH, KEY, AS_TRAINED)
    np.testing.assert_allclose(
        image.smooth_l1(predicted, BATCH), whole["nll"][-1], rtol=1e-5
    )


@pytest.fixture(scope="module")
def ebt():
    objective = build_objective(EBT)
    return objective, params_of(objective)


def test_refinement_starts_from_the_noised_image(ebt):
    objective, params = ebt
    params = {**params, "energy": {"kernel": jnp.zeros((8, 1))}}
    noised = jnp.full((4, 4, 4, 2), 0.25)
    predict = jit(objective.predict, static_argnums=3)
    found = predict(params, {**BATCH, "noised": noised}, KEY, AS_TRAINED)
    np.testing.assert_array_equal(found, noised)
    assert objective.measure == "smooth_l1"


def test_policies_of_thinking_reach_images(ebt):
    objective, params = ebt
    policy = Thinking(num_steps=3, tolerance=0.0, best_of=2)

    @jit
    def assessed(params):
        longer = objective.evaluate(params, BATCH, KEY, 3)
        return longer, objective.assess(params, BATCH, KEY, policy)

    longer, found = assessed(params)
    assert found["nll"].shape == (1, 4) and found["mse"].shape == (1, 4)
    assert (found["num_steps"] <= 3).all() and longer["nll"].shape == (3, 4)
    np.testing.assert_allclose(found["spread"], 0, atol=1e-6)  # one start, no noise
    np.testing.assert_allclose(found["energy"][0], longer["energy"][0], rtol=1e-5)


def test_the_loss_of_images_is_a_mean_over_those_that_count(ebt):
    objective, params = ebt
    batch = {**BATCH, "noised": 0.5 * BATCH["image"]}
    loss = jit(objective.loss)
    total, metrics = loss(params, batch, KEY)
    assert metrics["tokens"] == 3
    other = {**batch, "image": batch["image"].at[2].set(9.0)}
    np.testing.assert_allclose(loss(params, other, KEY)[0], total, rtol=1e-6)
    nothing = {**batch, "weights": jnp.zeros(4)}
    assert loss(params, nothing, KEY)[0] == 0


def test_images_can_be_replayed():
    config = dataclasses.replace(EBT, replay=ReplayConfig(capacity=4, fraction=0.5))
    objective = build_objective(config)
    assert objective.replaying is not None
    batch = {name: BATCH[name] for name in ("image", "weights", "index")}

    @jit
    def twice(params):
        replay = objective.replaying.empty()
        for step in (0, 1):
            key = jax.random.fold_in(KEY, step)
            loss, (metrics, replay) = objective.replaying.loss(
                params, batch, key, replay
            )
        return loss, metrics

    loss, metrics = twice(params_of(objective))
    assert jnp.isfinite(loss) and metrics["replayed"] > 0


@pytest.fixture(scope="module")
def dit():
    objective = build_objective(DIT)
    return objective, params_of(objective)


def test_the_loss_of_dit_depends_on_what_is_drawn_for_each_place(dit):
    objective, params = dit
    loss = jit(objective.loss)
    total, metrics = loss(params, BATCH, KEY)
    np.testing.assert_allclose(metrics["noise_mse"] + metrics["bound"], total)
    assert metrics["tokens"] == 3
    parts = []
    for row in (0, 1, 3):  # devices that hold one image each draw the same
        part = {**rows(BATCH, [row]), "row": jnp.array([row])}
        parts.append(loss(params, part, KEY)[0])
    np.testing.assert_allclose(np.mean(parts), total, rtol=1e-5)
    assert loss(params, BATCH, jax.random.key(1))[0] != total


def test_captions_are_left_out_as_often_as_told():
    gradient_of = lambda dropout: jit(
        jax.grad(
            lambda params: build_objective(
                dataclasses.replace(
                    DIT,
                    diffusion=dataclasses.replace(
                        DIT.diffusion, caption_dropout=dropout
                    ),
                )
            ).loss(params, BATCH, KEY)[0]
        )
    )(params_of(build_objective(DIT)))
    always, hardly = gradient_of(0.999999), gradient_of(1e-9)
    assert not always["caption_embed"]["kernel"].any()
    assert always["condition"]["embedding"].any()
    assert hardly["caption_embed"]["kernel"].any()
    assert not hardly["condition"]["embedding"].any()


def test_guidance_weighs_what_a_caption_changes(dit):
    _, params = dit
    model = models.build(DIT.model, DIT.diffusion)

    @jit
    def outputs(params):
        condition = model.condition(params, BATCH)
        nothing = jnp.broadcast_to(model.unconditional(params), condition.shape)
        ask = lambda told, weight: guided(model, params, told, weight)(
            BATCH["image"], jnp.array([3])
        )
        return [ask(condition, w) for w in (1.0, 0.0, 2.0)], ask(nothing, 1.0)

    (told, zero, twice), untold = outputs(params)
    noise = lambda output: output[..., :2]
    np.testing.assert_allclose(noise(zero), noise(untold), rtol=1e-4, atol=1e-5)
    expected = 2 * noise(told) - noise(untold)
    np.testing.assert_allclose(noise(twice), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(twice[..., 2:], told[..., 2:], rtol=1e-4, atol=1e-5)


def test_repeats_denoise_what_was_denoised(dit):
    objective, params = dit
    diffusion = dataclasses.replace(DIT.diffusion, repeats=2)
    repeated = build_objective(dataclasses.replace(DIT, diffusion=diffusion))

    @jit
    def both(params):
        once = objective.predict(params, BATCH, KEY, AS_TRAINED)
        again = {**BATCH, "noised": once}
        twice = objective.predict(params, again, KEY, AS_TRAINED)
        return twice, repeated.predict(params, BATCH, KEY, AS_TRAINED)

    expected, found = both(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_ddpm_draws_for_each_image(dit):
    _, params = dit
    diffusion = dataclasses.replace(DIT.diffusion, sampler="ddpm", clip=False)
    objective = build_objective(dataclasses.replace(DIT, diffusion=diffusion))
    predict = jit(lambda batch: objective.predict(params, batch, KEY, AS_TRAINED))
    batch = {**BATCH, "noised": jnp.zeros((4, 4, 4, 2))}
    found = predict(batch)
    other = predict({**batch, "index": jnp.array([5, 1, 2, 8])})
    np.testing.assert_allclose(other[0], found[0], rtol=1e-5, atol=1e-6)
    assert jnp.abs(other[1] - found[1]).max() > 1e-3


def test_more_passes_than_timesteps_are_refused(dit):
    objective, params = dit
    with pytest.raises(UserError, match="11 passes are asked for, but images are"):
        objective.predict(params, BATCH, KEY, Thinking(num_steps=11))


@pytest.mark.parametrize(
    "model, diffusion",
    [
        ({"condition": "none", "condition_size": 0}, {}),
        ({}, {"caption_dropout": 0.0}),
    ],
)
def test_guidance_needs_captions_that_are_left_out(model, diffusion):
    config = dataclasses.replace(
        DIT,
        model=dataclasses.replace(DIT.model, **model),
        diffusion=dataclasses.replace(DIT.diffusion, guidance=3.0, **diffusion),
    )
    with pytest.raises(UserError, match="diffusion.guidance is 3.0, but this model"):
        build_objective(config)


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"objective": ObjectiveConfig(label_smoothing=0.1)},
            "objective.label_smoothing is 0.1, but model.space is 'image'",
        ),
        ({"mesh": MeshConfig(seq=2)}, "mesh.seq is 2, but images are no sequences"),
        ({"replay": ReplayConfig(capacity=4, top_k=2)}, "replay.top_k is 2"),
        (
            {
                "refine": dataclasses.replace(
                    EBT.refine, initial_candidate="most_recent"
                )
            },
            "refine.initial_candidate is 'most_recent'",
        ),
    ],
)
def test_options_that_images_do_not_have(sections, message):
    with pytest.raises(UserError, match=message):
        build_objective(dataclasses.replace(EBT, **sections))


def test_shapes_of_a_batch():
    shapes = {name: s.shape for name, s in batch_shapes(DIT).items()}
    assert shapes == {
        "image": (16, 4, 4, 2),
        "weights": (16,),
        "caption": (16, 3),
        "index": (16,),
    }
    assert "caption" not in batch_shapes(EBT)
