"""`ebt bench`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.evaluation.bench_settings import JOBS, Settings, numbers
from ebt_jax.verbs.common import COUNT, INTEGER, NUM_STEPS, POSITIVE

BENCH = Settings()


def run(values: flags.FlagValues) -> None:
    """Measures, and prints a table or JSON."""
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


VERB = Verb(
    summary="time training or generation; memory, compiling",
    details="train    whole optimiser updates, their FLOPs and MFU\n"
    "decode   generated tokens, one after the other\n"
    "memory   of the compiled training step; runs nothing\n"
    "compile  of the training step, with more layers and more steps\n"
    "\n"
    "On random inputs. --batch and --prompt take several numbers, such as 64,256.\n"
    "--model=both times the EBT and its baseline in alternation and sets their ratio\n"
    "beside that of their FLOPs. Of images a token is a patch, of video a frame.\n"
    "--peer runs another program in alternation, each in processes of their own.\n"
    "It prints JSON with seconds, tokens_per_second and peak_mib. Both get\n"
    "MALLOC_MMAP_THRESHOLD_=8589934592 and MALLOC_TRIM_THRESHOLD_=17179869184\n"
    "where these are not set: else page faults are timed (glibc; a CPU). Without\n"
    "--peer they are yours to set.",
    example="ebt bench train --size=xxs --vocab=256 --batch=4 --seq=256",
    call=run,
    flags=(
        Flag("model", "ebt, transformer_pp, dit or both", BENCH.model),
        Flag("space", "what is predicted: text, video or image", BENCH.space),
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
            "embedding (published), anchored or final",
            BENCH.candidate_input,
        ),
        Flag(
            "candidate_layers",
            "last blocks that candidates pass through; 0: all",
            BENCH.candidate_layers,
            COUNT,
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
        Flag("frame", "video: numbers in a frame", BENCH.frame, POSITIVE),
        Flag("image", "image: pixels of a side", BENCH.image, POSITIVE),
        Flag("channels", "image: numbers in a pixel", BENCH.channels, POSITIVE),
        Flag("patch", "image: pixels of a patch's side", BENCH.patch, POSITIVE),
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
)
