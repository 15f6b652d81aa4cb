"""The command line: `ebt VERB --flag=value ...`.

Every verb is a function of this package with its arguments as flags. A mistake of the
user's is one line `error: ...` on stderr and exit code 2, a run that diverged is exit
code 3, Ctrl-C is 130; anything else is a bug and shows its traceback.

Verbs import what they need when they run: JAX and its libraries take seconds, and
`ebt --help` or a mistyped flag should not wait for them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from ebt_jax.command import Flag, Verb, overview, parse, suggest, usage
from ebt_jax.errors import TrainingDiverged, UserError
from ebt_jax.evaluation.bench_settings import JOBS, Settings, numbers

if TYPE_CHECKING:
    from ebt_jax.data.config import DataConfig
    from ebt_jax.evaluation.generation import Continuation

INTEGER, FLOAT = flags.DEFINE_integer, flags.DEFINE_float
COUNT = functools.partial(flags.DEFINE_integer, lower_bound=0)
POSITIVE = functools.partial(flags.DEFINE_integer, lower_bound=1)

BENCH = Settings()

WORKDIR = Flag("workdir", "folder of the run")
CHECKPOINT = Flag("checkpoint", "step of a checkpoint; else the newest", None, INTEGER)
NUM_STEPS = Flag("num_steps", "refinement steps; 0 for the trained number", 0, COUNT)
TEXT_KEY = Flag("text_key", "field of a record with the text; else the config's")


def main() -> None:
    """Entry point of the console script `ebt`."""
    _with_large_pages()
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs a command line.

    Args:
      argv: the verb and its flags, without the name of the program.

    Returns:
      The exit code.
    """
    try:
        if not argv or argv[0] in ("help", "-h", "--help"):
            print(overview(VERBS))
            return 0
        if argv[0] not in VERBS:
            raise UserError(
                f"there is no verb {argv[0]!r}{suggest(argv[0], VERBS)} Known: "
                f"{', '.join(VERBS)}"
            )
        verb = VERBS[argv[0]]
        if {"-h", "--help"} & set(argv[1:]):
            print(usage(argv[0], verb))
            return 0
        verb.call(parse(verb, argv))
    except (UserError, flags.Error) as error:
        return _fail(error, 2)
    except TrainingDiverged as error:
        return _fail(error, 3)
    except KeyboardInterrupt:
        return 130
    return 0


