"""What a run reads."""

from __future__ import annotations

import dataclasses

from ebt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A corpus, its tokenizer, and how it is cut into sequences.

    Of images and video: their files, see `data.images` and `data.video`.
    """

    path: str = "pydoc"  # see data.sources: pydoc | files, globs | arithmetic | ...
    tokenizer: str = "bytes"  # bytes | path of a tokenizer.json, also .gz
    text_key: str = "text"  # field of a record that holds the text
    context: int = 128  # tokens of context; a sequence is one longer
    packing: str = "concat"  # concat | first_fit | document
    train_tokens: int = 0  # trains on so many, the first ones; 0: on all there are
    held_out: float = 0.1  # fraction of the corpus kept for evaluation
    held_out_path: str = ""  # evaluate on this corpus instead; held_out is then 0
    shuffle: bool = True  # training sequences in a new random order every epoch
    repeat: bool = True  # start over at the end of the training data
    max_malformed: float = 0.0  # fraction of records that may be malformed, else stop
    num_workers: int = 0  # processes that prepare batches ahead; 0: in this one

    def __post_init__(self) -> None:
        if self.context < 1:
            raise UserError(f"data.context is {self.context}, but has to be at least 1")
        if self.train_tokens and self.train_tokens < self.context:
            raise UserError(
                f"data.train_tokens is {self.train_tokens}, but a sequence has "
                f"data.context = {self.context}; raise it, or 0 for all"
            )
        if self.packing not in ("concat", "first_fit", "document"):
            raise UserError(
                f"data.packing is {self.packing!r}, but has to be one of concat, "
                "first_fit, document"
            )
        for name in ("held_out", "max_malformed"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(
                    f"data.{name} is {value}, but has to be a fraction in [0, 1)"
                )
        if self.num_workers < 0:
            raise UserError(
                f"data.num_workers is {self.num_workers}, but has to be 0 or more"
            )
        if not self.path:
            raise UserError(
                "data.path is empty; name a file, a glob, tfds:NAME or 'pydoc'"
            )
