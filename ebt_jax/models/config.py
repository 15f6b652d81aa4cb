"""What a model is made of."""

from __future__ import annotations

import dataclasses

from ebt_jax.errors import UserError

# layers, heads, width (paper, table D.1; 4xs and 3xs from the published code)
SIZES = {
    "4xs": (2, 2, 128),
    "3xs": (4, 4, 256),
    "xxs": (6, 6, 384),
    "xs": (12, 6, 384),
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (24, 16, 1536),
    "xl": (24, 32, 2048),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """An energy network or its baseline: Transformer++, for images DiT.

    Text and video are causal models of sequences; images a bidirectional one of
    patches, which has adaLN-zero blocks and leaves `conditioning`, `candidate_input`,
    `norm` and `activation` alone; boards one of cells, whose candidates are anchored.
    """

    kind: str = "ebt"  # ebt | transformer_pp | dit (image) | recurrent (board)
    space: str = "text"  # what is predicted: text | video | image | board
    size: str = "4xs"  # 4xs | 3xs | xxs | xs | small | medium | large | xl
    num_layers: int = 0  # blocks; 0: the size's
    num_heads: int = 0  # attention heads; 0: the size's
    dim: int = 0  # width of the residual stream; 0: the size's
    ffn_multiplier: float = 1.0  # feed-forward hidden width / dim
    vocab_size: int = 0  # entries of the candidate; 0: tokenizer's, boards'
    frame_size: int = 0  # video: numbers in a frame; 0: the data's
    image_size: int = 0  # image: pixels, or latents, of a side; 0: the data's
    channels: int = 0  # image: numbers in a pixel; 0: the data's
    patch: int = 2  # image: pixels, or latents, of a patch's side
    box_rows: int = 0  # board: rows of a box; 0: the boards'
    box_columns: int = 0  # board: columns of a box; 0: the boards'
    iterations: int = 4  # recurrent: passes through all blocks, in training
    condition: str = "none"  # image: none (a learnt vector) | caption
    condition_size: int = 0  # image: numbers in an encoded caption; 0: the data's
    num_landscapes: int = 0  # step embeddings; 0: refine.num_landscapes
    conditioning: str = "time_embed"  # default | time_embed | adaln | adaln_zero
    candidate_input: str = "embedding"  # embedding (published) | anchored | final
    candidate_layers: int = 0  # last blocks that candidates pass through; 0: all
    landscape_scales: bool = False  # True: a learnt factor of each landscape's energy
    tied_embedding: bool = False  # True: candidates are embedded by the token table
    norm: str = "rms"  # rms | layer | dyt | none
    dyt_alpha: float = 0.5  # initial slope of the dyt norm
    activation: str = "silu"  # silu | relu | gelu | elu
    dtype: str = "float32"  # compute: float32 | bfloat16; parameters stay float32
    remat: str = "none"  # none | dots | full: what each block recomputes backwards
    unroll: int = 6  # up to so many blocks are unrolled, more are scanned
    attention_block: int = 1024  # queries attended at a time; 0: all at once
    fused: bool = True  # maps of one input as one product; off where mesh.model splits

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.num_layers or SIZES[self.size][0]

    @property
    def blocks_of_candidates(self) -> int:
        """Number of blocks that candidates pass through, the last ones."""
        return self.candidate_layers or self.layers

    @property
    def anchored(self) -> bool:
        """Whether candidates start from a hidden state of the token they continue.

        Of `anchored` that below their blocks, with all blocks its embedding; of `final`
        that above all blocks.
        """
        return self.candidate_input != "embedding"

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.num_heads or SIZES[self.size][1]

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.dim or SIZES[self.size][2]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def unit(self) -> str:
        """What is counted: tokens, frames, images or boards."""
        units = {"text": "tokens", "video": "frames", "image": "images"}
        return {**units, "board": "boards"}[self.space]

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward part."""
        return int(self.ffn_multiplier * self.width)

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", ("ebt", "transformer_pp", "dit", "recurrent")),
            ("space", ("text", "video", "image", "board")),
            ("condition", ("none", "caption")),
            ("size", tuple(SIZES)),
            ("conditioning", ("default", "time_embed", "adaln", "adaln_zero")),
            ("candidate_input", ("embedding", "anchored", "final")),
            ("norm", ("rms", "layer", "dyt", "none")),
            ("activation", ("silu", "relu", "gelu", "elu")),
            ("dtype", ("float32", "bfloat16")),
            ("remat", ("none", "dots", "full")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"model.{name} is {value!r}, but has to be one of "
                    f"{', '.join(choices)}"
                )
        for name in (
            "num_layers",
            "num_heads",
            "dim",
            "vocab_size",
            "frame_size",
            "image_size",
            "channels",
            "box_rows",
            "box_columns",
            "condition_size",
            "num_landscapes",
            "candidate_layers",
        ):
            if getattr(self, name) < 0:
                raise UserError(
                    f"model.{name} is {getattr(self, name)}, but has to be positive, "
                    "or 0 for its default"
                )
        if self.patch < 1:
            raise UserError(f"model.patch is {self.patch}, but has to be at least 1")
        if self.image_size % self.patch:
            raise UserError(
                f"model.image_size is {self.image_size}, which patches of model.patch "
                f"{self.patch} do not divide; change one of them"
            )
        baselines = {"image": ("dit",), "board": ("transformer_pp", "recurrent")}
        kinds = "ebt", *baselines.get(self.space, ("transformer_pp",))
        if self.kind not in kinds:
            raise UserError(
                f"model.kind is {self.kind!r}, but of {self.space} there are "
                f"{', '.join(kinds[:-1])} and {kinds[-1]}"
            )
        if self.iterations < 1:
            raise UserError(
                f"model.iterations is {self.iterations}, but has to be at least 1"
            )
        if self.space == "board" and self.conditioning.startswith("adaln"):
            raise UserError(
                f"model.conditioning is {self.conditioning!r}, but of boards there are "
                "default and time_embed"
            )
        if self.attention_block < 0:
            raise UserError(
                f"model.attention_block is {self.attention_block}, but has to be "
                "positive, or 0 for all queries at once"
            )
        if self.unroll < 0:
            raise UserError(
                f"model.unroll is {self.unroll}, but has to be 0 (always scan) or more"
            )
        if self.hidden < 1:
            raise UserError(
                f"model.ffn_multiplier is {self.ffn_multiplier}, which leaves "
                f"{self.hidden} hidden units of {self.width}; raise it"
            )
        if self.width % self.heads:
            raise UserError(
                f"model: {self.heads} heads do not divide width {self.width}; change "
                "model.num_heads or model.dim"
            )
        if self.space == "image" and self.width % 4:
            raise UserError(
                f"model: width {self.width} of an image model has to be a multiple of "
                "4, for sines and cosines of rows and columns; change model.dim"
            )
        if self.space != "image" and self.head_dim % 2:
            raise UserError(
                f"model: width {self.width} over {self.heads} heads gives head size "
                f"{self.head_dim}, but rotary positions need an even one; change "
                "model.num_heads or model.dim"
            )
        if self.candidate_layers > self.layers:
            raise UserError(
                f"model.candidate_layers is {self.candidate_layers}, but there are "
                f"{self.layers} blocks; lower it, or 0 for all"
            )
        if self.anchored and self.conditioning == "time_embed":
            raise UserError(
                f"model.candidate_input is {self.candidate_input!r}, which has no step "
                "token, but model.conditioning is 'time_embed'; set it to 'default'"
                + (", 'adaln' or 'adaln_zero'" if self._from_embedding else "")
            )
        trunk = self.blocks_of_candidates < self.layers
        if trunk and not self.anchored:
            raise UserError(
                f"model.candidate_layers is {self.candidate_layers}, which leaves "
                "blocks to the context alone, but model.candidate_input is "
                "'embedding', which knows nothing of them; set it to 'anchored' or "
                "'final'"
            )
        if self.anchored and not self._from_embedding:
            if self.conditioning != "default":
                raise UserError(
                    "model: candidates start from a hidden state that all landscapes "
                    f"share, but model.conditioning is {self.conditioning!r}; set it "
                    "to 'default'"
                )

    @property
    def _from_embedding(self) -> bool:
        """Whether candidates are anchored to an embedding, which no block has met."""
        all_blocks = self.blocks_of_candidates == self.layers
        return self.candidate_input == "anchored" and all_blocks
