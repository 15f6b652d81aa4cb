"""The causal energy network: what an energy may depend on, and on nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QUICK, VOCAB, tiny

from ebt_jax.models.attention import Visible, rotation
from ebt_jax.models.blocks import Block, Norm
from ebt_jax.models.text import energy_model

BATCH, SEQ = 2, 5
LANDSCAPE = 1

CASES = {
    "default": {"conditioning": "default"},
    "time_embed": {"conditioning": "time_embed", "norm": "none"},
    "adaln": {"conditioning": "adaln", "norm": "layer", "activation": "gelu"},
    "tied": {"conditioning": "time_embed", "tied_embedding": True, "norm": "dyt"},
    "anchored": {
        "conditioning": "default",
        "candidate_input": "anchored",
        "activation": "relu",
    },
    "anchored adaln": {
        "conditioning": "adaln_zero",
        "candidate_input": "anchored",
        "activation": "elu",
        "ffn_multiplier": 2.0,
    },
    "trunk": {
        "conditioning": "default",
        "candidate_input": "anchored",
        "candidate_layers": 1,
    },
    "final": {"conditioning": "default", "candidate_input": "final"},
    "final, one block": {
        "conditioning": "default",
        "candidate_input": "final",
        "candidate_layers": 1,
    },
}


def lively(params):
    """Parameters without zeros and ones, so that nothing is hidden by them."""
    rng = np.random.default_rng(0)
    move = lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(move, params)


def make_batch(seed=0):
    tokens = np.random.default_rng(seed).integers(VOCAB, size=(BATCH, SEQ))
    return {"tokens": jnp.asarray(tokens, jnp.int32)}


def make_candidate(seed=1):
    logits = np.random.default_rng(seed).normal(size=(BATCH, SEQ, VOCAB))
    return jax.nn.softmax(jnp.asarray(logits, jnp.float32))


def program_of(config):
    """`(params, batch, candidate) -> (energies, inner gradients)`, compiled."""
    model = energy_model(config)

    @jax.jit
    def program(params, batch, candidate):
        def total(candidate):
            context = model.encode_context(params, batch)
            energy = model.energy(params, context, candidate, jnp.int32(LANDSCAPE))
            return energy.sum(), energy

        gradient, energy = jax.grad(total, has_aux=True)(candidate)
        return energy, gradient

    return program


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def case(request):
    config = tiny(**request.param)
    params = lively(jax.jit(energy_model(config).init)(jax.random.key(0)))
    return config, params, program_of(config)


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def one_at_a_time(config, params, tokens, candidate):
    """Energies by an ordinary causal transformer: for each candidate a sequence.

    The sequence of candidate j is [step token], tokens 0..j, candidate j; its energy is
    read off the last position. Nothing is shared, nothing is masked but the future.
    Where candidates start from a hidden state, their token's is added when the blocks
    of the candidates begin; of `final`, the one that those of a first pass end in.
    """
    embedded = params["embed"]["embedding"][tokens]
    table = params["embed"]["embedding"]
    if not config.tied_embedding:
        table = params["candidate_embed"]["kernel"]
    ends = candidate @ table
    first = config.layers - config.blocks_of_candidates  # block of the candidates
    if config.candidate_input == "anchored" and not first:
        ends = ends + embedded
    condition = None
    if "adaln" in config.conditioning:
        condition = params["step_embed"]["embedding"][LANDSCAPE]
    energies = []
    for j in range(tokens.shape[1]):
        parts = [embedded[:, : j + 1], ends[:, j : j + 1]]
        if config.conditioning == "time_embed":
            step = params["step_embed"]["embedding"][LANDSCAPE]
            parts.insert(0, jnp.tile(step, (len(tokens), 1, 1)))
        x = jnp.concatenate(parts, axis=1)
        places = jnp.arange(x.shape[1])
        turns, visible = (
            rotation(places, config.head_dim, x.dtype),
            Visible(places[None]),
        )
        block = lambda i, x, turns=turns, visible=visible: Block(config).apply(
            {"params": jax.tree.map(lambda w: w[i], params["blocks"])},
            x,
            turns,
            visible,
            condition,
        )
        hidden = x
        for i in range(config.layers):
            if i == first and config.candidate_input == "anchored" and first:
                x = x.at[:, -1].set(ends[:, j] + x[:, -2])
            if i < first:
                x, _ = block(i, x)
                continue
            if i == first and config.candidate_input == "final":
                for k in range(first, config.layers):
                    hidden, _ = block(k, x if k == first else hidden)
                x = x.at[:, -1].set(ends[:, j] + hidden[:, -2])
            x, _ = block(i, x)
        norm = Norm(config.norm, config.dyt_alpha)
        x = jnp.asarray(norm.apply({"params": params["final_norm"]}, x))[:, -1]
        if condition is not None:
            final = params["final_modulation"]
            parts = jax.nn.silu(condition) @ final["kernel"] + final["bias"]
            shift, scale = jnp.split(parts[None], 2, axis=1)
            x = x * (1 + scale) + shift
        energies.append(x @ params["energy"]["kernel"][:, 0])
    return jnp.stack(energies, axis=1)


def test_energies_are_one_finite_float32_number_for_each_prediction(case):
    _, params, program = case
    energy, gradient = program(params, make_batch(), make_candidate())
    assert energy.shape == (BATCH, SEQ) and energy.dtype == jnp.float32
    assert np.isfinite(energy).all() and np.isfinite(gradient).all()
    assert len(np.unique(energy)) == BATCH * SEQ
    assert (np.abs(gradient).sum(axis=-1) > 0).all()


def test_two_streams_equal_one_sequence_for_each_candidate(case):
    config, params, program = case
    batch, candidate = make_batch(), make_candidate()
    energy, _ = program(params, batch, candidate)
    naive = jax.jit(functools.partial(one_at_a_time, config), compiler_options=QUICK)
    close(energy, naive(params, batch["tokens"], candidate), 1e-4)


def test_an_energy_depends_on_its_own_candidate_alone(case):
    _, params, program = case
    batch, candidate = make_batch(), make_candidate()
    energy, gradient = program(params, batch, candidate)
    for b, j in np.ndindex(BATCH, SEQ):
        moved = candidate.at[b, j].set(jax.nn.one_hot(j, VOCAB))
        new_energy, new_gradient = program(params, batch, moved)
        others = np.ones((BATCH, SEQ), bool)
        others[b, j] = False
        close(new_energy[others], energy[others])
        close(new_gradient[others], gradient[others])
        assert abs(new_energy[b, j] - energy[b, j]) > 1e-4


def test_the_future_does_not_leak(case):
    """Token j moves no energy and no gradient of a candidate before j, or elsewhere."""
    _, params, program = case
    batch, candidate = make_batch(), make_candidate()
    energy, gradient = program(params, batch, candidate)
    for j in range(SEQ):
        other = (batch["tokens"][0, j] + 1) % VOCAB
        moved = {"tokens": batch["tokens"].at[0, j].set(other)}
        new_energy, new_gradient = program(params, moved, candidate)
        close(new_energy[0, :j], energy[0, :j])
        close(new_gradient[0, :j], gradient[0, :j])
        close(new_energy[1], energy[1])
        assert (np.abs(new_energy[0, j:] - energy[0, j:]) > 1e-6).all()


def test_packed_documents_are_scored_as_each_alone(case):
    """Alone: at the start of a row, followed by padding that nothing before it sees."""
    _, params, program = case
    rng = np.random.default_rng(3)
    packed = {
        "tokens": jnp.asarray(rng.integers(VOCAB, size=(BATCH, SEQ)), jnp.int32),
        "segments": jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 2, 2]]),
        "positions": jnp.array([[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]),
    }
    candidate = make_candidate()
    energy, gradient = program(params, packed, candidate)
    for row, start, end in ((0, 0, 2), (0, 2, 5), (1, 0, 3), (1, 3, 5)):
        to_front = lambda x, r=row, s=start: jnp.roll(x[r], -s, axis=0)[None]
        alone = {"tokens": jnp.tile(to_front(packed["tokens"]), (BATCH, 1))}
        moved = jnp.tile(to_front(candidate), (BATCH, 1, 1))
        expected = program(params, alone, moved)
        close(energy[row, start:end], expected[0][0, : end - start])
        close(gradient[row, start:end], expected[1][0, : end - start])


def test_one_document_per_row_is_the_plain_layout(case):
    _, params, program = case
    batch, candidate = make_batch(), make_candidate()
    whole = {
        **batch,
        "segments": jnp.ones((BATCH, SEQ), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(SEQ), (BATCH, SEQ)),
    }
    plain, packed = (program(params, b, candidate) for b in (batch, whole))
    close(packed[0], plain[0])
    close(packed[1], plain[1])