def _with_large_pages() -> None:
    """Starts this program again where large memory pages have to be asked for.

    XLA allocates the temporaries of a training step anew each time. On a CPU up to a
    fifth of a step went into faults of 4 kB pages. glibc takes large pages, but only
    if GLIBC_TUNABLES says so when a process starts; where it is set, to whatever it may
    be, nothing happens.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _train(values: flags.FlagValues) -> None:
    workdir = _required(values, "workdir", "a folder for what the run writes")
    if values.steps is not None:
        values.config.train.steps = values.steps

    from ebt_jax.training.config import from_config_dict
    from ebt_jax.training.loop import train

    train(from_config_dict(values.config), workdir)


def _evaluate(values: flags.FlagValues) -> None:
    workdir = _required(values, "workdir", "the folder of a trained run")

    from ebt_jax.data import pipeline, tokenizers
    from ebt_jax.evaluation.metrics import evaluate
    from ebt_jax.training import checkpoint
    from ebt_jax.training.config import resolve
    from ebt_jax.training.monitor import finite
    from ebt_jax.training.objective import build_objective

    path, config = checkpoint.open_workdir(workdir)
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = resolve(config, tokenizer.vocab_size)
    params = checkpoint.restore_params(path, values.checkpoint)
    data = _changed(
        config.data,
        path=values.data,
        text_key=values.text_key,
        packing=values.packing,
    )
    batches = pipeline.held_out_batches(
        data,
        tokenizer,
        batch_size=values.batch_size or config.eval.batch_size,
        sequences=values.sequences,
        split="held_out" if values.data is None else "all",
    )
    results = evaluate(
        build_objective(config),
        params,
        batches,
        seed=config.eval.seed,
        num_steps=values.num_steps,
        progress=sys.stderr.isatty(),
    )
    about = {
        "workdir": str(path),
        "checkpoint": values.checkpoint or checkpoint.latest_step(path),
        "data": values.data or f"held-out part of {data.held_out_path or data.path}",
    }
    if values.json:
        print(json.dumps(about | finite(results), allow_nan=False))
    else:
        print(_table(about, results))


def _generate(values: flags.FlagValues) -> None:
    workdir = _required(values, "workdir", "the folder of a trained run")
    prompts = _required(values, "prompt", "a text to continue, once or more")

    stream = _streamed(values, len(prompts) * values.samples)

    from ebt_jax.data import tokenizers
    from ebt_jax.evaluation.generation import generate
    from ebt_jax.evaluation.sampling import Sampling
    from ebt_jax.thinking import AS_TRAINED, Thinking
    from ebt_jax.training import checkpoint
    from ebt_jax.training.config import resolve
    from ebt_jax.training.objective import build_objective

    thinking = Thinking(values.num_steps, values.best_of, values.tolerance)
    path, config = checkpoint.open_workdir(workdir)
    landscapes, most = config.refine.num_landscapes, config.refine.num_steps
    if config.model.kind != "ebt" and thinking != AS_TRAINED:
        raise UserError(
            f"the run's model is a {config.model.kind}, which predicts in one pass; "
            "leave out --num_steps, --best_of and --tolerance"
        )
    if values.tolerance is not None and (values.num_steps or most) <= landscapes:
        raise UserError(
            f"--tolerance={values.tolerance} has nothing to end: a step in each "
            f"landscape is always taken, and there are {landscapes}; give a larger "
            "--num_steps, the most of them"
        )
    tokenizer = tokenizers.load(config.data.tokenizer)
    config = resolve(config, tokenizer.vocab_size)
    made = generate(
        build_objective(config),
        checkpoint.restore_params(path, values.checkpoint),
        tokenizer,
        prompts,
        context=config.data.context,
        new_tokens=values.new,
        sampling=Sampling(values.temperature, values.top_k, values.top_p),
        thinking=thinking,
        samples=values.samples,
        seed=values.seed,
        stop_tokens=values.stop or (),
        on_text=(lambda _, text: print(text, end="", flush=True)) if stream else None,
    )
    if stream:
        print()
    elif values.json:
        for continuation in made:
            print(json.dumps(_row(continuation)))
    else:
        print("\n\n".join(continuation.text for continuation in made))


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
    steps = continuation.num_steps
    return {
        "prompt": continuation.prompt,
        "sample": continuation.sample,
        "text": continuation.text,
        "tokens": continuation.tokens.tolist(),
        "refinement_steps": float(steps.mean()) if len(steps) else 0.0,
    }


def _inspect(values: flags.FlagValues) -> None:
    from ebt_jax.evaluation.inspect import inspect
    from ebt_jax.training.config import from_config_dict

    print(inspect(from_config_dict(values.config)))


def _prepare(values: flags.FlagValues) -> None:
    output = _required(values, "output", "a folder that does not exist yet")
    if values.config is None:
        _required(
            values, "path", "files or a glob, or --config with an experiment file"
        )

    from ebt_jax.data.prepare import prepare
    from ebt_jax.training.config import Config, from_config_dict

    config = Config() if values.config is None else from_config_dict(values.config)
    data = _changed(
        config.data,
        path=values.path,
        tokenizer=values.tokenizer,
        text_key=values.text_key,
    )
    prepare(data, output)


def _bench(values: flags.FlagValues) -> None:
    fields = {field.name for field in dataclasses.fields(Settings)} - {"job"}
    given: dict[str, Any] = {name: values[name].value for name in fields}
    for name in ("batch", "prompt"):
        given[name] = numbers(name, given[name])
    settings = Settings(job=values.word, **given)

    from ebt_jax.evaluation.bench import bench
    from ebt_jax.evaluation.bench_peer import against_peer
    from ebt_jax.evaluation.bench_table import render

    def say(line: str) -> None:
        if sys.stderr.isatty():
            print(line, file=sys.stderr)

    if values.peer is None:
        result = bench(settings, say)
    else:
        result = against_peer(settings, values.peer, say)
    print(json.dumps(result) if values.json else render(result))


def _required(values: flags.FlagValues, name: str, what: str) -> Any:
    if not values[name].value:
        raise UserError(f"--{name} is missing; give it {what}")
    return values[name].value


def _changed(data: DataConfig, **changes: str | None) -> DataConfig:
    """The config with those changes that are given."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(data, **given)


