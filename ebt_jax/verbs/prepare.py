"""`ebt prepare`."""

from __future__ import annotations

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.errors import UserError
from ebt_jax.verbs.common import COUNT, POSITIVE, TEXT_KEY, changed, required


def run(values: flags.FlagValues) -> None:
    """Tokenizes a corpus into shards, or encodes pictures or videos."""
    output = required(values, "output", "a folder that does not exist yet")
    if values.config is None:
        required(values, "path", "files or a glob, or --config with an experiment file")

    from ebt_jax.data.prepare import prepare
    from ebt_jax.training.config import Config, from_config_dict

    config = Config() if values.config is None else from_config_dict(values.config)
    data = changed(
        config.data,
        path=values.path,
        tokenizer=values.tokenizer,
        text_key=values.text_key,
    )
    if config.model.space == "board":
        raise UserError("boards are made while a run reads them; there is no need to")
    if config.model.space == "text":
        if values.process_count > 1 or values.process_index:
            raise UserError(
                "--process_index and --process_count are of pictures and videos, but "
                "text is prepared by one process; leave them out"
            )
        prepare(data, output)
        return
    if values.tokenizer is not None or values.text_key is not None:
        raise UserError(
            "--tokenizer and --text_key are of text, but model.space is "
            f"{config.model.space!r}; leave them out"
        )
    from ebt_jax.data.prepare_vision import prepare_vision

    whole = prepare_vision(
        data,
        config.vision,
        config.model.space,
        output,
        process_index=values.process_index,
        process_count=values.process_count,
    )
    print(f"{output} is complete" if whole else f"{output} lacks others' parts yet")


VERB = Verb(
    summary="tokenize or encode data once, into a folder that data.path can name",
    details="Text is tokenized; its folder appears when it is complete.\n"
    "Pictures and videos, if --config has such a model.space, are encoded as its\n"
    "section vision says: the same command goes on where one was stopped, and several\n"
    "processes, each with its --process_index, share the work.",
    example="ebt prepare --path='books/*.txt' --tokenizer=tokenizer.json "
    "--output=shards",
    call=run,
    flags=(
        Flag("output", "folder to be made"),
        Flag("path", "corpus, as in data.path; else the config's"),
        Flag("tokenizer", "bytes, or a tokenizer.json; else the config's"),
        TEXT_KEY,
        Flag("process_index", "of pictures and videos: which process", 0, COUNT),
        Flag("process_count", "processes that share the work", 1, POSITIVE),
    ),
    config="optional",
)
