"""`ebt generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs import generate_vision
from ebt_jax.verbs.common import (
    CHECKPOINT,
    FLOAT,
    INTEGER,
    POSITIVE,
    TRAINED,
    required,
)
from ebt_jax.verbs.model import MESH, open_trained
from ebt_jax.verbs.thinking import (
    DETAILS,
    THINK,
    check_thinks,
    flops_per_token,
    parse_thinking,
)

if TYPE_CHECKING:
    from ebt_jax.data.tokenizers import Tokenizer
    from ebt_jax.evaluation.generation import Continuation


def run(values: flags.FlagValues) -> None:
    """Continues prompts with a checkpoint of --workdir and prints the texts."""
    workdir = required(values, "workdir", "the folder of a trained run")
    stream = _streamed(values, len(values.prompt or ()) * values.samples)
    thinking = parse_thinking(values.think)

    from ebt_jax.training.workdir import open_workdir

    path, config = open_workdir(workdir)
    check_thinks(values.think, thinking, config)
    if config.model.space == "board":
        raise UserError(
            "the run is of boards, which are not continued; look at its boards.txt, or "
            "let `ebt evaluate` fill others"
        )
    if config.model.space != "text":
        return generate_vision.run(values, path, config, thinking)
    if values.out is not None:
        raise UserError("--out is of images and video, but the run is of text; drop it")
    prompts = required(values, "prompt", "a text to continue, once or more")

    from ebt_jax.evaluation.generation import generate
    from ebt_jax.evaluation.sampling import Sampling

    trained = open_trained(path, config, values.mesh, values.checkpoint)
    config, params = trained.config, trained.params
    make = None
    if values.draft is not None:
        make = _drafting(values, trained.tokenizer)
    made = generate(
        trained.objective,
        params,
        trained.tokenizer,
        prompts,
        context=config.data.context,
        new_tokens=values.new,
        sampling=Sampling(values.temperature, values.top_k, values.top_p),
        thinking=thinking,
        samples=values.samples,
        seed=values.seed,
        stop_tokens=values.stop or (),
        make=make,
        on_text=(lambda _, text: print(text, end="", flush=True)) if stream else None,
    )
    if stream:
        print()
    elif values.json:
        for continuation in made:
            row = _row(continuation)
            row["flops_per_token"] = flops_per_token(config, params, row)
            print(json.dumps(row))
    else:
        print("\n\n".join(continuation.text for continuation in made))


def _drafting(values: flags.FlagValues, tokenizer: Tokenizer) -> Callable[..., Any]:
    """What continues token ids with the model of --draft writing ahead."""
    from ebt_jax.evaluation.speculation import Draft, with_draft
    from ebt_jax.training.workdir import open_workdir

    path, config = open_workdir(values.draft)
    draft = open_trained(path, config, values.mesh, None)
    theirs = draft.tokenizer
    if theirs.digest != tokenizer.digest:
        raise UserError(
            f"the draft {values.draft} has tokenizer {theirs.name!r} with "
            f"{theirs.vocab_size} tokens, but the run {tokenizer.name!r} with "
            f"{tokenizer.vocab_size}; give a draft with the run's tokenizer"
        )
    return with_draft(Draft(draft.objective, draft.params, values.draft_tokens))


def _streamed(values: flags.FlagValues, continuations: int) -> bool:
    """Whether text is printed as it is made."""
    alone = continuations == 1 and not values.json
    if values.stream and not alone:
        why = "--json prints whole ones" if values.json else f"not of {continuations}"
        raise UserError(
            f"--stream prints the text of one continuation, {why}; leave it out"
        )
    return alone and (sys.stdout.isatty() if values.stream is None else values.stream)


def _row(continuation: Continuation) -> dict[str, Any]:
    """A continuation as an object of JSON."""
    from ebt_jax.evaluation.metrics import EFFORT

    mean = lambda values: float(values.mean()) if len(values) else 0.0
    return {
        "prompt": continuation.prompt,
        "sample": continuation.sample,
        "text": continuation.text,
        "tokens": continuation.tokens.tolist(),
        **{name: mean(getattr(continuation.effort, of)) for name, of in EFFORT.items()},
    }


VERB = Verb(
    summary="continue prompts with a trained model",
    details="What a prompt becomes depends on the seed and its number, not on the "
    "other prompts.\n--json prints a line for each continuation: prompt, sample, "
    "text, tokens and\nmeans per token: refinement steps, energy gradients, energies "
    "alone,\nFLOPs.\n\nA run of images draws each prompt, a caption, into --out; one "
    "of video continues\nthe clips of --prompt, or held-out ones, by --new frames.\n\n"
    + DETAILS,
    example="ebt generate --workdir=runs/a --prompt='The statement' --new=300",
    call=run,
    flags=(
        TRAINED,
        Flag(
            "prompt",
            "text to continue; repeat it for several",
            None,
            flags.DEFINE_multi_string,
        ),
        Flag("new", "tokens, or frames, to add", 200, INTEGER),
        Flag("temperature", "0 always takes the likeliest token", 0.8, FLOAT),
        Flag("top_k", "draws from so many likeliest tokens; 0: all", 0, INTEGER),
        Flag("top_p", "draws from this much probability; 1: all", 1.0, FLOAT),
        Flag(
            "stop",
            "token that ends a text; repeat it for several",
            None,
            flags.DEFINE_multi_string,
        ),
        Flag("samples", "continuations of each prompt", 1, POSITIVE),
        Flag("seed", "of everything that is drawn", 0, INTEGER),
        THINK,
        *generate_vision.FLAGS,
        Flag("draft", "folder of a run whose model writes ahead; same text, sooner"),
        Flag("draft_tokens", "how many tokens ahead", 4, POSITIVE),
        CHECKPOINT,
        MESH,
        Flag(
            "stream",
            "prints text as it is made; else where one text goes to a terminal",
            None,
            flags.DEFINE_boolean,
        ),
        Flag("json", "prints lines of JSON", False, flags.DEFINE_boolean),
    ),
)