def _table(about: dict[str, Any], results: dict[str, float]) -> str:
    """Results for people, one line each."""
    notes = {
        "nll": "nats per token",
        "energy_gap": "before - after",
        "energy_rose": "share of predictions whose energy rose",
        "tokens": "scored",
    }
    lines = [f"{name:<24}{value}" for name, value in about.items()]
    for name, value in results.items():
        number = f"{value:,.0f}" if name in ("tokens", "sequences") else f"{value:.5g}"
        lines.append(f"{name:<24}{number:<12}{notes.get(name, '')}".rstrip())
    return "\n".join(lines)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


VERBS = {
    "train": Verb(
        summary="train a model, or continue a run that was stopped",
        details="The workdir gets config.json, metrics.jsonl, checkpoints, plots and a "
        "text sample.\nThe same command continues a run at its newest checkpoint.",
        example="ebt train --config=experiments/text.py:quickstart --workdir=runs/a",
        call=_train,
        flags=(
            WORKDIR,
            Flag("steps", "short for --config.train.steps", None, INTEGER),
        ),
        config="required",
    ),
    "evaluate": Verb(
        summary="score text: nll, perplexity, bits per byte, energies",
        details="Scores what the run has held out, or any text. The batch size changes "
        "no result.",
        example="ebt evaluate --workdir=runs/a --num_steps=4",
        call=_evaluate,
        flags=(
            WORKDIR,
            Flag("data", "what to score, as in data.path; else what is held out"),
            TEXT_KEY,
            Flag("packing", "concat, first_fit or document; else the config's"),
            NUM_STEPS,
            CHECKPOINT,
            Flag("batch_size", "sequences at once; 0 for the config's", 0, COUNT),
            Flag("sequences", "how many to score; 0 for all", 0, COUNT),
            Flag("json", "prints one line of JSON", False, flags.DEFINE_boolean),
        ),
    ),
    "generate": Verb(
        summary="continue prompts with a trained model",
        details="What a prompt becomes depends on the seed and its number, not on the "
        "other prompts.\n--json prints a line for each continuation: prompt, sample, "
        "text, tokens and the mean\nrefinement steps of a token.",
        example="ebt generate --workdir=runs/a --prompt='The statement' --new=300",
        call=_generate,
        flags=(
            WORKDIR,
            Flag(
                "prompt",
                "text to continue; repeat it for several",
                None,
                flags.DEFINE_multi_string,
            ),
            Flag("new", "tokens to add", 200, INTEGER),
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
            NUM_STEPS,
            Flag("best_of", "candidates a token; the lowest energy wins", 1, POSITIVE),
            Flag(
                "tolerance",
                "refines until an energy falls by no more; --num_steps is the most",
                None,
                FLOAT,
            ),
            CHECKPOINT,
            Flag(
                "stream",
                "prints text as it is made; else where one text goes to a terminal",
                None,
                flags.DEFINE_boolean,
            ),
            Flag("json", "prints lines of JSON", False, flags.DEFINE_boolean),
        ),
    ),
    "inspect": Verb(
        summary="show parameters, FLOPs and memory of a config; runs nothing",
        details="The training step is compiled for the devices that are there.",
        example="ebt inspect --config=experiments/text.py:size=xs",
        call=_inspect,
        config="required",
    ),
    "bench": Verb(
        summary="time training or generation; memory, compiling",
        details="train    whole optimiser updates, their FLOPs and MFU\n"
        "decode   generated tokens, one after the other\n"
        "memory   of the compiled training step; runs nothing\n"
        "compile  of the training step, with more layers and more steps\n"
        "\n"
        "On random tokens. --batch and --prompt take several numbers, such as 64,256.\n"
        "--model=both times EBT and Transformer++ in alternation and sets their ratio\n"
        "beside that of their FLOPs.\n"
        "--peer runs another program in alternation, each in processes of their own.\n"
        "It prints JSON with seconds, tokens_per_second and peak_mib. Both get\n"
        "MALLOC_MMAP_THRESHOLD_=8589934592 and MALLOC_TRIM_THRESHOLD_=17179869184\n"
        "where these are not set: else page faults are timed (glibc; a CPU). Without\n"
        "--peer they are yours to set.",
        example="ebt bench train --size=xxs --vocab=256 --batch=4 --seq=256",
        call=_bench,
        flags=(
            Flag("model", "ebt, transformer_pp or both", BENCH.model),
            Flag("system", "how the EBT is trained, 1 or 2", BENCH.system, INTEGER),
            Flag("size", "4xs, 3xs, xxs, xs, small, medium, large or xl", BENCH.size),
            Flag("layers", "blocks; 0: the size's", BENCH.layers, COUNT),
            Flag(
                "refine_steps",
                "refinement steps; 0: 2 in System 1, 2-3 in System 2",
                BENCH.refine_steps,
                COUNT,
            ),
            Flag(
                "candidate_input",
                "embedding (published) or anchored",
                BENCH.candidate_input,
            ),
            Flag("conditioning", "as model.conditioning; else what is published"),
            Flag("dtype", "of the computation: float32 or bfloat16", BENCH.dtype),
            Flag("block", "as refine.block; else its default", None, COUNT),
            Flag("meta_gradient", "rule or autodiff, as refine.meta_gradient"),
            Flag("remat", "as model.remat; else its default"),
            Flag("unroll", "as model.unroll; else its default", None, COUNT),
            Flag(
                "attention_block",
                "as model.attention_block; else its default",
                None,
                COUNT,
            ),
            Flag("vocab", "entries of the vocabulary", BENCH.vocab, POSITIVE),
            Flag("batch", "sequences at once; one or several numbers", "2"),
            Flag("seq", "tokens of a training sequence", BENCH.seq, POSITIVE),
            Flag("seq_to", "memory: doubles seq up to this", BENCH.seq_to, COUNT),
            Flag("steps", "train: updates that are timed", BENCH.steps, POSITIVE),
            Flag("prompt", "decode: tokens of a prompt; one or several numbers", "16"),
            Flag("new", "decode: tokens added to each prompt", BENCH.new, POSITIVE),
            NUM_STEPS,
            Flag(
                "best_of",
                "decode: candidates for a token",
                BENCH.best_of,
                POSITIVE,
            ),
            Flag(
                "rounds",
                "decode: timed generations; --peer: alternations",
                BENCH.rounds,
                POSITIVE,
            ),
            Flag(
                "layers_to",
                "compile: blocks of the deeper model",
                BENCH.layers_to,
                POSITIVE,
            ),
            Flag(
                "steps_to",
                "compile: refinement steps of the longer refinement",
                BENCH.steps_to,
                POSITIVE,
            ),
            Flag("peer", "command line of another program"),
            Flag("json", "prints one line of JSON", False, flags.DEFINE_boolean),
        ),
        words=JOBS,
    ),
    "prepare": Verb(
        summary="tokenize a corpus once, into shards that data.path can name",
        details="The output folder appears when it is complete.",
        example="ebt prepare --path='books/*.txt' --tokenizer=tokenizer.json "
        "--output=shards",
        call=_prepare,
        flags=(
            Flag("output", "folder to be made"),
            Flag("path", "corpus, as in data.path; else the config's"),
            Flag("tokenizer", "bytes, or a tokenizer.json; else the config's"),
            TEXT_KEY,
        ),
        config="optional",
    ),
}
