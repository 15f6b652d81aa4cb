"""The configuration of a run: its sections, and the way from flags to dataclasses.

Defaults live in the frozen dataclasses and nowhere else. Experiment files and the
command line see them as an `ml_collections.ConfigDict` (`to_config_dict`), which
refuses unknown keys; `from_config_dict` turns that back into a checked `Config`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from typing import Any

import ml_collections

from ebt_jax.data.board_config import BoardConfig
from ebt_jax.data.config import DataConfig
from ebt_jax.data.vision_config import VisionConfig
from ebt_jax.diffusion_config import DiffusionConfig
from ebt_jax.errors import UserError
from ebt_jax.models.config import ModelConfig
from ebt_jax.objective_config import ObjectiveConfig, RefineSetup
from ebt_jax.replay import ReplayConfig


def _positive(section: Any, where: str, name: str) -> None:
    if not 0 < getattr(section, name) < math.inf:
        raise UserError(
            f"{where}.{name} is {getattr(section, name)}, but has to be positive"
        )


def _seed(section: Any, where: str) -> None:
    if not 0 <= section.seed < 2**32:
        raise UserError(
            f"{where}.seed is {section.seed}, but has to be between 0 and 2**32 - 1"
        )


def _not_negative(section: Any, where: str, name: str) -> None:
    if not 0 <= getattr(section, name) < math.inf:
        raise UserError(
            f"{where}.{name} is {getattr(section, name)}, but has to be 0 or more"
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW or Muon with linear warm-up and cosine decay."""

    name: str = "adamw"  # adamw | muon (the blocks' matrices; adamw for all else)
    peak_lr: float = 2.4e-3  # learning rate after warm-up
    step_size_lr_multiplier: float = 15.0  # learning rate of the step size / peak_lr
    warmup_steps: int = 100  # steps from 0 to peak_lr
    schedule_steps: int = 0  # steps until the end of the cosine; 0: train.steps
    final_lr_fraction: float = 0.1  # end of the cosine / peak
    final_lr_shared: bool = False  # True: the step size decays to peak_lr's floor
    weight_decay: float = 0.01  # on everything but the step size
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    clip_norm: float = 1.0  # largest global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise UserError(
                f"optim.name is {self.name!r}, but has to be one of adamw, muon"
            )
        for name in ("peak_lr", "eps"):
            _positive(self, "optim", name)
        for name in (
            "step_size_lr_multiplier",
            "warmup_steps",
            "schedule_steps",
            "final_lr_fraction",
            "weight_decay",
            "clip_norm",
        ):
            _not_negative(self, "optim", name)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"optim.{name} is {getattr(self, name)}, but has to be in [0, 1)"
                )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, from which seed."""

    steps: int = 1000  # optimiser updates
    batch_size: int = 16  # sequences per update, over all devices
    accumulation: int = 1  # parts a batch is split into, one after the other
    seed: int = 0  # of parameters, data order and every draw in training
    spike_factor: float = 0.0  # leaves out gradients so many times the usual; 0: none
    max_skipped: int = 10  # updates left out in a row before going back to a checkpoint
    max_rollbacks: int = 2  # times a run goes back before it counts as diverged
    init_from: str = ""  # parameters of WORKDIR[@STEP] | FILE.safetensors | FILE.npz
    init_vocab: str = "extend"  # extend | fresh: what init_from does to the vocabulary

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "max_skipped"):
            _positive(self, "train", name)
        _not_negative(self, "train", "max_rollbacks")
        if self.spike_factor and not 1 < self.spike_factor < math.inf:
            raise UserError(
                f"train.spike_factor is {self.spike_factor}, but has to be more than "
                "1, or 0 for no limit"
            )
        if self.init_vocab not in ("extend", "fresh"):
            raise UserError(
                f"train.init_vocab is {self.init_vocab!r}, but has to be extend (keep "
                "the common entries of the vocabulary) or fresh"
            )
        if self.batch_size % self.accumulation:
            raise UserError(
                f"train.batch_size is {self.batch_size}, which train.accumulation "
                f"({self.accumulation}) does not divide; change one of them"
            )
        _seed(self, "train")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text, during training and after it."""

    every: int = 250  # steps between evaluations; 0: at the end only
    sequences: int = 256  # held-out sequences used during training; 0: all of them
    batch_size: int = 16  # sequences at once; no result depends on it
    num_steps: int = 0  # refinement steps; 0: refine.num_steps
    curve_steps: int = 8  # refinement steps of the thinking curve at the end; 0: none
    sample_tokens: int = 200  # length of the text sample at the end; 0: no samples
    sample_temperature: float = 0.7  # of the text sample; 0: the likeliest token
    seed: int = 0  # of initial candidates and noise

    def __post_init__(self) -> None:
        _positive(self, "eval", "batch_size")
        for name in (
            "every",
            "sequences",
            "num_steps",
            "curve_steps",
            "sample_tokens",
            "sample_temperature",
        ):
            _not_negative(self, "eval", name)
        _seed(self, "eval")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; their number is the product of the four axes."""

    data: int = -1  # devices the batch is split over; of one axis, -1: all others
    fsdp: int = 1  # devices the batch, parameters and optimiser state are split over
    seq: int = 1  # devices the places of a sequence are split over
    model: int = 1  # devices vocabulary, heads and hidden features are split over
    slices: int = 1  # slices with a slower network between them; a divisor of data

    def __post_init__(self) -> None:
        axes = ("data", "fsdp", "seq", "model")
        filled = [name for name in axes if getattr(self, name) == -1]
        if len(filled) > 1:
            raise UserError(
                f"mesh.{filled[0]} and mesh.{filled[1]} are both -1, but only one axis "
                "can take the devices that the others leave"
            )
        for name in (*axes, "slices"):
            if name not in filled:
                _positive(self, "mesh", name)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 250  # steps between checkpoints; 0: at the end only
    keep_latest: int = 2  # most recent checkpoints kept, at least 2
    keep_best: int = 0  # checkpoints of lowest eval/nll kept besides; 0: none
    keep_every: int = 0  # checkpoints of multiples of so many steps kept; 0: none
    save_retries: int = 4  # attempts more, after 1, 2, 4, ... seconds, if saving fails

    def __post_init__(self) -> None:
        for name in ("every", "keep_best", "keep_every", "save_retries"):
            _not_negative(self, "checkpoint", name)
        if self.keep_latest < 2:
            raise UserError(
                f"checkpoint.keep_latest is {self.keep_latest}, but has to be at least "
                "2: while one checkpoint is written or if it is damaged, there has to "
                "be another"
            )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is said of a run."""

    every: int = 10  # steps between lines of metrics.jsonl
    tensorboard: bool = True  # write TensorBoard files into the workdir
    wandb_project: str = ""  # Weights & Biases project; empty: not used
    plots: bool = True  # learning and thinking curves as PNG at the end
    compilation_cache: bool = True  # keep compiled programs in the user's cache
    hang_seconds: int = 1800  # without a step, before stacks are written; 0: never
    profile_step: int = 0  # first step of a jax.profiler window; 0: none
    profile_steps: int = 5  # its length, also of one begun by a file `profile`
    example_ids: bool = False  # write the ids of each batch to examples-PROCESS.jsonl

    def __post_init__(self) -> None:
        for name in ("every", "profile_steps"):
            _positive(self, "log", name)
        for name in ("hang_seconds", "profile_step"):
            _not_negative(self, "log", name)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    refine: RefineSetup = RefineSetup()
    objective: ObjectiveConfig = ObjectiveConfig()
    replay: ReplayConfig = ReplayConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    vision: VisionConfig = VisionConfig()
    board: BoardConfig = BoardConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        landscapes = self.model.num_landscapes
        if landscapes and landscapes != self.refine.num_landscapes:
            raise UserError(
                f"model.num_landscapes is {landscapes} but refine.num_landscapes is "
                f"{self.refine.num_landscapes}; leave the model's at 0 to follow"
            )
        starts = {"most_recent": "video", "noised": "image"}
        start = self.refine.initial_candidate
        if start in starts and self.model.space != starts[start]:
            raise UserError(
                f"refine.initial_candidate is {start!r}, which is of "
                f"{starts[start]}, but model.space is {self.model.space!r}; take "
                "'noise' or 'zeros'"
            )
        if self.replay.capacity and self.model.kind != "ebt":
            raise UserError(
                f"replay.capacity is {self.replay.capacity}, but model.kind is "
                f"{self.model.kind!r}, which refines nothing that could be replayed; "
                "set it to 0"
            )


