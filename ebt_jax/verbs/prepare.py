"""`ebt prepare`."""

from __future__ import annotations

from absl import flags

from ebt_jax.command import Flag, Verb
from ebt_jax.verbs.common import TEXT_KEY, changed, required


def run(values: flags.FlagValues) -> None:
    """Tokenizes a corpus into shards."""
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
    prepare(data, output)


VERB = Verb(
    summary="tokenize a corpus once, into shards that data.path can name",
    details="The output folder appears when it is complete.",
    example="ebt prepare --path='books/*.txt' --tokenizer=tokenizer.json "
    "--output=shards",
    call=run,
    flags=(
        Flag("output", "folder to be made"),
        Flag("path", "corpus, as in data.path; else the config's"),
        Flag("tokenizer", "bytes, or a tokenizer.json; else the config's"),
        TEXT_KEY,
    ),
    config="optional",
)
