"""FLOPs of training and of thinking: by formula, and counted in the traced program.

With N the weights that every token meets, L layers of width D, a vocabulary of V and S
keys that a query is multiplied with, a pass through the blocks costs 2 N FLOPs per
token, its attention 4 L S D, and a product with the vocabulary matrix 2 V D. S is the
whole context, masked or not, or its blocks that attention does not pass over. Training
multiplies these:

====================================== ====== =========== ==========================
what                                   blocks attention   vocabulary
====================================== ====== =========== ==========================
Transformer++                          6 N    12 L S D    6 V D
a context that gets a gradient         6 N    12 L S D
another context                        2 N    4 L S D
a step, its gradient a constant        4 N    8 L S D     4 V D
a step that is differentiated          12 N   24 L S D    10 V D
====================================== ====== =========== ==========================

A step's own forward pass and inner gradient are the 4; to differentiate them takes the
forward pass and the gradient once more along a tangent, and the products with the
weights. Where the softmax of one step's result is the next step's candidate and both
are differentiated, one embedding and one product for the matrix's gradient serve both:
T steps need (6 T + 4) V D, not 10 T V D. Of a context's last block only keys and values
are needed, which come with the queries: M of its weights and its attention are not,
unless candidates start from the hidden state that it ends in. (Where blocks are scanned
it is computed whole.) Where candidates pass through K of L blocks alone, a step's N and
L are K / L of that.

Of video a token is a frame, V its numbers; to embed the context takes 4 V D more. Of
images a token is a patch, V its numbers, S their number; there is no context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.extend
from jax.interpreters import partial_eval

from ebt_jax.objective_config import RefineSetup
from ebt_jax.refine import PyTree
from ebt_jax.training.config import Config

# Parameters that grow with the vocabulary, a frame or a patch; they are not part of N.
VOCABULARY = (
    "embed",
    "candidate_embed",
    "output",
    "frame_embed",
    "frame_output",
    "patch_embed",
)


class Flops(NamedTuple):
    """FLOPs per token, frame or patch, by what they are spent on.

    Attributes:
      blocks: products with the blocks' weights.
      attention: scores, and sums of values.
      vocabulary: products with the vocabulary matrices.
    """

    blocks: float
    attention: float
    vocabulary: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def analytic_flops(config: Config, params: PyTree, num_steps: float = 0) -> Flops:
    """FLOPs of training per token, frame or patch that the mathematics needs.

    What a program recomputes to save memory is not counted; nor are the contrastive
    term and modulations, which see no token.

    Args:
      config: a resolved config.
      params: parameters, or their shapes.
      num_steps: refinement steps; 0 for the config's, or the mean of their number where
        it is drawn.
    """
    model = config.model
    contexts, candidates, vocabulary = multiples(config, num_steps)
    weights = count_token_weights(params)
    spared, layers = _spared(config, weights)
    met = model.blocks_of_candidates / model.layers
    passes = 2 * (contexts * layers + candidates * model.blocks_of_candidates)
    return Flops(
        contexts * (weights - spared) + candidates * weights * met,
        passes * _keys(config) * model.width,
        vocabulary * entries(config) * model.width,
    )


def entries(config: Config) -> int:
    """V: entries of a token's candidate, or a cell's, numbers in a frame or a patch."""
    model = config.model
    patch = model.patch * model.patch * model.channels
    return {
        "text": model.vocab_size,
        "video": model.frame_size,
        "image": patch,
        "board": model.vocab_size,
    }[model.space]


def tokens_per_sequence(config: Config) -> int:
    """Tokens or frames of a sequence, patches of an image, or cells of a board."""
    model = config.model
    if model.space == "board":
        return model.vocab_size**2
    if model.space != "image":
        return config.data.context
    return (model.image_size // model.patch) ** 2


def thinking_flops(
    config: Config, params: PyTree, gradients: float, energies: float
) -> Flops:
    """FLOPs of a prediction, by formula: its context's, and those of its candidates.

    In the letters of the module's docstring an energy takes 2 N + 4 L S D + 2 V D, with
    its gradient twice that, and a pass of Transformer++ as much as an energy.

    Args:
      config: a resolved config.
      params: parameters, or their shapes.
      gradients: evaluations of an energy and its gradient, see `thinking.Effort`.
      energies: evaluations of an energy alone.
    """
    model = config.model
    weights = count_token_weights(params)
    attention = _keys(config) * model.width
    passes, contexts = 2 * gradients + energies, 0
    if model.kind != "ebt":
        passes = model.iterations if model.kind == "recurrent" else 1.0
    elif model.space in ("image", "board"):
        contexts = 0
    elif model.conditioning == "default":
        contexts = 1
    else:
        contexts = config.refine.num_landscapes
    spared, layers = _spared(config, weights)
    met = model.blocks_of_candidates
    return Flops(
        2 * contexts * (weights - spared) + 2 * passes * weights * met / model.layers,
        4 * (contexts * layers + passes * met) * attention,
        2 * passes * entries(config) * model.width,
    )


def formula(config: Config) -> str:
    """The formula of `analytic_flops`, in the letters of the module's docstring."""
    contexts, candidates, vocabulary = (f"{m:g}" for m in multiples(config))
    twice = f"{2 * float(candidates):g}"
    if config.model.kind != "ebt" or config.model.space in ("image", "board"):
        return f"{candidates} N + {twice} L S D + {vocabulary} V D"
    shared = f"{2 * float(contexts):g}"
    final = config.model.candidate_input == "final"
    whole, blocks = ("N", "L") if final else ("(N - M)", "(L - 1)")
    few = config.model.blocks_of_candidates < config.model.layers
    part, met = (" K / L", "K") if few else ("", "L")
    return (
        f"{contexts} {whole} + {candidates} N{part} + ({shared} {blocks} + "
        f"{twice} {met}) S D + {vocabulary} V D"
    )