SECTIONS: dict[str, Any] = {
    field.name: type(field.default) for field in dataclasses.fields(Config)
}
# What runs of an earlier version were made without.
ADDED_SECTIONS = {"replay", "diffusion", "vision", "board"}
ADDED_KEYS = {
    "model": (
        "space",
        "frame_size",
        "image_size",
        "channels",
        "patch",
        "condition",
        "condition_size",
        "candidate_layers",
        "landscape_scales",
        "box_rows",
        "box_columns",
        "iterations",
    ),
    "refine": ("unit_gradient",),
    "optim": ("name",),
    "data": ("train_tokens",),
}


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """A locked `ConfigDict` of a config, for experiment files and flags."""
    tree = ml_collections.ConfigDict(dataclasses.asdict(config))
    return tree.lock()


def from_config_dict(tree: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """A checked `Config` from a `ConfigDict` or nested dict.

    Raises:
      UserError: for an unknown or missing key, a value of another type, or a value that
        a section refuses.
    """
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    _same_keys("config", set(tree), set(SECTIONS))
    sections = {}
    for name, section in SECTIONS.items():
        known = {field.name: field for field in dataclasses.fields(section)}
        _same_keys(f"config.{name}", set(tree[name]), set(known))
        values = {
            key: _checked(f"{name}.{key}", value, type(known[key].default))
            for key, value in tree[name].items()
        }
        try:
            sections[name] = section(**values)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{name}.{error}") from error
    return Config(**sections)


def to_json(config: Config) -> str:
    """The config as JSON text, keys in the order of the dataclasses."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The inverse of `to_json`.

    What there was not yet when the text was written is at its default: that is what was
    done then.
    """
    tree = json.loads(text)
    for name in ADDED_SECTIONS - tree.keys():
        tree[name] = dataclasses.asdict(SECTIONS[name]())
    for name, keys in ADDED_KEYS.items():
        if name not in tree:
            continue  # which is found out below
        defaults = dataclasses.asdict(SECTIONS[name]())
        tree[name] = {key: defaults[key] for key in keys} | tree[name]
    return from_config_dict(tree)


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    left, right = dataclasses.asdict(a), dataclasses.asdict(b)
    return {
        f"{section}.{key}": (left[section][key], right[section][key])
        for section in left
        for key in left[section]
        if left[section][key] != right[section][key]
    }


def _same_keys(where: str, given: set[str], known: set[str]) -> None:
    for key in sorted(given - known):
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{where} has no key {key!r}{hint} Known: {sorted(known)}")
    if known - given:
        raise UserError(f"{where} lacks {sorted(known - given)}")


def _checked(name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(
            f"{name} is {value!r}, a {type(value).__name__}, but has to be a "
            f"{kind.__name__}"
        )
    return value
