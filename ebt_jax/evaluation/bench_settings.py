"""What a benchmark measures. Nothing here imports JAX: `ebt --help` reads it."""

from __future__ import annotations

import dataclasses

from ebt_jax.errors import UserError

JOBS = ("train", "decode", "memory", "compile")
MODELS = ("ebt", "transformer_pp", "dit", "both")
SPACES = ("text", "video", "image")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A benchmark; None leaves a value to the model's own default."""

    job: str = "train"  # train | decode | memory | compile
    model: str = "ebt"  # ebt | transformer_pp | dit (image) | both
    space: str = "text"  # what is predicted: text | video | image
    system: int = 1  # 1 | 2: how the EBT is trained, see bench.py
    size: str = "xxs"  # as in model.size
    layers: int = 0  # blocks; 0: the size's
    refine_steps: int = 0  # refinement steps; 0: 2 in System 1, 2 or 3 in System 2
    vocab: int = 50277  # entries of the vocabulary
    frame: int = 3136  # video: numbers in a frame
    image: int = 32  # image: pixels, or latents, of a side
    channels: int = 4  # image: numbers in a pixel
    patch: int = 2  # image: pixels of a patch's side
    dtype: str = "float32"  # of the computation: float32 | bfloat16
    candidate_input: str = "embedding"  # embedding | anchored | final
    candidate_layers: int = 0  # last blocks that candidates pass through; 0: all
    conditioning: str | None = None  # None: time_embed of embedding, else default
    block: int | None = None  # predictions trained on at a time, as in refine.block
    meta_gradient: str | None = None  # as in refine.meta_gradient
    remat: str | None = None  # as in model.remat
    unroll: int | None = None  # as in model.unroll
    attention_block: int | None = None  # as in model.attention_block
    batch: tuple[int, ...] = (2,)  # sequences at once; one row of results for each
    seq: int = 256  # tokens of a training sequence
    seq_to: int = 0  # memory: sequences double from seq up to this; 0: only seq
    prompt: tuple[int, ...] = (16,)  # decode: tokens of a prompt; one row for each
    new: int = 32  # decode: tokens added to each prompt
    num_steps: int = 0  # decode: refinement steps of a token; 0: as trained
    best_of: int = 1  # decode: candidates for a token, of which the best is taken
    steps: int = 8  # train: updates that are timed
    rounds: int = 3  # decode: generations that are timed; with a peer: alternations
    layers_to: int = 24  # compile: the model is compiled with so many blocks, too
    steps_to: int = 8  # compile: and with so many refinement steps

    def __post_init__(self) -> None:
        for name, choices in (
            ("job", JOBS),
            ("model", MODELS),
            ("space", SPACES),
            ("system", (1, 2)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"bench {name} is {value!r}, but has to be one of "
                    f"{', '.join(map(str, choices))}"
                )
        if self.space != "text" and self.job not in ("train", "compile"):
            raise UserError(
                f"bench {self.job} is of text, but space is {self.space!r}; of images "
                "and video there are train and compile"
            )
        for name in (
            "vocab",
            "frame",
            "image",
            "channels",
            "patch",
            "seq",
            "new",
            "best_of",
            "steps",
            "rounds",
            "layers_to",
            "steps_to",
            "batch",
            "prompt",
        ):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or min(numbers) < 1:
                raise UserError(f"bench {name} is {value}, but has to be at least 1")
        for name in ("layers", "refine_steps", "seq_to", "num_steps"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"bench {name} is {getattr(self, name)}, but has to be 0 or more"
                )
        if self.seq_to and self.seq_to not in self.sequences:
            raise UserError(
                f"bench seq_to is {self.seq_to}, but sequences double from seq "
                f"({self.seq}); make it {self.sequences[-1]} or "
                f"{2 * self.sequences[-1]}"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """The kinds of models that are measured."""
        baseline = "dit" if self.space == "image" else "transformer_pp"
        return ("ebt", baseline) if self.model == "both" else (self.model,)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Lengths of the sequences whose memory is told."""
        lengths = [self.seq]
        while 2 * lengths[-1] <= self.seq_to:
            lengths.append(2 * lengths[-1])
        return tuple(lengths)


def numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of a flag such as `--prompt=64,256`.

    Args:
      name: of the flag, for the message.
      text: positive integers with commas between them.

    Raises:
      UserError: for anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(
            f"--{name} is {text!r}, but has to be one positive integer, or several "
            "with commas between them, such as 64,256"
        )
    return tuple(int(word) for word in words)