def _spared(config: Config, weights: int) -> tuple[float, int]:
    """M: weights of a context's last block that are not needed; blocks that attend."""
    model = config.model
    if model.candidate_input == "final":
        return 0.0, model.layers
    return weights / model.layers - 3 * model.width**2, model.layers - 1


def multiples(config: Config, num_steps: float = 0) -> tuple[float, float, float]:
    """How many N of contexts, N of candidates and V D `analytic_flops` finds."""
    embedding = 4.0 if config.model.space == "video" else 0.0
    if config.model.kind == "recurrent":
        return 0.0, 6.0 * config.model.iterations, 6.0 * config.model.iterations
    if config.model.kind != "ebt":
        return 0.0, 6.0, 6.0 + embedding
    refine, last_only = config.refine, config.objective.loss_steps == "last"
    steps = num_steps or mean_steps(refine)
    differentiated = steps
    if refine.backprop == "truncated" or (refine.backprop == "per_step" and last_only):
        differentiated = 1.0
    constant = steps - differentiated
    contexts = 1 if config.model.conditioning == "default" else refine.num_landscapes
    contexts = 0 if config.model.space in ("image", "board") else contexts
    learning = min(contexts, differentiated)
    vocabulary = 4 * constant + 10 * differentiated
    if refine.backprop == "per_step":
        changed = refine.gradient_clamp or refine.absolute_clamp or refine.sharpen
        text = config.model.space == "text"
        plain = text and not (changed or refine.noise_std)
        if refine.normalize_steps == "all" and plain:
            vocabulary -= 4 * (differentiated - 1)
    else:
        # A gradient reaches earlier candidates, through the candidate of a step.
        reached = refine.backprop == "full" or (
            refine.step_size_learnable or refine.noise_learnable
        )
        vocabulary += 2 * min(differentiated, steps - 1) * reached
    return (
        6 * learning + 2 * (contexts - learning),
        4 * constant + 12 * differentiated,
        vocabulary + embedding,
    )


def _keys(config: Config) -> float:
    """Mean number of keys that a query is multiplied with."""
    length, block = tokens_per_sequence(config), config.model.attention_block
    if not block or length <= block:
        return length
    return block * (math.ceil(length / block) + 1) / 2


def mean_steps(refine: RefineSetup) -> float:
    """Refinement steps of a training step, their mean where the number is drawn."""
    return (refine.num_steps + (refine.min_steps or refine.num_steps)) / 2


def count_token_weights(params: PyTree) -> int:
    """N: weights of the matrices in the blocks that every token is multiplied with."""
    return sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["blocks"])
        if len(leaf.shape) >= 3 and _of_tokens(jax.tree_util.keystr(path))
    )


def _of_tokens(path: str) -> bool:
    return "modulation" not in path and "bias" not in path


def count_parameters(params: PyTree) -> int:
    """How many numbers there are in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_non_embedding(params: PyTree) -> int:
    """All parameters but the vocabulary matrices."""
    return count_parameters(
        {name: tree for name, tree in params.items() if name not in VOCABULARY}
    )


def count_flops(jaxpr: jax.extend.core.Jaxpr) -> float:
    """FLOPs of the matrix multiplications that a traced program's results need.

    Twice the multiplications; the body of a scan as often as it runs, of a conditional
    its dearest branch, of a while loop, whose end is not known, once.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: jax.extend.core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
            total += 2.0 * math.prod(result) * math.prod(left[i] for i in contracted)
            continue
        inner = [_count(body) for body in _bodies(params.values())]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += _repeats(equation) * sum(inner)
    return total


def _repeats(equation: Any) -> int:
    """How often the programs within an equation run, over all devices."""
    params = equation.params
    if equation.primitive.name == "scan":
        return params["length"]
    if equation.primitive.name == "shard_map":  # its program is that of one device
        return params["mesh"].size
    return 1


def _shape(value: Any) -> tuple[int, ...]:
    return value.aval.shape


def _bodies(values: Iterable[Any]) -> Iterable[jax.extend.core.Jaxpr]:
    """The programs among the parameters of an equation."""
    for value in values:
        if isinstance(value, jax.extend.core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, jax.extend.core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _bodies(value)
